"""Records that cannot be trained on: refused at the start, or skipped, counted, and refused beyond a limit."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from chats import NEEDS_FIRST, PLAIN, letters, turns, with_template

from mtp_jax.config import Data
from mtp_jax.config_file import validate
from mtp_jax.data.batches import training_batches
from mtp_jax.data.held_out import held_out_batches, held_out_prompts
from mtp_jax.data.sources import check_supervision, read_sources, texts_of
from mtp_jax.decoding.generator import Generator
from mtp_jax.errors import UserError
from mtp_jax.runs.claim import claim
from mtp_jax.runs.folder import RunFolder

pytestmark = pytest.mark.quick

ALTERNATES = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles should alternate.') }}{% endif %}{% endfor %}" + PLAIN
)
GOOD = [{"messages": turns("hi", f"answer {i}", "so?", "yes")} for i in range(120)]
BAD = {
    "null": ({"messages": None}, "column 'messages' should hold a list of messages"),
    "empty": ({"messages": []}, "column 'messages' holds no message"),
    "null content": ({"messages": [{"role": "user", "content": None}]}, "the chat template refuses the conversation ("),
    "two users": ({"messages": turns("a") * 2}, "the chat template refuses the conversation (Roles should alternate)."),
    "surrogate": ({"messages": turns("\ud83d", "b")}, r"holds '\ud83d' (half a surrogate pair)"),
    "other form": ({"text": "a"}, "column 'messages' should hold a list of messages"),
}


def opened(source, tokenizer, held_out=0.0, **keys):
    """Training and held-out documents of a source, and the lines of the check at the start."""
    training, held = read_sources(Data(sources=[source], held_out=held_out, **keys))
    return training, held, check_supervision(training, tokenizer, held_out=held)


@pytest.fixture
def tokenizer():
    return with_template(letters(), ALTERNATES)


@pytest.mark.parametrize("kind", BAD)
def test_one_among_many_is_named_at_the_start_and_may_be_skipped(jsonl, tokenizer, kind):
    (record, says), place = BAD[kind], 97
    source = jsonl([*GOOD[:place], record, *GOOD[place:]])
    with pytest.raises(UserError) as caught:
        opened(source, tokenizer)
    (fault,) = caught.value.faults
    assert fault.startswith(f"data.sources.0: rows.jsonl#{place}: {says}")
    assert fault.endswith(" Set data.bad_records: skip to leave such records out. Bad among the 121 checked: 1.")
    training, _, (line,) = opened(source, tokenizer, bad_records="skip")
    assert f"; 1 of 121 checked are bad and are skipped (up to 100), the first: rows.jsonl#{place}: {says}" in line
    batches, names = training_batches(training, [1.0], tokenizer, 2, 64, 0)
    seen = set()
    while len(seen) < 120:
        batch = next(batches)
        seen |= {names[number].name for number in np.unique(batch["documents"][batch["segments"] > 0])}
    assert seen == {f"rows.jsonl#{i}" for i in range(121)} - {f"rows.jsonl#{place}"}
    assert f"; 1 bad records skipped, such as rows.jsonl#{place}: {says}" in batches.summary()
    batches.close()


@pytest.mark.parametrize("streaming", [False, True])
def test_more_than_the_limit_are_refused(jsonl, tokenizer, streaming):
    rows = [record for i in range(40) for record in (GOOD[i], BAD["two users"][0])]
    source = jsonl(rows, streaming=streaming)
    opened(source, tokenizer, bad_records="skip", bad_records_limit=40)
    with pytest.raises(UserError) as caught:
        opened(source, tokenizer, bad_records="skip", bad_records_limit=39)
    assert str(caught.value).endswith(
        "It is one more bad record than data.bad_records_limit=39 allows. Bad among the 80 checked: 40."
    )


@pytest.mark.parametrize("limit", [None, 1, 2, 3])
@pytest.mark.parametrize("streaming", [False, True])
def test_those_met_later_count_once_and_end_the_run(jsonl, tokenizer, monkeypatch, limit, streaming):
    for name in ("_SAMPLE", "_STREAMED"):
        monkeypatch.setattr(f"mtp_jax.data.sources.{name}", 1)
    bad = [BAD["null"][0], BAD["two users"][0], BAD["surrogate"][0]]
    source = jsonl([GOOD[0], *bad, *GOOD[1:6]], streaming=streaming)
    skip = {} if limit is None else {"bad_records": "skip", "bad_records_limit": limit}
    training, _, _ = opened(source, tokenizer, **skip)
    batches, _ = training_batches(training, [1.0], tokenizer, 1, 64, 0)
    if limit == 3:
        for _ in range(20):  # epochs
            next(batches)
        assert "; 3 bad records skipped, such as rows.jsonl#" in batches.summary()
    else:
        with pytest.raises(UserError, match=r"^rows\.jsonl#[123]: ") as caught:
            for _ in range(20):
                next(batches)
        (fault,) = caught.value.faults
        end = "Set data.bad_records: skip to leave such records out."
        assert fault.endswith(
            end if limit is None else f"It is one more bad record than data.{limit_of(limit)} allows."
        )
    batches.close()


def limit_of(limit):
    return f"bad_records_limit={limit}"


def test_held_out_records_are_checked_too(jsonl, tokenizer):
    rows = [BAD["two users"][0] if i % 20 == 7 else GOOD[i] for i in range(120)]
    source = jsonl(rows)
    (training,), held = read_sources(Data(sources=[source], held_out=0.5))
    bad = {f"rows.jsonl#{i}" for i in range(120) if i % 20 == 7} & {document.name for document in held}
    assert bad and bad != {document.name for document in held}
    with pytest.raises(UserError, match=r"^held-out documents: rows\.jsonl#\d+: the chat template refuses"):
        check_supervision([[document for document in training if document.number % 20 != 7]], tokenizer, held_out=held)
    _, held, lines = opened(source, tokenizer, held_out=0.5, bad_records="skip")
    assert lines[-1].startswith(
        f"held-out documents: {len(bad)} of {len(held)} checked are bad and are skipped (up to 100)"
    )
    seen = set()
    for batch in held_out_batches(held, tokenizer, 4, 64):
        seen |= set(np.unique(batch["documents"][batch["segments"] > 0]).tolist())
    ordered = sorted(document.name for document in held)
    assert {ordered[number] for number in seen} == set(ordered) - bad
    assert len(held_out_prompts(held, tokenizer, 1000, 8)) == len(held) - len(bad)


def test_a_source_of_nothing_but_bad_records_is_refused(jsonl, tokenizer):
    with pytest.raises(
        UserError, match=r"none of the 5 records checked \(rows\.jsonl#0, \.\.\.\) has a supervised token"
    ):
        opened(jsonl([BAD["two users"][0]] * 5), tokenizer, bad_records="skip")


def test_bad_texts_are_skipped_where_a_tokenizer_is_trained(jsonl, tmp_path):
    source = jsonl([{"text": "a"}, {"text": None}, {"text": "\ud83d"}, {"text": "b"}])
    training, _ = read_sources(Data(sources=[source], held_out=0.0, bad_records="skip"))
    assert list(texts_of(training)) == ["a", "b"]
    training, _ = read_sources(Data(sources=[source], held_out=0.0))
    with pytest.raises(UserError, match=r"^rows\.jsonl#1: column 'text' should hold text, not NoneType"):
        list(texts_of(training))


def test_files_of_text_are_skipped_too(tmp_path, small_tokenizer):
    for i in range(6):
        (tmp_path / f"{i}.txt").write_bytes(b"caf\xe9" if i == 3 else b"the cat sat")
    source = {"kind": "text", "path": str(tmp_path)}
    training, _, (line,) = opened(source, small_tokenizer, bad_records="skip", bad_records_limit=1)
    assert line.startswith("data.sources.0: 1 of 6 checked are bad and are skipped (up to 1), the first: ")
    batches, names = training_batches(training, [1.0], small_tokenizer, 1, 64, 0)
    batch = next(batches)
    assert {names[number].name for number in np.unique(batch["documents"])} == {f"{i}.txt" for i in range(6)} - {
        "3.txt"
    }
    batches.close()


def test_a_run_may_continue_with_bad_records_skipped(tree):
    def take(**keys):
        config = validate({**tree, "data": {**tree["data"], **keys}}, "tree")
        with claim(RunFolder(config.output_dir), config):
            pass

    take()
    take(bad_records="skip")
    take(bad_records="skip", bad_records_limit=5)
    with pytest.raises(UserError, match=r"holds a run with other values of data\.too_long;"):
        take(bad_records="skip", too_long="cut")


# ---- prompts


@pytest.mark.parametrize(
    ("template", "messages", "says"),
    [
        (
            ALTERNATES,
            [{"role": "system", "content": "a"}],
            "prompt 3: the chat template refuses the conversation (Roles",
        ),
        (NEEDS_FIRST, [], "prompt 3: the chat template refuses the conversation ("),
        ("{{ messages[0].content[7:][0] + 1 }}", turns("a"), "prompt 3: the chat template refuses the conversation ("),
        ("{{ 1 / 0 }}", turns("a"), "prompt 3: the chat template refuses the conversation (division by zero)."),
    ],
)
def test_messages_that_a_template_refuses_are_one_fault(template, messages, says):
    generator = SimpleNamespace(tokenizer=with_template(letters(), template), g=SimpleNamespace(max_positions=99))
    with pytest.raises(UserError) as caught:
        Generator.encode(generator, messages, "prompt 3")
    (fault,) = caught.value.faults
    assert fault.startswith(says) and json.dumps(fault).count("\\n") == 0


def test_messages_are_encoded_as_transformers_does():
    tokenizer = with_template(letters(), "{{ bos_token }}" + PLAIN)
    generator = SimpleNamespace(tokenizer=tokenizer, g=SimpleNamespace(max_positions=99))
    expected = tokenizer.apply_chat_template(turns("a", "b", "c"), add_generation_prompt=True)["input_ids"]
    assert Generator.encode(generator, turns("a", "b", "c")) == expected
    assert Generator.encode(generator, "<|endoftext|>a") == tokenizer("a")["input_ids"]
