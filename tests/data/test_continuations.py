"""Continuations by the base model: where prompts come from, what is written, how training reads it."""

import json

import numpy as np
import pytest
from conftest import listing, read_lines

from mtp_jax.api import load
from mtp_jax.config import Continuations, Data
from mtp_jax.config_file import validate
from mtp_jax.data.continuations import Prompt, choose_prompts, count_written, read_continuations, write_continuations
from mtp_jax.data.documents import Completion, Conversation, Document, Text
from mtp_jax.data.sources import read_sources, source_documents
from mtp_jax.data.tokens import Encoder
from mtp_jax.errors import UserError
from mtp_jax.training.run import train

CHAT = (
    "{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)


class Given(Document):
    """A document that holds its content."""

    def __init__(self, name, content):
        self.name, self.held = name, content

    def content(self):
        return self.held


@pytest.fixture
def tree(make_tree, tmp_path, small_folder):
    """A tiny multi-token run on continuations."""
    tree = make_tree(tmp_path / "run")
    tree |= {"objective": "multi_token", "model": {"path": str(small_folder)}, "lora": {"rank": 4}}
    tree["mtp"] = {"masks": 2}
    tree["data"]["continuations"] = {
        "path": str(tmp_path / "made" / "continuations.jsonl"),
        "count": 7,
        "prompt_tokens": 5,
        "new_tokens": 9,
    }
    tree["evaluation"] = {"every": 12, "prompts": 2, "prompt_tokens": 4, "new_tokens": 8}
    return tree


def prompts_of(contents, tokenizer, count, context=64, **more):
    documents = [Given(f"{i}", content) for i, content in enumerate(contents)]
    wanted = Continuations(path="unused", count=count, **more)
    return list(choose_prompts([documents], [1.0], tokenizer, wanted, context, seed=0))


def test_a_file_holds_what_the_base_model_goes_on_with(command, write_config, tree, small_folder):
    outcome = command("regenerate", "--config", write_config(tree), "--batch-size", 3)
    assert outcome.code == 0, outcome
    lines = read_lines(tree["data"]["continuations"]["path"])
    assert len(lines) == 7
    generator = load(str(small_folder))
    training, held_out = read_sources(Data(**{**tree["data"], "continuations": None}))
    texts = [document.text() for document in training[0]]
    for line in lines:
        (alone,) = generator([line["prompt"]], 9)
        written = generator.tokenizer.decode(alone.token_ids, clean_up_tokenization_spaces=False)
        assert line["completion"] == written and written
        assert any(line["prompt"] in text for text in texts)
    assert not any(line["prompt"] in document.text() for line in lines for document in held_out)


def test_a_file_that_was_cut_off_is_continued_and_a_finished_one_stays(command, write_config, tree, tmp_path):
    config, folder = write_config(tree), tmp_path / "made"
    assert command("regenerate", "--config", config, "--batch-size", 3).code == 0
    (whole,) = listing(folder).values()
    (name,) = listing(folder)
    assert "already there" in command("regenerate", "--config", config).out
    (folder / name).unlink()
    second = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    (folder / f"{name}.part").write_bytes(whole[: second + 11])  # two lines, and a torn third
    outcome = command("regenerate", "--config", config, "--batch-size", 3)
    assert "2 of 7" in outcome.err, outcome
    assert listing(folder) == {name: whole}


def test_another_files_continuations_are_not_overwritten(command, write_config, tree, tmp_path):
    config, folder = write_config(tree), tmp_path / "made"
    assert command("regenerate", "--config", config).code == 0
    before = listing(folder)
    tree["data"]["continuations"]["prompt_tokens"] = 6
    outcome = command("regenerate", "--config", write_config(tree))
    assert outcome.code == 2 and "holds other continuations" in outcome.errors[0], outcome
    assert listing(folder) == before


def numbered(count):
    return [Prompt(f"p{i}", [i]) for i in range(count)]


class Letters:
    """Turns a token into a letter."""

    @staticmethod
    def decode(ids, **_):
        return "".join(chr(97 + number) for number in ids)


def test_a_file_is_called_otherwise_until_it_is_whole(tmp_path):
    out, prompts, asked = tmp_path / "deep" / "made.jsonl", numbered(5), []

    def complete(batch):
        asked.append([number for (number,) in batch])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return [[number, number] for (number,) in batch]

    with pytest.raises(KeyboardInterrupt):
        write_continuations(out, prompts, Letters, complete, 2)
    assert list(listing(out.parent)) == ["made.jsonl.part"] and count_written(out, prompts) == 2
    assert count_written(out, numbered(5)[::-1]) == 0  # of other prompts
    write_continuations(out, prompts, Letters, complete, 2)
    assert asked == [[0, 1], [2, 3], [2, 3], [4]] and list(listing(out.parent)) == ["made.jsonl"]
    assert read_lines(out) == [{"prompt": f"p{i}", "completion": letter * 2} for i, letter in enumerate("abcde")]
    write_continuations(out, prompts, Letters, complete, 2)
    assert len(asked) == 4
    for others in (prompts[:4], numbered(6), prompts[::-1]):
        with pytest.raises(UserError, match="holds other continuations"):
            count_written(out, others)


@pytest.mark.slow
def test_training_reads_them_and_evaluates_on_held_out_documents(command, write_config, tree):
    assert command("regenerate", "--config", write_config(tree)).code == 0
    train(validate(tree, "tree"))
    *_, last = read_lines(f"{tree['output_dir']}/metrics.jsonl")
    assert last["step"] == 12 and 1 <= last["held_out_tokens_per_step"]["2"] <= 3


def test_only_the_continuation_is_supervised_and_nothing_is_added(tmp_path, small_tokenizer):
    file = tmp_path / "made.jsonl"
    file.write_text(json.dumps({"prompt": "the cat", "completion": " sat on the mat"}) + "\n")
    (document,) = read_continuations(Continuations(path=str(file)))
    tokens, supervised, _ = Encoder(small_tokenizer)(document)
    ids = small_tokenizer("the cat sat on the mat")["input_ids"]
    assert tokens.tolist() == ids
    inside = len(small_tokenizer("the cat")["input_ids"])
    assert supervised.tolist() == [False] * inside + [True] * (len(ids) - inside)


def test_documents_take_turns(small_tokenizer):
    completions = [Completion(f"{word} sat", " on the mat") for word in "abcdefgh"]
    for count in (8, 16):
        chosen = [prompt.text for prompt in prompts_of(completions, small_tokenizer, count)]
        assert sorted(chosen) == sorted([f"{word} sat" for word in "abcdefgh"] * (count // 8))


def test_conversations_end_where_the_assistant_speaks(small_tokenizer, monkeypatch):
    monkeypatch.setattr(small_tokenizer, "chat_template", CHAT)
    turns = [("user", "the dog"), ("assistant", "the mat"), ("user", "sat"), ("assistant", "on")]
    chat = Conversation([{"role": role, "content": content} for role, content in turns])
    chosen = {prompt.text for prompt in prompts_of([chat], small_tokenizer, 20)}
    first = "user:\nthe dog\nassistant:\n"
    assert chosen == {first, f"{first}the mat\nuser:\nsat\nassistant:\n"}


def test_prompts_too_short_or_too_long_are_skipped(small_tokenizer):
    contents = [Text("cat"), Text("the cat sat on the mat"), Completion("the " * 200, "mat")]
    prompts = prompts_of(contents, small_tokenizer, 4, prompt_tokens=3)
    assert len(prompts) == 4 and all(prompt.text in contents[1].text for prompt in prompts)
    with pytest.raises(UserError, match="prompt_tokens=30 tokens"):
        prompts_of(contents[::2], small_tokenizer, 1, prompt_tokens=30)


def test_prompts_are_taken_from_a_stream_in_order(jsonl, small_tokenizer):
    texts = [f"the cat {i} sat on the mat" * (1 + i % 5) for i in range(60)]
    stream = source_documents(jsonl([{"text": text} for text in texts], streaming=True))
    wanted = Continuations(path="unused", count=3, prompt_tokens=4)
    prompts = list(choose_prompts([stream], [1.0], small_tokenizer, wanted, 64, 0))
    assert all(prompt.text in text for prompt, text in zip(prompts, texts, strict=False)) and len(prompts) == 3


def test_sources_are_drawn_by_weight(small_tokenizer):
    sources = [[Given(f"{i}", Completion(word, " mat"))] for i, word in enumerate(("cat", "dog"))]
    wanted = Continuations(path="unused", count=400)
    chosen = [prompt.text for prompt in choose_prompts(sources, [3.0, 1.0], small_tokenizer, wanted, 64, 0)]
    assert abs(np.mean([text == "cat" for text in chosen]) - 0.75) < 0.1


def test_what_is_missing_is_reported(command, write_config, tree, tmp_path):
    outcome = command("train", "--config", write_config(tree))
    assert outcome.code == 2 and "no such file" in outcome.errors[0] and "mtp_jax.regenerate" in outcome.errors[0]
    file = tmp_path / "other.jsonl"
    file.write_text('{"text": "the cat"}\n')
    tree["data"]["continuations"]["path"] = str(file)
    outcome = command("train", "--config", write_config(tree))
    assert outcome.code == 2 and "its columns are text" in outcome.errors[0]
    del tree["data"]["continuations"]
    outcome = command("regenerate", "--config", write_config(tree))
    assert outcome.code == 2 and "no section data.continuations" in outcome.errors[0]


def test_only_adapters_are_trained_on_them(tree, make_tree, tmp_path):
    plain = make_tree(tmp_path / "plain")
    plain["data"]["continuations"] = tree["data"]["continuations"]
    with pytest.raises(UserError, match=r"data\.continuations belongs to objective: multi_token"):
        validate(plain, "tree")


def test_a_source_is_still_checked(tree):
    tree["data"]["sources"].append({"kind": "text", "path": "nowhere"})
    with pytest.raises(UserError) as caught:
        read_sources(Data(**tree["data"]))
    assert len(caught.value.faults) == 2  # the source, and the file that is not there yet
