"""The order of documents: each once per epoch, mixed by weight, alike wherever one looks."""

import itertools

import numpy as np
import pytest
from mtp_jax.data.examples import Examples
from mtp_jax.data.order import DocumentNames, Draw, StreamReader, draws_of, places_of
from mtp_jax.data.streams import Stream

from mtp_jax.data.packing import LaneState


class Named:
    def __init__(self, name):
        self.name = name


def examples(count, name="a"):
    return Examples(count, lambda number: Named(f"{name}{number}"))


def stream(count, name="s"):
    return Stream(lambda: [{"text": str(number)} for number in range(count)], name, lambda row, _: row["text"])


def test_every_document_once_per_epoch_in_another_order():
    draws = draws_of([examples(40)], [1.0], 0)
    epochs = [[draws[40 * epoch + i] for i in range(40)] for epoch in range(3)]
    for epoch, drawn in enumerate(epochs):
        assert {draw.epoch for draw in drawn} == {epoch}
        assert sorted(draw.number for draw in drawn) == list(range(40))
    orders = [[draw.number for draw in drawn] for drawn in epochs]
    assert orders[0] != orders[1] != orders[2] != orders[0] and orders[0] != list(range(40))


@pytest.mark.parametrize("weights", [[3.0, 1.0], [1.0, 1.0], [1.0, 9.0]])
def test_the_mixture_follows_the_weights(weights):
    draws = draws_of([examples(30), stream(10)], weights, 0)
    drawn = [draws[i] for i in range(400)]
    share = np.mean([draw.source == 0 for draw in drawn])
    assert abs(share - weights[0] / sum(weights)) < 0.01
    assert [draw for draw in drawn if draw.source == 1] == [Draw(1, 0, n) for n in range(round(400 * (1 - share)))]


def test_documents_are_numbered_over_all_sources():
    sources = [examples(5, "a"), stream(7, "s"), examples(3, "b"), stream(9, "t")]
    names = DocumentNames(sources)
    expected = {(0, 4): "a4", (2, 0): "b0", (2, 2): "b2", (1, 0): "s#0", (1, 6): "s#6", (3, 0): "t#0", (3, 8): "t#8"}
    numbers = [names.number(*place) for place in expected]
    assert [names[number].name for number in numbers] == list(expected.values())
    assert len(set(numbers)) == len(numbers)


# ---- streams


def test_a_reader_keeps_what_its_lanes_will_ask_for_alone():
    lanes = {1: LaneState(next=3, pending=((1, 0),))}
    reader = StreamReader(stream(100), 0, itertools.count(), 4, lanes)
    expected = list(itertools.islice(stream(100).endless(0), 60))
    assert reader.get(41)[1].number == expected[41][1].number  # lane 1, its document 10
    assert sorted(reader.kept) == [5, 13, 17, 21, 25, 29, 33, 37]
    assert reader.get(5)[1].number == expected[5][1].number
    assert 5 not in reader.kept


def test_a_reader_knows_where_its_rows_stand_in_a_mixture():
    sources = [examples(10), stream(10)]
    draws = draws_of(sources, [2.0, 1.0], 0)
    places = list(itertools.islice(places_of(draws, 1), 10))
    assert [draws[place].source for place in places] == [1] * 10
    assert [draws[place].number for place in places] == list(range(10))
