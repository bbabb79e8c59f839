"""From documents to batches: shuffle, mix, tokenise, pack; a grain pipeline of one lane per sequence of the batch."""

import itertools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, NotRequired, TypedDict

import grain
import numpy as np

from mtp_jax.config import Config
from mtp_jax.data.encoding import Encoder
from mtp_jax.data.examples import Example
from mtp_jax.data.order import DocumentNames, Draw, StreamReader, draws_of, places_of
from mtp_jax.data.packing import Arrays, Lane, LaneState, Prepared, TooLong, prepare
from mtp_jax.data.streams import Documents, Stream
from mtp_jax.errors import UserError
from mtp_jax.mtp.blocks import choose_anchors, hash_positions

_DEFAULT_ANCHORS = 64
_BATCHES_AHEAD = 4


class Anchors(NamedTuple):
    """How many blocks of masks stand in a sequence: `count`, chosen by hash, or one behind every row (None)."""

    count: int | None
    seed: int


def anchors_of(config: Config) -> Anchors | None:
    """What a config asks for; None where it trains without blocks."""
    if config.objective == "next_token":
        return None
    count = _DEFAULT_ANCHORS if config.train.anchors is None else config.train.anchors
    return Anchors(None if isinstance(count, str) else min(count, config.train.sequence_length), config.seed)


class Batch(TypedDict):
    """Packed rows: `segments` numbers the documents of a sequence from 1, 0 is padding; positions restart with each."""

    tokens: np.ndarray  # [B, T] int32
    labels: np.ndarray  # [B, T] int32, the next token of the same document
    supervised: np.ndarray  # [B, T] bool, whether there is a label and it is to be predicted
    positions: np.ndarray  # [B, T] int32
    segments: np.ndarray  # [B, T] int32
    documents: np.ndarray  # [B, T] int64, which document a token is from
    anchors: NotRequired[np.ndarray]  # [B, G] int32, rows with a block of masks behind them; -1 for none


# ---- a document's rows


class _Rows:
    """Document -> [n] arrays: tokens, labels within the document, what is supervised, hashes for the anchors."""

    def __init__(self, tokenizer: Any, anchors: Anchors | None):
        self.encode, self.anchors = Encoder(tokenizer), anchors

    def __call__(self, document: Example, number: int, epoch: int) -> Arrays:
        tokens, supervised, _ = self.encode(document)
        n = len(tokens)
        rows = {
            "tokens": tokens,
            "labels": np.append(tokens[1:], np.int32(0))[:n],
            "supervised": np.append(supervised[1:], False)[:n],
            "documents": np.full(n, number, np.int64),
        }
        if self.anchors is not None:
            example = int(document.draw * 2**63)
            rows["hashes"] = hash_positions(self.anchors.seed, epoch, example, np.arange(n))
        return rows


class _Prepare(grain.transforms.Map):
    """Draw -> `Prepared`."""

    def __init__(
        self,
        sources: list[Documents],
        names: DocumentNames,
        rows: _Rows,
        length: int,
        too_long: TooLong,
        readers: dict[int, StreamReader],
    ):
        self.sources, self.names, self.rows, self.readers = sources, names, rows, readers
        self.length, self.too_long = length, too_long

    def map(self, draw: Draw) -> Prepared:
        source, epoch, number = draw
        if source in self.readers:
            epoch, row = self.readers[source].get(number)
            number = row.number
            document: Example = row
        else:
            document = self.sources[source][number]  # type: ignore[index]
        return prepare(self.rows(document, self.names.number(source, number), epoch), self.length, self.too_long)


# ---- batches


class _LaneStates(NamedTuple):
    """States of the lanes of a process; as a whole it never changes, so a copy of it is itself."""

    batch_size: int
    states: dict[int, LaneState]

    def __deepcopy__(self, memo: Any) -> "_LaneStates":
        return self


class _Lanes(grain.DatasetIterator):
    """The lanes of a process side by side; lane b packs the documents b, b + B, b + 2B, ... of the stream."""

    def __init__(
        self,
        sources: list[Documents],
        weights: list[float],
        seed: int,
        names: DocumentNames,
        rows: _Rows,
        length: int,
        too_long: TooLong,
        start: _LaneStates,
    ):
        super().__init__()
        self.sources, self.seed, self.names, self.rows = sources, seed, names, rows
        self.length, self.too_long = length, too_long
        self.draws = draws_of(sources, weights, seed)
        self.lanes: dict[int, Lane] | None = None
        self.set_state(start)

    def set_state(self, state: Any) -> None:
        self.close()
        self.start, self.lanes = state, None

    def _open(self) -> dict[int, Lane]:
        readers = {
            i: StreamReader(stream, self.seed + i, self._places(i), *self.start)
            for i, stream in enumerate(self.sources)
            if isinstance(stream, Stream)
        }
        read = _Prepare(self.sources, self.names, self.rows, self.length, self.too_long, readers)
        anchors = None if self.rows.anchors is None else self.rows.anchors.count
        # Reading ahead in threads keeps the order, so the state stays exact.
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        lanes = {}
        for b, state in self.start.states.items():
            documents = self.draws[b :: self.start.batch_size].map(read)
            lanes[b] = Lane(documents, self.length, anchors, state, ahead)
        return lanes

    def _places(self, source: int) -> Iterator[int]:
        return itertools.count() if len(self.sources) == 1 else places_of(self.draws, source)

    def __next__(self) -> Batch:
        if self.lanes is None:
            self.lanes = self._open()
        rows = [lane.take() for lane in self.lanes.values()]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}  # type: ignore[return-value]

    def get_state(self) -> Any:
        if self.lanes is None:
            return self.start
        return _LaneStates(self.start.batch_size, {b: lane.snapshot() for b, lane in self.lanes.items()})

    def close(self) -> None:
        for lane in (self.lanes or {}).values():
            lane.reader.close()


class Batches(grain.DatasetIterator):
    """An endless iterator of batches, made in the background; its state is that of the last batch taken."""

    def __init__(self, lanes: _Lanes):
        super().__init__()
        self.too_long = lanes.too_long
        self.inner = grain.experimental.ThreadPrefetchDatasetIterator(lanes, _BATCHES_AHEAD)
        # A thread within native code while Python shuts down would abort the process.
        weakref.finalize(self, self.inner.close)

    def __next__(self) -> Batch:
        return next(self.inner)

    def get_state(self) -> dict[str, Any]:
        """`{"lanes": {number: state}}` of this process's lanes, fit for JSON."""
        return {"lanes": {str(b): state.to_json() for b, state in self.inner.get_state().states.items()}}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from the states of all lanes, of which those of this process are taken.

        Raises:
            UserError: a state that lacks one of them.
        """
        batch_size, mine = self.inner.get_state()
        try:
            lanes = state["lanes"]
            if len(lanes) != batch_size:
                raise KeyError(f"{len(lanes)} lanes")
            states = {b: LaneState.from_json(lanes[str(b)]) for b in mine}
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"the state of the data does not fit a batch of {batch_size} sequences ({error}): it is of another "
                "version or of another global batch."
            ) from error
        self.inner.set_state(_LaneStates(batch_size, states))

    def counts(self) -> dict[str, int]:
        """Documents read so far by this process's lanes, and how many of them were too long or gave nothing."""
        states = self.inner.get_state().states.values()
        return {
            "documents": sum(state.next for state in states),
            "too_long": sum(state.too_long for state in states),
            "unused": sum(state.unused for state in states),
        }

    def summary(self) -> str:
        """The counts in a line."""
        counts, lanes = self.counts(), self.inner.get_state()
        n, done = counts["documents"], {"split": "split", "cut": "cut", "drop": "dropped"}[self.too_long]
        where = "" if len(lanes.states) == lanes.batch_size else "of this process: "
        return (
            f"{where}{n:,} documents read, {counts['too_long']:,} longer than a sequence ({done}), "
            f"{counts['unused']:,} with nothing to train on"
        )

    def close(self) -> None:
        self.inner.close()


def merge_states(states: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One state of what several processes' iterators said at the same step."""
    lanes: dict[str, Any] = {}
    for state in states:
        lanes |= state["lanes"]
    return {"lanes": dict(sorted(lanes.items(), key=lambda lane: int(lane[0])))}


def training_batches(
    sources: list[Documents],
    weights: list[float],
    tokenizer: Any,
    batch_size: int,
    sequence_length: int,
    seed: int,
    anchors: Anchors | None = None,
    *,
    too_long: TooLong = "split",
    rows: Sequence[int] | None = None,
) -> tuple[Batches, Sequence[Any]]:
    """An endless iterator of batches, and the documents that their `documents` field numbers.

    Sequence b of every batch is lane b: it draws its own documents and packs them by itself. So a process that is given
    `rows` of the global batch of `batch_size` opens these lanes alone, and what they hold does not depend on how rows
    are divided. Restoring the state continues with the very next batch.
    """
    names = DocumentNames(sources)
    start = _LaneStates(batch_size, {b: LaneState() for b in (range(batch_size) if rows is None else rows)})
    encode = _Rows(tokenizer, anchors)
    lanes = _Lanes(sources, weights, seed, names, encode, sequence_length, too_long, start)
    return Batches(lanes), names


# ---- held out


class _Windows(grain.transforms.Map):
    """A window of T+1 tokens as T rows, of which only those inside a document are supervised; add anchors."""

    def __init__(self, anchors: Anchors | None):
        self.anchors = anchors

    def map(self, packed: Arrays) -> Batch:
        segments, last = packed["tokens_segment_ids"], slice(None, -1)
        inside = (segments[:-1] == segments[1:]) & (segments[1:] != 0)
        rows: Batch = {
            "tokens": packed["tokens"][last],
            "labels": packed["labels"][last],
            "supervised": inside & packed["supervised"][last],
            "positions": packed["tokens_positions"][last],
            "segments": segments[last],
            "documents": packed["documents"][last],
        }
        if self.anchors is not None:
            hashes = packed["hashes"][last]
            rows["anchors"] = choose_anchors(hashes, rows["supervised"], rows["segments"], self.anchors.count)
        return rows


def held_out_batches(
    documents: Sequence[Example],
    tokenizer: Any,
    batch_size: int,
    sequence_length: int,
    limit: int | None = None,
    anchors: Anchors | None = None,
    *,
    rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Every held-out document once, in order of name, cut into windows; the last batch is filled up with padding.

    Each process goes through all of them and takes its `rows`.
    """
    ordered, encode = sorted(documents, key=lambda document: document.name), _Rows(tokenizer, anchors)
    numbers = grain.MapDataset.range(len(ordered)).map(lambda number: encode(ordered[number], number, 0))
    names = ("tokens", "labels", "supervised", "documents") + (() if anchors is None else ("hashes",))
    ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)
    windows = grain.experimental.ConcatThenSplitIterDataset(
        numbers.to_iter_dataset(ahead), length_struct=dict.fromkeys(names, sequence_length + 1)
    ).map(_Windows(anchors))
    part = slice(None) if rows is None else np.asarray(rows)
    for number, batch in enumerate(windows.batch(batch_size, drop_remainder=False)):
        if number == limit:
            return
        short = batch_size - len(batch["tokens"])
        fill = {"anchors": -1}
        yield {  # type: ignore[misc]
            key: np.pad(value, ((0, short), (0, 0)), constant_values=fill.get(key, 0))[part]
            for key, value in batch.items()
        }
