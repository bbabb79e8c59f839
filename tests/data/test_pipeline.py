"""Batches: every document once per epoch, labels inside documents, and an iterator that resumes exactly."""

import itertools
import random
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from mtp_jax.data.pipeline import held_out_batches, training_batches
from mtp_jax.data.sources import Document


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
def test_rows_are_the_documents_cut_into_windows(found, tokenizer):
    for batch in islice(batches_of([found], tokenizer), 30):
        for row in range(4):
            check_row({key: value[row] for key, value in batch.items()}, found, tokenizer)


def check_row(row, found, tokenizer):
    """Compare one row with what its documents' own tokens say."""
    segments, at = row["segments"], {}
    assert (np.diff(segments) >= 0).all() and segments.min() >= 1
    for t in range(len(segments)):
        begins = t == 0 or segments[t] != segments[t - 1]
        assert row["positions"][t] == (0 if begins else row["positions"][t - 1] + 1)
        own = ids(found[row["documents"][t]], tokenizer)
        if begins:  # where in its document a segment begins is known only for segments after the first
            offsets = range(len(own)) if t == 0 else [0]
            stretch = row["tokens"][t : t + int((segments[t:] == segments[t]).sum())].tolist()
            at = {offset for offset in offsets if own[offset : offset + len(stretch)] == stretch}
            assert at
            start = t
        last = t + 1 == len(segments) or segments[t + 1] != segments[t]
        if row["supervised"][t]:
            assert any(own[o + t - start + 1 : o + t - start + 2] == [row["labels"][t]] for o in at)
        if not last:
            assert row["supervised"][t] and row["labels"][t] == row["tokens"][t + 1]
        elif t + 1 < len(segments):
            assert not row["supervised"][t]


def test_a_label_is_never_of_another_document(found):
    seen = 0
    for batch in islice(batches_of([found]), 40):
        right = batch["supervised"]
        seen += right.sum()
        assert (batch["tokens"] == batch["labels"])[right].all()  # each document repeats one letter of its own
    assert seen > 1000


# ---- epochs


def order_of_documents(batches, count):
    """Documents in the order in which they begin."""
    order = []
    for batch in batches:
        for documents, positions in zip(batch["documents"], batch["positions"], strict=True):
            for t in range(len(documents)):
                before = order[-1] if order else None
                if positions[t] == 0 and not (t == 0 and documents[t] == before):
                    order.append(int(documents[t]))
        if len(order) >= count:
            return order[:count]
    return order


def test_every_document_once_per_epoch_in_another_order(found):
    order = order_of_documents(batches_of([found], size=1), 120)
    epochs = [order[i : i + 40] for i in (0, 40, 80)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != list(range(40))


def test_an_epoch_gives_every_token_once(found):
    total, stream = sum(len(ids(d, PLAIN)) for d in found), []
    for batch in batches_of([found], size=1):
        stream += [*batch["tokens"][0].tolist(), int(batch["labels"][0, -1])]
        if len(stream) >= total:
            break
    assert Counter(stream[:total]) == Counter(token for d in found for token in ids(d, PLAIN))


def test_the_seed_decides_the_order(found):
    first, again, other = (next(batches_of([found], seed=seed)) for seed in (3, 3, 4))
    assert same(first, again) and not same(first, other)


@pytest.mark.parametrize("weights", [[3.0, 1.0], [1.0, 1.0], [1.0, 9.0]])
def test_the_mixture_follows_the_weights(found, weights):
    order = order_of_documents(batches_of([found[:30], found[30:]], weights=weights, size=1), 400)
    share = np.mean([document < 30 for document in order])
    assert abs(share - weights[0] / sum(weights)) < 0.02


def test_a_source_smaller_than_a_batch_is_repeated(found):
    tiny = [min(found, key=lambda d: d.path.stat().st_size)]
    batch = next(batches_of([tiny], ENDS, size=8, length=32))
    assert batch["tokens"].shape == (8, 32) and batch["segments"].min() == 1


# ---- resuming


@pytest.mark.parametrize("sources", [1, 2])
@pytest.mark.parametrize("at", [0, 1, 7, 23])
def test_a_restored_iterator_goes_on_with_the_next_batch(found, sources, at):
    parts = [found] if sources == 1 else [found[:25], found[25:]]
    batches = batches_of(parts)
    for _ in range(at):
        next(batches)
    state = batches.get_state()
    expected = [next(batches) for _ in range(20)]
    fresh = batches_of(parts)
    next(fresh)
    fresh.set_state(state)
    assert all(same(a, b) for a, b in zip(expected, fresh, strict=False))
    assert not same(expected[0], expected[1])


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
