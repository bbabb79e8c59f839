"""`python -m mtp_jax.data`: its figures are those of the documents and batches, and it writes nothing."""

import re
from pathlib import Path

import pytest
from conftest import listing

from mtp_jax.config_file import validate
from mtp_jax.data.preview import survey_sequences, survey_sources
from mtp_jax.data.sources import read_sources
from mtp_jax.data.tokens import Encoder

pytestmark = pytest.mark.quick


@pytest.fixture
def tree(make_tree, tmp_path, small_folder):
    """A tiny multi-token run on text files."""
    tree = make_tree(tmp_path / "run")
    tree |= {"objective": "multi_token", "model": {"path": str(small_folder)}, "lora": {"rank": 4}}
    tree["mtp"] = {"masks": 2}
    tree["train"]["anchors"] = 5
    return tree


def test_it_prints_what_training_would_see(command, write_config, tree, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    config = write_config(tree)
    before = listing(tmp_path)
    outcome = command("data.__main__", "--config", config, "--examples", 2)
    assert outcome.code == 0, outcome
    assert max(map(len, outcome.out.splitlines())) <= 80
    shown = " ".join(outcome.out.split())
    assert re.search(r"documents \d+ to train on, 100\.0% of the mixture; figures from all of them", shown), outcome
    assert re.search(r"tokens 10% [\d,]+, median [\d,]+, 90% [\d,]+, longest [\d,]+", shown)
    assert re.search(r"supervised \d\d\.\d% of tokens too long \d+\.\d% of documents", shown)
    assert re.search(r"padding \d\.\d\d% of rows supervised \d\d\.\d% of rows", shown)
    assert re.search(r"[\d,]+ longer than a sequence \(split into pieces\)", shown)
    assert re.search(r"anchors [45]\.\d per sequence", shown)
    assert len(re.findall(r"^doc\d\d\.txt, \d+ rows of sequence \d", outcome.out, re.MULTILINE)) == 2
    assert listing(tmp_path) == before


@pytest.mark.parametrize("objective", ["multi_token", "next_token"])
def test_figures_are_those_of_every_document_and_every_row(tree, small_tokenizer, objective):
    if objective == "next_token":
        tree["train"].pop("anchors")
        tree = {key: value for key, value in tree.items() if key not in ("lora", "mtp")}
    config = validate({**tree, "objective": objective}, "tree")
    training, _ = read_sources(config.data)
    (source,) = survey_sources(config, training, small_tokenizer, every=True)
    encoded = [Encoder(small_tokenizer)(document) for document in training[0]]
    assert source.tokens == [len(found.tokens) for found in encoded] and source.documents == len(encoded)
    assert source.supervised == sum(len(found.tokens) - 1 for found in encoded)
    assert source.too_long == sum(len(found.tokens) > 33 for found in encoded)
    (batch, _), (figures, counts) = survey_sequences(config, training, small_tokenizer, every=True)
    assert counts["documents"] >= len(encoded) and figures.rows == 32 * figures.sequences
    assert 0 <= figures.padding < 0.1 * figures.rows
    # Of a segment's rows at most the last has no label.
    assert 0 <= figures.rows - figures.padding - figures.supervised <= figures.segments
    assert (figures.places > 0) == (objective == "multi_token") == ("anchors" in batch)


def test_documents_show_what_is_supervised_and_where_blocks_are(command, write_config, tree, jsonl, small_folder):
    source = jsonl([{"prompt": f"the cat {i}", "completion": " sat on the mat"} for i in range(40)])
    tree["data"]["sources"] = [source.model_dump()]
    outcome = command("data.__main__", "--config", write_config(tree), "--examples", 20)
    assert outcome.code == 0, outcome
    shown = re.findall(r"rows of sequence 0 .*\n(.*)\n", outcome.out)
    assert len(shown) > 1, outcome
    for document in shown:
        assert re.fullmatch(r"<\|endoftext\|>the cat \d+\^?«[ ^a-z]+<\|endoftext\|>»", document), outcome
    assert "".join(shown).count("^") == 5
    assert "prompts with completions, supervised in the completions" in outcome.out


def test_a_tokenizer_is_trained_where_the_run_would_train_one(command, write_config, make_tree, tmp_path):
    tree = make_tree(tmp_path / "run")
    outcome = command("data.__main__", "--config", write_config(tree), "--all", "--examples", 0)
    assert outcome.code == 0 and "trained now, 300 tokens" in outcome.out, outcome
    assert not Path(tree["output_dir"]).exists()


def test_streams_are_sampled_and_never_read_whole(command, write_config, tree, jsonl):
    source = jsonl([{"text": f"the cat {i} sat on the mat"} for i in range(40)], streaming=True)
    tree["data"]["sources"] = [source.model_dump()]
    config = write_config(tree)
    outcome = command("data.__main__", "--config", config, "--examples", 0)
    assert outcome.code == 0 and "streamed texts" in outcome.out, outcome
    outcome = command("data.__main__", "--config", config, "--all")
    assert outcome.code == 2 and outcome.errors[0].startswith("--all reads a whole epoch, and data.sources.0"), outcome


@pytest.mark.parametrize("more", [["--examples", "-1"], ["data.sources.0.path=nowhere"], ["train.sequence_lenght=3"]])
def test_mistakes_are_one_line(command, write_config, tree, more):
    outcome = command("data.__main__", "--config", write_config(tree), *more)
    assert outcome.code == 2 and len(outcome.errors) == 1 and not outcome.out, outcome
