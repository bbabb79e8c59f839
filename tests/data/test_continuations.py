"""Continuations by the base model: where prompts come from, what is written, how training reads it."""

import json
import random

import numpy as np
import pytest
from conftest import listing, read_lines
from kinds import CORPUS, KINDS, texts

from mtp_jax.api import load
from mtp_jax.config import Continuations, Data
from mtp_jax.config_file import validate
from mtp_jax.data import continuations
from mtp_jax.data.continuations import (
    Prompt,
    by_length,
    check_continuations,
    choose_prompts,
    count_written,
    read_continuations,
    sampling_of,
    write_continuations,
)
from mtp_jax.data.documents import Completion, Conversation, Document, Text
from mtp_jax.data.sources import read_sources, source_documents
from mtp_jax.data.tokens import Encoder
from mtp_jax.decoding.options import Sampling
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
        (alone,) = generator.complete([line["prompt_ids"]], 9, 1)
        assert line["completion_ids"] == alone.token_ids and line["completion"]
        whole = generator.tokenizer.decode(line["prompt_ids"] + line["completion_ids"])
        assert whole.endswith(line["prompt"] + line["completion"])
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


def test_prompts_of_a_window_stand_in_order_of_length(monkeypatch):
    monkeypatch.setattr(continuations, "_WINDOW", 4)
    prompts = [Prompt(str(i), [0] * length) for i, length in enumerate((5, 3, 5, 1, 9, 2))]
    assert [prompt.text for prompt in by_length(prompts)] == ["3", "1", "0", "2", "5", "4"]
    # More of them leave the windows before as they were, so that a file can grow.
    assert by_length([*prompts, Prompt("6", [0])])[:4] == by_length(prompts)[:4]


def test_another_files_continuations_are_not_overwritten(command, write_config, tree, tmp_path):
    config, folder = write_config(tree), tmp_path / "made"
    assert command("regenerate", "--config", config).code == 0
    before = listing(folder)
    tree["data"]["continuations"]["prompt_tokens"] = 6
    outcome = command("regenerate", "--config", write_config(tree))
    assert outcome.code == 2 and "holds other continuations" in outcome.errors[0], outcome
    assert listing(folder) == before


SAMPLING = {"temperature": 0.9, "top_k": 40, "top_p": 0.95}


def test_sampled_text_follows_from_the_seed_and_the_number_of_a_prompt(command, write_config, tree, tmp_path):
    tree["data"]["continuations"] |= SAMPLING
    config, folder = write_config(tree), tmp_path / "made"
    assert command("regenerate", "--config", config, "--batch-size", 3).code == 0
    ((name, whole),) = listing(folder).items()
    lines = read_lines(folder / name)
    assert all(line["sampling"] == {**SAMPLING, "seed": 0} for line in lines)
    generator = load(tree["model"]["path"])
    for number, line in enumerate(lines):
        sampling = Sampling(**SAMPLING, seed=0)
        (alone,) = generator.complete([line["prompt_ids"]], 9, 1, sampling, number)
        assert line["completion_ids"] == alone.token_ids
    greedy = generator.complete([line["prompt_ids"] for line in lines], 9, 7)
    assert all(line["completion_ids"] != done.token_ids for line, done in zip(lines, greedy, strict=True))
    # Cut off behind two lines, within a third.
    second = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    (folder / name).unlink()
    (folder / f"{name}.part").write_bytes(whole[: second + 11])
    outcome = command("regenerate", "--config", config, "--batch-size", 3)
    assert "2 of 7" in outcome.err, outcome
    assert listing(folder) == {name: whole}


def test_a_file_sampled_otherwise_is_refused(command, write_config, tree, tmp_path):
    def regenerate(seed=0, **changes):
        changed = {**tree, "seed": seed, "data": {**tree["data"]}}
        changed["data"]["continuations"] = {**tree["data"]["continuations"], **changes}
        return command("regenerate", "--config", write_config(changed))

    (tmp_path / "made").mkdir()
    for made, others in [
        ({}, [SAMPLING]),
        (SAMPLING, [{}, SAMPLING | {"top_p": 1.0}, SAMPLING | {"top_k": None}, SAMPLING | {"temperature": 1.0}]),
    ]:
        for path in (tmp_path / "made").iterdir():
            path.unlink()
        assert regenerate(**made).code == 0
        before = listing(tmp_path / "made")
        assert "already there" in regenerate(**made).out
        for other in others:
            outcome = regenerate(**other)
            assert outcome.code == 2 and "holds other continuations" in outcome.errors[0], outcome
        assert "holds other continuations" in regenerate(seed=1, **made).errors[0]
        assert listing(tmp_path / "made") == before


@pytest.mark.parametrize(
    ("made", "asked", "says"),
    [
        ({}, {"temperature": 0.9}, "are greedy, and this config asks for sampled (temperature=0.9, top_p=1.0) ones"),
        (SAMPLING, {}, "are sampled (temperature=0.9, top_k=40, top_p=0.95), and this config asks for greedy ones"),
        (SAMPLING, SAMPLING | {"top_k": None}, "top_k=40"),
    ],
)
def test_training_refuses_a_file_sampled_otherwise(tmp_path, made, asked, says):
    file = tmp_path / "made.jsonl"
    wanted = Continuations(path=str(file), **made)
    write_continuations(file, numbered(2), Letters, lambda batch, _: [[1]] * len(batch), 2, sampling_of(wanted, 7))
    assert len(read_continuations(wanted)) == 2
    with pytest.raises(UserError) as refused:
        read_continuations(Continuations(path=str(file), **asked))
    assert says in str(refused.value)


def numbered(count):
    return [Prompt(f"p{i}", [i]) for i in range(count)]


class Letters:
    """Turns a token into a letter."""

    @staticmethod
    def decode(ids, **_):
        return "".join(chr(97 + number) for number in ids)


def test_a_file_is_called_otherwise_until_it_is_whole(tmp_path):
    out, prompts, asked = tmp_path / "deep" / "made.jsonl", numbered(5), []

    def complete(batch, at):
        assert batch[0] == [at]
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
    assert read_lines(out) == [
        {"prompt": f"p{i}", "completion": letter * 2, "prompt_ids": [i], "completion_ids": [i, i]}
        for i, letter in enumerate("abcde")
    ]
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


# ---- what is trained on is what was written


@pytest.fixture
def made(tmp_path):
    """A function that writes lines to a file and reads them as training does."""

    def write(lines):
        file = tmp_path / "made.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return read_continuations(Continuations(path=str(file)))

    return write


@pytest.mark.parametrize("kind", KINDS)
def test_trained_ids_are_the_written_ids(tmp_path, kind):
    tokenizer, draw = KINDS[kind](), random.Random(0)
    documents = [Text(text) for text in texts(50)]
    documents += [Completion(text, " and more") for text in texts(50, seed=1)]
    prompts = prompts_of(documents, tokenizer, 100, prompt_tokens=3)
    written = []

    def complete(batch, _):
        written.extend(draw.choices(range(3, len(tokenizer)), k=draw.randint(1, 20)) for _ in batch)
        return written[-len(batch) :]

    file = tmp_path / "made.jsonl"
    write_continuations(file, prompts, tokenizer, complete, 8)
    read = read_continuations(Continuations(path=str(file)))
    check_continuations(read, tokenizer)
    encoded = [Encoder(tokenizer)(document) for document in read]
    assert [found.tokens.tolist() for found in encoded] == [
        p.tokens + new for p, new in zip(prompts, written, strict=True)
    ]
    assert [found.supervised.sum() for found in encoded] == [len(new) for new in written]
    for document, prompt, new in zip(read, prompts, written, strict=True):
        before, whole = (tokenizer.decode(ids) for ids in (prompt.tokens, prompt.tokens + new))
        if whole.startswith(before) and not tokenizer.clean_up_tokenization_spaces:
            assert whole.endswith(document.text()) and document.text() == prompt.text + whole[len(before) :]


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_begin_as_texts_do_and_hold_the_documents_tokens(kind):
    tokenizer = KINDS[kind]()
    text = "the cat sat on the mat, and the dog's bed isn't there"
    ids = tokenizer(text)["input_ids"]
    for prompt in prompts_of([Text(text)], tokenizer, 8, prompt_tokens=5):
        assert prompt.tokens[0] == tokenizer.bos_token_id and len(prompt.tokens) in (5, 6)
        inside = prompt.tokens[-5:]
        assert any(ids[i : i + 5] == inside for i in range(len(ids)))
        assert "<s>" not in prompt.text


def test_files_of_older_versions_are_read_as_text(made, small_tokenizer, capsys):
    (document,) = read = made([{"prompt": "the cat", "completion": " sat on the mat"}])
    tokens, supervised, _ = Encoder(small_tokenizer)(document)
    ids = small_tokenizer("the cat sat on the mat")["input_ids"]
    assert tokens.tolist() == ids
    inside = len(small_tokenizer("the cat")["input_ids"])
    assert supervised.tolist() == [False] * inside + [True] * (len(ids) - inside)
    check_continuations(read, small_tokenizer)
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "unigram"])
def test_text_that_may_have_other_tokens_is_counted(made, kind, capsys):
    tokenizer = KINDS[kind]()
    lines, wrong = [], 0
    for text in CORPUS * 2:
        ids = tokenizer(text)["input_ids"]
        at = len(ids) // 2
        lines.append({"prompt": text[: len(text) // 2], "completion": tokenizer.decode(ids[at:])})
        prompt = tokenizer(lines[-1]["prompt"])["input_ids"]
        read = tokenizer(lines[-1]["prompt"] + lines[-1]["completion"])["input_ids"]
        wrong += read != prompt + ids[at:]
    check_continuations(made(lines), tokenizer)
    line = capsys.readouterr().err.partition("warning: ")[2]
    counted = int(line.split()[1]) if line else 0  # data.continuations: N of ...
    assert counted >= wrong and ("older version" in line) == bool(counted)
    assert counted or kind == "byte_level"


def test_a_file_of_another_tokenizer_is_refused(made):
    mine, other = KINDS["byte_level"](), KINDS["word_pieces"]()
    ids = mine("the cat sat on the mat")["input_ids"]
    line = {"prompt": "the cat", "completion": " sat on the mat", "prompt_ids": ids[:3], "completion_ids": ids[3:]}
    line["completion"] = mine.decode(ids)[len(mine.decode(ids[:3])) :]
    check_continuations(made([line]), mine)
    with pytest.raises(UserError, match=r"continuations#0: .* another tokenizer"):
        check_continuations(made([line]), other)


def test_an_older_versions_file_stays_and_its_half_begins_anew(tmp_path):
    out, prompts = tmp_path / "made.jsonl", numbered(2)
    old = "".join(json.dumps({"prompt": prompt.text, "completion": "x"}) + "\n" for prompt in prompts)
    part = tmp_path / "made.jsonl.part"
    part.write_text(old[: len(old) // 2])
    assert count_written(out, prompts) == 0
    out.write_text(old)
    assert count_written(out, prompts) == 2
    write_continuations(out, prompts, Letters, list, 2)
    assert out.read_text() == old


# ---- where prompts come from


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
