"""Batches: labels inside documents, lanes that stand alone, and an iterator that resumes exactly."""

import itertools
import json
import random
import time
from itertools import islice

import numpy as np
import pytest
from mtp_jax.data.pipeline import Anchors, held_out_batches, merge_states, training_batches

from mtp_jax.data.sources import Document
from mtp_jax.errors import UserError


class Codes:
    """A tokenizer of character codes, with or without tokens at both ends."""

    def __init__(self, begin=None, end=None):
        self.begin, self.eos_token_id = begin, end

    def __call__(self, text, verbose):
        return {"input_ids": ([] if self.begin is None else [self.begin]) + [ord(c) for c in text]}


PLAIN, ENDS = Codes(), Codes(begin=1, end=2)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """40 documents of unlike lengths, each of letters of its own."""
    folder, rng = tmp_path_factory.mktemp("documents"), random.Random(1)
    made = []
    for i in range(40):
        path = folder / f"{i:02}.txt"
        path.write_text(chr(0x100 + i) * rng.randint(1, 60), encoding="utf-8")
        made.append(Document(path.name, path))
    return made


def ids(document, tokenizer):
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return tokenizer(document.text(), verbose=False)["input_ids"] + end


def batches_of(sources, tokenizer=PLAIN, weights=None, size=4, length=16, seed=0):
    return training_batches(sources, weights or [1.0] * len(sources), tokenizer, size, length, seed)[0]


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


# ---- rows


@pytest.mark.parametrize("tokenizer", [PLAIN, ENDS], ids=["plain", "with ends"])
@pytest.mark.parametrize("length", [16, 64])
def test_segments_are_whole_documents_or_whole_pieces_of_long_ones(found, tokenizer, length):
    for batch in islice(batches_of([found], tokenizer, length=length), 20):
        for row in range(4):
            check_row({key: value[row] for key, value in batch.items()}, found, tokenizer, length)


def check_row(row, found, tokenizer, length):
    """Compare one row with what its documents' own tokens say."""
    segments = row["segments"]
    count = segments.max()
    assert sorted(set(segments.tolist()) - {0}) == list(range(1, count + 1))
    assert (np.diff(np.where(segments == 0, count + 1, segments)) >= 0).all()  # padding stands last
    assert not row["supervised"][segments == 0].any()
    for number in range(1, count + 1):
        part = {key: value[segments == number] for key, value in row.items()}
        own = ids(found[part["documents"][0]], tokenizer)
        pieces = range(0, len(own), length) if len(own) > length + 1 else [0]
        starts = [i for i in pieces if own[i : i + length] == part["tokens"].tolist()]
        assert starts and (part["documents"] == part["documents"][0]).all()
        n = len(part["tokens"])
        assert part["positions"].tolist() == list(range(n))
        assert part["labels"][part["supervised"]].tolist() in [own[i + 1 : i + 1 + n] for i in starts]
        assert part["supervised"][:-1].all()


def test_a_label_is_never_of_another_document(found):
    seen = 0
    for batch in islice(batches_of([found]), 40):
        right = batch["supervised"]
        seen += right.sum()
        assert (batch["tokens"] == batch["labels"])[right].all()  # each document repeats one letter of its own
    assert seen > 1000


def test_the_seed_decides_the_order(found):
    first, again, other = (next(batches_of([found], seed=seed)) for seed in (3, 3, 4))
    assert same(first, again) and not same(first, other)


def test_a_source_smaller_than_a_batch_is_repeated(found):
    tiny = [min(found, key=lambda d: d.path.stat().st_size)]
    batch = next(batches_of([tiny], ENDS, size=8, length=32))
    assert batch["tokens"].shape == (8, 32) and batch["segments"][:, 0].min() == 1


def test_anchors_of_a_document_do_not_depend_on_what_it_is_packed_with(found):
    chosen = {}
    for sources, length in [([found], 64), ([found[:20]], 64), ([found[::-1]], 80)]:
        batches, documents = training_batches(sources, [1.0], PLAIN, 2, length, 0, Anchors(length, 5))
        for batch in islice(batches, 3):
            for row in range(2):
                for segment in range(1, batch["segments"][row].max() + 1):
                    inside = batch["segments"][row] == segment
                    name = documents[batch["documents"][row][inside][0]].name
                    start = np.flatnonzero(inside)[0]
                    anchors = batch["anchors"][row]
                    rows = (anchors[(anchors >= 0) & inside[anchors]] - start).tolist()
                    assert chosen.setdefault(name, rows) == rows
    assert len(chosen) > 20


# ---- lanes


@pytest.mark.parametrize("sources", [1, 2])
@pytest.mark.parametrize("division", [[4], [1, 3], [2, 2], [1, 1, 1, 1]])
def test_a_process_makes_its_rows_alone(found, sources, division):
    parts = [found] if sources == 1 else [found[:25], found[25:]]
    whole = list(islice(batches_of(parts), 12))
    ends = list(itertools.accumulate(division, initial=0))
    for start, end in itertools.pairwise(ends):
        mine, _ = training_batches(parts, [1.0] * sources, PLAIN, 4, 16, 0, rows=range(start, end))
        for batch, own in zip(whole, mine, strict=False):
            assert same(own, {key: value[start:end] for key, value in batch.items()})


@pytest.mark.parametrize("at", [0, 7])
def test_a_run_goes_on_where_it_was_however_rows_are_divided(found, at):
    parts = [found[:25], found[25:]]

    def opened(rows):
        return training_batches(parts, [2.0, 1.0], PLAIN, 4, 16, 0, Anchors(3, 0), rows=rows)[0]

    before = [opened(range(3)), opened(range(3, 4))]
    for batches in before:
        for _ in range(at):
            next(batches)
    state = json.loads(json.dumps(merge_states([batches.get_state() for batches in before])))
    assert list(state["lanes"]) == ["0", "1", "2", "3"]
    whole = opened(None)
    expected = list(islice(whole, at + 15))[at:]
    for rows in (range(4), range(1), range(1, 4)):
        fresh = opened(rows)
        next(fresh)
        fresh.set_state(state)
        for a, b in zip(expected, fresh, strict=False):
            assert same({key: value[rows.start : rows.stop] for key, value in a.items()}, b)
    assert not same(expected[0], expected[1])


def test_the_state_is_that_of_the_last_batch_taken_and_not_of_those_made_ahead(found):
    batches = batches_of([found])
    for _ in range(3):
        next(batches)
    before = batches.get_state()
    time.sleep(0.2)  # while others are made
    assert batches.get_state() == before
    next(batches)
    assert batches.get_state() != before


@pytest.mark.parametrize("change", [lambda lanes: lanes.pop("3"), lambda lanes: lanes.update({"4": lanes["3"]})])
def test_a_state_of_another_batch_is_refused(found, change):
    state = batches_of([found]).get_state()
    change(state["lanes"])
    with pytest.raises(UserError, match="does not fit a batch of 4 sequences"):
        batches_of([found]).set_state(state)


def test_an_error_of_a_document_reaches_the_one_who_takes_batches(found, tmp_path):
    gone = Document("gone.txt", tmp_path / "gone.txt")
    with pytest.raises(UserError, match=r"gone\.txt: cannot be read"):
        next(batches_of([[*found, gone]], size=4))


def test_what_was_read_is_counted(found):
    batches = batches_of([found], length=16)
    next(batches)
    counts = batches.counts()
    lengths = [len(ids(document, PLAIN)) for document in found]
    assert counts["documents"] > 100
    share = counts["too_long"] / counts["documents"]
    assert abs(share - np.mean(np.array(lengths) > 17)) < 0.1
    assert "longer than a sequence (split)" in batches.summary()


# ---- held out


@pytest.mark.parametrize("length", [8, 16, 100])
def test_held_out_batches_are_all_windows_of_all_documents(found, length):
    stream = [(d, token) for d, document in enumerate(found) for token in ids(document, ENDS)]
    windows = [stream[i : i + length + 1] for i in range(0, len(stream), length + 1)]
    rows = [
        {key: value[i] for key, value in batch.items()}
        for batch in held_out_batches(found, ENDS, 4, length)
        for i in range(4)
    ]
    assert len(rows) == -(-len(windows) // 4) * 4
    for row, window in itertools.zip_longest(rows, windows, fillvalue=[]):
        real = row["segments"] > 0
        pairs = list(itertools.pairwise(window))
        assert list(zip(row["documents"][real], row["tokens"][real], strict=True)) == window[:length]
        labels = [after[1] for before, after in pairs if before[0] == after[0]]
        assert row["labels"][row["supervised"]].tolist() == labels
        assert not row["supervised"][~real].any()


def test_held_out_batches_are_the_same_each_time_and_in_any_order(found):
    first = list(held_out_batches(found, ENDS, 4, 16))
    again = list(held_out_batches(found[::-1], ENDS, 4, 16))
    assert len(first) == len(again) and all(same(a, b) for a, b in zip(first, again, strict=True))


def test_held_out_batches_end_with_padding_and_at_the_limit(found):
    every = list(held_out_batches(found, ENDS, 5, 16))
    last = every[-1]
    assert last["segments"][-1].min() == 0 and not last["supervised"][last["segments"] == 0].any()
    limited = list(held_out_batches(found, ENDS, 5, 16, limit=2))
    assert len(limited) == 2 and all(same(a, b) for a, b in zip(limited, every, strict=False))


def test_each_process_takes_its_rows_of_held_out_batches(found):
    for rows in (range(1), range(1, 4)):
        whole = held_out_batches(found, ENDS, 4, 16, anchors=Anchors(4, 0))
        mine = held_out_batches(found, ENDS, 4, 16, anchors=Anchors(4, 0), rows=rows)
        for batch, own in itertools.zip_longest(whole, mine):
            assert same(own, {key: value[rows.start : rows.stop] for key, value in batch.items()})
