"""Packing: nothing is lost, little is left empty, and what is too long is dealt with as configured."""

from collections import Counter

import grain
import numpy as np
import pytest

from mtp_jax.data.packing import Lane, LaneState, join, prepare
from mtp_jax.errors import UserError

pytestmark = pytest.mark.quick

T = 128


def rows_of(n, number=0):
    """A document of n tokens, all supervised."""
    return {
        "tokens": np.arange(n, dtype=np.int32),
        "labels": np.append(np.arange(1, n, dtype=np.int32), np.int32(0))[:n],
        "supervised": np.arange(n) < n - 1,
        "documents": np.full(n, number, np.int64),
    }


def lane_of(lengths, state=None, too_long="split"):
    documents = grain.MapDataset.source(list(enumerate(lengths))).map(
        lambda document: prepare(rows_of(document[1], document[0]), T, too_long)
    )
    return Lane(documents.repeat(), T, None, state or LaneState(), grain.ReadOptions(num_threads=0))


def mixed_lengths(kind):
    draw = np.random.default_rng(0)
    if kind == "chat":
        return np.clip(draw.lognormal(np.log(22), 1.0, 4000).astype(int), 2, T).tolist()
    if kind == "even":
        return draw.integers(2, T + 1, 4000).tolist()
    return np.where(draw.random(4000) < 0.7, draw.integers(2, 25, 4000), draw.integers(90, 400, 4000)).tolist()


@pytest.mark.parametrize("kind", ["chat", "even", "short and long"])
def test_less_than_three_percent_of_mixed_lengths_is_padding(kind):
    lane = lane_of(mixed_lengths(kind))
    sequences = [lane.take() for _ in range(400)]
    assert np.mean([sequence["segments"] == 0 for sequence in sequences]) < 0.03


def test_every_piece_is_packed_once():
    lengths = mixed_lengths("short and long")
    lane = lane_of(lengths)
    packed = Counter()
    for _ in range(300):
        sequence = lane.take()
        for segment in range(1, sequence["segments"].max() + 1):
            inside = sequence["segments"] == segment
            packed[int(sequence["documents"][inside][0]), int(sequence["tokens"][inside][0]) // T] += 1
    state = lane.snapshot()
    read = Counter(
        (number, place)
        for number in range(state.next)
        for place in range(len(prepare(rows_of(lengths[number]), T, "split").pieces))
    )
    assert packed + Counter(state.pending) == read and state.next > 400


def test_the_oldest_piece_is_never_passed_over():
    lane = lane_of(mixed_lengths("even"))
    for _ in range(200):
        lane.take()
        oldest = lane.snapshot().pending[0][0]
        assert lane.state.next - oldest < 400


def test_a_state_says_everything():
    lengths = mixed_lengths("short and long")
    lane = lane_of(lengths)
    for _ in range(37):
        lane.take()
    state = LaneState.from_json(lane.snapshot().to_json())
    again = lane_of(lengths, state)
    for _ in range(50):
        a, b = lane.take(), again.take()
        assert all(np.array_equal(a[key], b[key]) for key in a)
    assert lane.snapshot() == again.snapshot()


# ---- too long


@pytest.mark.parametrize(
    ("n", "too_long", "sizes"),
    [
        (T, "split", [T]),
        (T + 1, "split", [T]),  # the last token is a label alone
        (T + 1, "drop", [T]),
        (T + 2, "split", [T, 2]),
        (2 * T + 1, "split", [T, T]),  # a last token alone is no piece
        (2 * T + 5, "split", [T, T, 5]),
        (2 * T + 5, "cut", [T]),
        (2 * T + 5, "drop", []),
        (1, "split", []),
        (0, "split", []),
    ],
)
def test_what_becomes_of_a_document(n, too_long, sizes):
    rows = rows_of(n)
    prepared = prepare(rows, T, too_long)
    assert [len(piece["tokens"]) for piece in prepared.pieces] == sizes
    assert prepared.too_long == (n > T + 1)
    labels = [label for piece in prepared.pieces for label in piece["labels"][piece["supervised"]]]
    if too_long == "split":  # no label is lost
        assert labels == rows["labels"][rows["supervised"]].tolist()


def test_pieces_with_nothing_supervised_are_dropped():
    rows = rows_of(4 * T)
    rows["supervised"][: 2 * T + 3] = False
    pieces = prepare(rows, T, "split").pieces
    assert [int(piece["tokens"][0]) for piece in pieces] == [2 * T, 3 * T]
    assert prepare(rows, T, "cut").pieces == []


def test_a_lane_counts_what_it_met():
    lane = lane_of([5, 3 * T, 1, 50], too_long="drop")
    for _ in range(20):
        lane.take()
    state = lane.snapshot()
    assert state.too_long == sum(number % 4 == 1 for number in range(state.next))
    assert state.unused == sum(number % 4 in (1, 2) for number in range(state.next))


def test_documents_of_no_use_end_the_run():
    with pytest.raises(UserError, match=r"10,000 consecutive documents gave nothing to train on.*data\.too_long"):
        lane_of([3 * T] * 50, too_long="drop").take()


# ---- a sequence


def test_documents_are_apart_in_a_sequence():
    sequence = join([rows_of(5, 7), rows_of(3, 9)], 10, None)
    assert sequence["segments"].tolist() == [1] * 5 + [2] * 3 + [0] * 2
    assert sequence["positions"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 0]
    assert sequence["supervised"].astype(int).tolist() == [1, 1, 1, 1, 0, 1, 1, 0, 0, 0]
    assert sequence["documents"][:8].tolist() == [7] * 5 + [9] * 3 and "anchors" not in sequence
