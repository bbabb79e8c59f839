"""Batches: the order of documents, labels inside documents, independent lanes, and an iterator that resumes exactly."""

import itertools
import json
import time
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pytest
from characters import BARE, ENDS, ids, make_documents, same, sequences_of
from chats import PLAIN, letters, turns, with_template

from mtp_jax.config import Source
from mtp_jax.data.batches import (
    DocumentNames,
    Draw,
    StreamReader,
    draws_of,
    merge_states,
    places_of,
    training_batches,
)
from mtp_jax.data.datasets import Stream
from mtp_jax.data.documents import Document, Documents, FileDocument, Text
from mtp_jax.data.packing import LaneState
from mtp_jax.data.sources import source_documents
from mtp_jax.data.tokens import Encoder
from mtp_jax.errors import UserError
from mtp_jax.mtp.blocks import Anchors, Noise

# ---- the order of documents


@dataclass(frozen=True)
class Named(Document):
    name: str

    def content(self):
        return Text(self.name)


def listed(count, name="a"):
    return Documents(count, lambda number: Named(f"{name}{number}"))


def stream(count, name="s"):
    return Stream(lambda: [{"text": str(number)} for number in range(count)], name, lambda values, _: values["text"])


def test_every_document_once_per_epoch_in_another_order():
    draws = draws_of([listed(40)], [1.0], 0)
    epochs = [[draws[40 * epoch + i] for i in range(40)] for epoch in range(3)]
    for epoch, drawn in enumerate(epochs):
        assert {draw.epoch for draw in drawn} == {epoch}
        assert sorted(draw.number for draw in drawn) == list(range(40))
    orders = [[draw.number for draw in drawn] for drawn in epochs]
    assert orders[0] != orders[1] != orders[2] != orders[0] and orders[0] != list(range(40))


@pytest.mark.parametrize("weights", [[3.0, 1.0], [1.0, 1.0], [1.0, 9.0]])
def test_the_mixture_follows_the_weights(weights):
    draws = draws_of([listed(30), stream(10)], weights, 0)
    drawn = [draws[i] for i in range(400)]
    share = np.mean([draw.source == 0 for draw in drawn])
    assert abs(share - weights[0] / sum(weights)) < 0.01
    assert [draw for draw in drawn if draw.source == 1] == [Draw(1, 0, n) for n in range(round(400 * (1 - share)))]


def test_documents_are_numbered_over_all_sources():
    sources = [listed(5, "a"), stream(7, "s"), listed(3, "b"), stream(9, "t")]
    names = DocumentNames(sources)
    expected = {(0, 4): "a4", (2, 0): "b0", (2, 2): "b2", (1, 0): "s#0", (1, 6): "s#6", (3, 0): "t#0", (3, 8): "t#8"}
    numbers = [names.number(*place) for place in expected]
    assert [names[number].name for number in numbers] == list(expected.values())
    assert len(set(numbers)) == len(numbers)


def test_a_reader_keeps_what_its_lanes_will_ask_for_alone():
    lanes = {1: LaneState(next=3, pending=((1, 0),))}
    reader = StreamReader(stream(100), 0, itertools.count(), 4, lanes)
    expected = list(itertools.islice(stream(100).endless(0), 60))
    assert reader.get(41)[1].number == expected[41][1].number  # lane 1, its document 10
    assert sorted(reader.kept) == [5, 13, 17, 21, 25, 29, 33, 37]
    assert reader.get(5)[1].number == expected[5][1].number
    assert 5 not in reader.kept


def test_a_reader_knows_where_its_records_are_in_a_mixture():
    sources = [listed(10), stream(10)]
    draws = draws_of(sources, [2.0, 1.0], 0)
    places = list(itertools.islice(places_of(draws, 1), 10))
    assert [draws[place].source for place in places] == [1] * 10
    assert [draws[place].number for place in places] == list(range(10))


# ---- rows


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return make_documents(tmp_path_factory.mktemp("documents"))


def batches_of(sources, tokenizer=BARE, weights=None, size=4, length=16, seed=0):
    return training_batches(sources, weights or [1.0] * len(sources), tokenizer, size, length, seed)[0]


@pytest.mark.parametrize("tokenizer", [BARE, ENDS], ids=["bare", "with ends"])
@pytest.mark.parametrize("length", [16, 64])
def test_segments_are_whole_documents_or_whole_pieces_of_long_ones(found, tokenizer, length):
    for batch in islice(batches_of([found], tokenizer, length=length), 20):
        for sequence in sequences_of(batch):
            check_sequence(sequence, found, tokenizer, length)


def check_sequence(sequence, found, tokenizer, length):
    """Compare one sequence with what its documents' own tokens say."""
    segments = sequence["segments"]
    count = segments.max()
    assert sorted(set(segments.tolist()) - {0}) == list(range(1, count + 1))
    assert (np.diff(np.where(segments == 0, count + 1, segments)) >= 0).all()  # padding stands last
    assert not sequence["supervised"][segments == 0].any()
    for number in range(1, count + 1):
        part = {key: value[segments == number] for key, value in sequence.items()}
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


def test_blocks_of_a_document_do_not_depend_on_what_it_is_packed_with(found):
    chosen, drawn, wanted = {}, [], Anchors(80, 5, Noise(3, 90), masks=2)
    for sources, length in [([found], 64), ([found[:20]], 64), ([found[::-1]], 80)]:
        batches, documents = training_batches(sources, [1.0], BARE, 2, length, 0, wanted)
        noise = {}
        for batch in islice(batches, 6):
            for sequence in sequences_of(batch):
                for segment in range(1, sequence["segments"].max() + 1):
                    inside = sequence["segments"] == segment
                    name = documents[sequence["documents"][inside][0]].name
                    start = np.flatnonzero(inside)[0]
                    anchors = sequence["anchors"]
                    here = (anchors >= 0) & inside[anchors]
                    rows = (anchors[here] - start).tolist()
                    assert chosen.setdefault(name, rows) == rows
                    noise.setdefault(name, set()).add(tuple(sequence["noise"][here].flat))
        drawn.append(noise)
    assert len(chosen) > 20
    for one, other in itertools.combinations(drawn, 2):  # of documents met in the same epoch: others draw anew
        long = [name for name in one.keys() & other.keys() if len(chosen[name]) > 4]
        assert sum(bool(one[name] & other[name]) for name in long) > 3


def test_training_batches_keep_supervision_through_packing(jsonl):
    tokenizer = with_template(letters(), PLAIN)
    chats = source_documents(jsonl([{"messages": turns("hi", "yes" * i)} for i in range(1, 8)]))
    batches, found = training_batches([chats], [1.0], tokenizer, 2, 32, 0, Anchors(8, 0))
    encode, anchored = Encoder(tokenizer), 0
    for sequence in itertools.chain.from_iterable(sequences_of(next(batches)) for _ in range(12)):
        for segment in range(1, sequence["segments"].max() + 1):
            inside = sequence["segments"] == segment
            whole = encode(found[sequence["documents"][inside][0]])
            assert sequence["tokens"][inside].tolist() == whole.tokens.tolist()
            assert sequence["supervised"][inside].tolist() == [*whole.supervised[1:].tolist(), False]
            # The 6 rows before the last prompt token of "U:hi", a new line, "A:", and that token.
            assert sequence["supervised"][inside][:7].astype(int).tolist() == [0, 0, 0, 0, 0, 0, 1]
        anchors = sequence["anchors"][sequence["anchors"] >= 0]
        anchored += len(anchors)
        assert sequence["supervised"][anchors].all()
    assert anchored


# ---- lanes


@pytest.mark.parametrize("sources", [1, 2])
@pytest.mark.parametrize("division", [[4], [1, 3], [2, 2], [1, 1, 1, 1]])
def test_a_process_makes_its_sequences_alone(found, sources, division):
    parts = [found] if sources == 1 else [found[:25], found[25:]]
    whole = list(islice(batches_of(parts), 12))
    ends = list(itertools.accumulate(division, initial=0))
    for start, end in itertools.pairwise(ends):
        mine, _ = training_batches(parts, [1.0] * sources, BARE, 4, 16, 0, sequences=range(start, end))
        for batch, own in zip(whole, mine, strict=False):
            assert same(own, {key: value[start:end] for key, value in batch.items()})


@pytest.mark.parametrize("at", [0, 7])
def test_a_run_continues_where_it_was_however_sequences_are_divided(found, at):
    parts = [found[:25], found[25:]]

    def opened(sequences):
        return training_batches(parts, [2.0, 1.0], BARE, 4, 16, 0, anchors, sequences=sequences)[0]

    anchors = Anchors(3, 0, Noise(3, 90), masks=2)
    before = [opened(range(3)), opened(range(3, 4))]
    for batches in before:
        for _ in range(at):
            next(batches)
    state = json.loads(json.dumps(merge_states([batches.get_state() for batches in before])))
    assert list(state["lanes"]) == ["0", "1", "2", "3"]
    whole = opened(None)
    expected = list(islice(whole, at + 15))[at:]
    for mine in (range(4), range(1), range(1, 4)):
        fresh = opened(mine)
        next(fresh)
        fresh.set_state(state)
        for a, b in zip(expected, fresh, strict=False):
            assert same({key: value[mine.start : mine.stop] for key, value in a.items()}, b)
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
    gone = FileDocument("gone.txt", tmp_path / "gone.txt")
    with pytest.raises(UserError, match=r"gone\.txt: cannot be read"):
        next(batches_of([[*found, gone]], size=4))


def test_what_was_read_is_counted(found):
    batches = batches_of([found], length=16)
    next(batches)
    counts = batches.counts()
    lengths = [len(ids(document, BARE)) for document in found]
    assert counts["documents"] > 100
    share = counts["too_long"] / counts["documents"]
    assert abs(share - np.mean(np.array(lengths) > 17)) < 0.1
    assert "longer than a sequence (split)" in batches.summary()


# ---- streams


@pytest.fixture
def streamed(jsonl):
    """A stream of 60 records."""
    texts = [f"the cat {i} sat on the mat" * (1 + i % 5) for i in range(60)]
    return source_documents(jsonl([{"text": text} for text in texts], streaming=True))


def opened(sources, tokenizer, sequences=None):
    weights = [2.0, 1.0][: len(sources)]
    return training_batches(sources, weights, tokenizer, 4, 32, 0, Anchors(3, 0), sequences=sequences)[0]


@pytest.mark.parametrize("mixed", [False, True])
def test_a_stream_may_be_divided_and_resumed_anywhere(streamed, small_tokenizer, corpus, mixed):
    sources = [streamed]
    if mixed:
        sources.append(source_documents(Source(kind="text", path=str(corpus))))
    expected = list(itertools.islice(opened(sources, small_tokenizer), 14))
    parts = [opened(sources, small_tokenizer, mine) for mine in (range(1), range(1, 4))]
    for batch in expected[:9]:
        own = [next(part) for part in parts]
        assert all(np.array_equal(np.concatenate([p[key] for p in own]), batch[key]) for key in batch)
    state = merge_states([part.get_state() for part in parts])
    fresh = opened(sources, small_tokenizer, range(2, 4))
    fresh.set_state(state)
    for batch, own in zip(expected[9:], fresh, strict=False):
        assert all(np.array_equal(own[key], batch[key][2:4]) for key in batch)


def test_streamed_documents_of_a_batch_have_names(streamed, small_tokenizer):
    batches, names = training_batches([streamed], [1.0], small_tokenizer, 2, 64, 0)
    batch = next(batches)
    text = {record.name: record.text() for record in streamed}
    sequence = sequences_of(batch)[0]
    first = small_tokenizer.decode(sequence["tokens"][sequence["segments"] == 1], skip_special_tokens=True)
    assert text[names[sequence["documents"][0]].name].startswith(first) and first
