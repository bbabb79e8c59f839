"""Streams: rows in order, the same batches for any division of rows, held-out rows passed over, and faults."""

import itertools

import numpy as np
import pytest
from mtp_jax.data.pipeline import Anchors, merge_states, training_batches
from mtp_jax.data.streams import Stream
from mtp_jax.data.supervision import check_supervision

from mtp_jax.config import Data, Source
from mtp_jax.data.continuations import choose_prompts
from mtp_jax.data.sources import documents, read_sources
from mtp_jax.errors import UserError


@pytest.fixture
def streamed(jsonl):
    """A function from texts to a streaming source of them."""
    return lambda texts, **keys: jsonl([{"text": text, "id": 1} for text in texts], streaming=True, **keys)


TEXTS = [f"the cat {i} sat on the mat" * (1 + i % 5) for i in range(60)]


def test_held_out_rows_are_passed_over(streamed):
    source = streamed(TEXTS)
    every = {row.name: row.text() for row in documents(source)}
    (training,), held = read_sources(Data(sources=[source], held_out=0.3))
    train = {row.name: row.text() for row in training}
    assert {**train, **{row.name: row.text() for row in held}} == every and len(every) == 60
    assert all(row.draw < 0.3 for row in held) and held and not {row.name for row in held} & train.keys()
    assert read_sources(Data(sources=[source], held_out=0.0))[1] == []


def test_held_out_rows_are_those_that_a_stored_dataset_holds_out(streamed):
    source = streamed(TEXTS)
    _, held = read_sources(Data(sources=[source], held_out=0.3))
    stored = source.model_copy(update={"streaming": False})
    assert {row.name for row in read_sources(Data(sources=[stored], held_out=0.3))[1]} == {row.name for row in held}


def test_every_row_once_per_epoch_in_another_order(streamed):
    stream = documents(streamed(TEXTS))
    drawn = list(itertools.islice(stream.endless(0), 180))
    epochs = [[row.number for epoch, row in drawn if epoch == number] for number in range(3)]
    assert all(sorted(epoch) == list(range(60)) for epoch in epochs)
    assert epochs[0] != epochs[1] != list(range(60)) != epochs[0]


def test_a_stream_longer_than_the_buffer_gives_every_row_once(monkeypatch, streamed):
    monkeypatch.setattr("mtp_jax.data.streams._SHUFFLED", 10)
    drawn = [row.number for _, row in itertools.islice(documents(streamed(TEXTS)).endless(0), 60)]
    assert sorted(drawn) == list(range(60)) and drawn != list(range(60))


def opened(sources, tokenizer, rows=None):
    return training_batches(sources, [2.0, 1.0][: len(sources)], tokenizer, 4, 32, 0, Anchors(3, 0), rows=rows)[0]


@pytest.mark.parametrize("mixed", [False, True])
def test_batches_do_not_depend_on_the_division_of_rows_nor_on_a_restart(streamed, small_tokenizer, corpus, mixed):
    sources = [documents(streamed(TEXTS))]
    if mixed:
        sources.append(documents(Source(kind="text", path=str(corpus))))
    expected = list(itertools.islice(opened(sources, small_tokenizer), 14))
    parts = [opened(sources, small_tokenizer, rows) for rows in (range(1), range(1, 4))]
    for batch in expected[:9]:
        own = [next(part) for part in parts]
        assert all(np.array_equal(np.concatenate([p[key] for p in own]), batch[key]) for key in batch)
    state = merge_states([part.get_state() for part in parts])
    fresh = opened(sources, small_tokenizer, range(2, 4))
    fresh.set_state(state)
    for batch, own in zip(expected[9:], fresh, strict=False):
        assert all(np.array_equal(own[key], batch[key][2:4]) for key in batch)


def test_documents_of_a_batch_have_names(streamed, small_tokenizer):
    stream = documents(streamed(TEXTS))
    batches, names = training_batches([stream], [1.0], small_tokenizer, 2, 64, 0)
    batch = next(batches)
    text = {row.name: row.text() for row in stream}
    row = {key: value[0] for key, value in batch.items()}
    first = small_tokenizer.decode(row["tokens"][row["segments"] == 1], skip_special_tokens=True)
    assert text[names[row["documents"][0]].name].startswith(first) and first


def test_a_stream_is_looked_at_before_a_run_starts(streamed, small_tokenizer):
    (training,), _ = read_sources(Data(sources=[streamed(TEXTS)], held_out=0.2))
    assert check_supervision([training], small_tokenizer) == ["data.sources.0: streamed texts, supervised throughout"]


def test_prompts_are_taken_from_a_stream_in_order(streamed, small_tokenizer):
    from mtp_jax.config import Continuations

    stream = documents(streamed(TEXTS))
    wanted = Continuations(path="unused", count=3, prompt_tokens=4)
    prompts = list(choose_prompts([stream], [1.0], small_tokenizer, wanted, 64, 0))
    assert all(prompt.text in text for prompt, text in zip(prompts, TEXTS, strict=False)) and len(prompts) == 3


# ---- what is wrong


def test_a_stream_that_breaks_says_where():
    def rows():
        yield {"text": "a"}
        raise OSError("connection reset\nand more")

    with pytest.raises(UserError, match=r"^org/data: cannot be read behind row 1 \(connection reset\)\.$"):
        list(Stream(rows, "org/data", lambda row, _: row["text"]))


@pytest.mark.parametrize(
    ("texts", "columns", "says"),
    [
        ([], {}, "cannot be loaded"),
        (["a"], {"messages": "turns"}, "data.sources.0.columns: "),
        ([5], {}, "rows.jsonl#0: column 'text' should hold text, not int"),
    ],
)
def test_faults_are_one_line(streamed, small_tokenizer, texts, columns, says):
    with pytest.raises(UserError) as caught:
        training, _ = read_sources(Data(sources=[streamed(texts, columns=columns)], held_out=0.0))
        check_supervision(training, small_tokenizer)
    (fault,) = caught.value.faults
    assert fault.startswith("data.sources.0") and says in fault
