"""From documents to batches: shuffle, mix, tokenise, pack; a grain pipeline with one lane per sequence of the batch."""

import itertools
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, NotRequired, TypedDict

import grain
import numpy as np

from mtp_jax.config import Config
from mtp_jax.data.datasets import SourceDocuments, Stream, StreamedRecord
from mtp_jax.data.documents import Document
from mtp_jax.data.packing import Arrays, Lane, LaneState, Prepared, TooLong, prepare
from mtp_jax.data.tokens import Encoder
from mtp_jax.errors import UserError
from mtp_jax.mtp.blocks import Anchors, Noise, hash_positions

_DEFAULT_ANCHORS = 64
_BATCHES_AHEAD = 4


def anchors_of(config: Config, V: int) -> Anchors | None:
    """What a config asks for of a model with V tokens; None where it trains without blocks."""
    if config.mtp is None:
        return None
    asked = _DEFAULT_ANCHORS if config.train.anchors is None else config.train.anchors
    count = None if isinstance(asked, str) else min(asked, config.train.sequence_length)
    return Anchors(count, config.seed, noise_of(config, V), config.mtp.masks)


def noise_of(config: Config, V: int) -> Noise | None:
    """What a config's mask rows hold: noise from so many of a model's V tokens, or None for learned embeddings."""
    if config.mtp is None or config.mtp.rows == "learned":
        return None
    ids = config.mtp.noise
    return Noise(0, V) if ids is None else Noise(ids.low, V if ids.high is None else ids.high)


class Batch(TypedDict):
    """Packed sequences: `segments` numbers a sequence's pieces from 1, 0 is padding; positions restart with each."""

    tokens: np.ndarray  # [B, T] int32
    labels: np.ndarray  # [B, T] int32, the next token of the same document
    supervised: np.ndarray  # [B, T] bool, whether there is a label and it carries loss
    positions: np.ndarray  # [B, T] int32
    segments: np.ndarray  # [B, T] int32
    documents: np.ndarray  # [B, T] int64, which document a token is from
    anchors: NotRequired[np.ndarray]  # [B, G] int32, rows with a block of masks behind them; -1 for none
    noise: NotRequired[np.ndarray]  # [B, G, M] int32, token ids whose embeddings these blocks hold


def training_batches(
    sources: list[SourceDocuments],
    weights: list[float],
    tokenizer: Any,
    batch_size: int,
    sequence_length: int,
    seed: int,
    anchors: Anchors | None = None,
    *,
    too_long: TooLong = "split",
    sequences: Sequence[int] | None = None,
) -> tuple["Batches", Sequence[Any]]:
    """An endless iterator of batches, and the documents that their `documents` field numbers.

    Sequence b of every batch is lane b, which draws documents of its own and packs them by itself. A process opens only
    the lanes of its `sequences` of the global batch (None for all), and what they hold does not depend on how sequences
    are divided among processes. A restored state continues with the very next batch.
    """
    names = DocumentNames(sources)
    lanes = range(batch_size) if sequences is None else sequences
    start = _LaneStates(batch_size, {b: LaneState() for b in lanes})
    encode = DocumentRows(tokenizer, anchors)
    return Batches(_Lanes(sources, weights, seed, names, encode, sequence_length, too_long, start)), names


# ---- the order of documents: an endless stream that can be looked up anywhere


class Draw(NamedTuple):
    """A place in the endless stream of documents."""

    source: int
    epoch: int
    number: int  # of the document in its source; in a source that is a `Stream`, how many were drawn before


class _ToDraw(grain.transforms.MapWithIndex):
    def __init__(self, source: int, length: int | None):
        self.source, self.length = source, length

    def map_with_index(self, index: int, element: int) -> Draw:
        return Draw(self.source, 0, index) if self.length is None else Draw(self.source, index // self.length, element)


def draws_of(sources: list[SourceDocuments], weights: list[float], seed: int) -> grain.MapDataset:
    """Each source shuffled anew in every epoch; several sources alternate in proportion to their weights."""
    parts = []
    for i, source in enumerate(sources):
        length = None if isinstance(source, Stream) else len(source)
        numbers = grain.MapDataset.range(1 if length is None else length).seed(seed + i).shuffle().repeat()
        parts.append(numbers.map_with_index(_ToDraw(i, length)))
    return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights)


def places_of(draws: grain.MapDataset, source: int) -> Iterator[int]:
    """The places of one source's draws among all."""
    return (place for place in itertools.count() if draws[place].source == source)


class StreamReader:
    """Reads a stream once for all lanes of a process, and keeps the records that they will ask for."""

    def __init__(
        self,
        stream: Stream,
        seed: int,
        places: Iterator[int],
        batch_size: int,
        lanes: dict[int, LaneState],
    ):
        """
        Args:
            stream: What is read.
            seed: Of the order of its records.
            places: The place of each record among the draws of all sources.
            batch_size: B, lanes of all processes.
            lanes: Where each lane of this process begins.
        """
        self.records, self.places, self.batch_size, self.lanes = stream.endless(seed), places, batch_size, lanes
        self.pending = {b: {document for document, _ in state.pending} for b, state in lanes.items()}
        self.kept: dict[int, tuple[int, StreamedRecord]] = {}
        self.lock, self.read = threading.Lock(), 0

    def get(self, number: int) -> tuple[int, StreamedRecord]:
        """Epoch and record; each may be asked for once."""
        with self.lock:
            while number not in self.kept:
                record = next(self.records)
                document, b = divmod(next(self.places), self.batch_size)
                state = self.lanes.get(b)
                if state is not None and (document >= state.next or document in self.pending[b]):
                    self.kept[self.read] = record
                self.read += 1
            return self.kept.pop(number)


class DocumentNames(Sequence[Any]):
    """What the numbers in a batch's `documents` stand for: each a `Document`, or the name of a stream's record."""

    def __init__(self, sources: list[SourceDocuments]):
        self.sources = sources
        sizes = [0 if isinstance(source, Stream) else len(source) for source in sources]
        self.starts = [0, *itertools.accumulate(sizes)]
        self.streams = [i for i, source in enumerate(sources) if isinstance(source, Stream)]

    def number(self, source: int, number: int) -> int:
        """The number of a source's document among all."""
        if source in self.streams:  # of unknown length: their records alternate after all other documents
            return self.starts[-1] + number * len(self.streams) + self.streams.index(source)
        return self.starts[source] + number

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, number: Any) -> Any:
        number = int(number)
        if number >= self.starts[-1]:
            if not self.streams:
                raise IndexError(number)
            record, ordinal = divmod(number - self.starts[-1], len(self.streams))
            stream = self.sources[self.streams[ordinal]]
            assert isinstance(stream, Stream)
            return _Named(stream.record_name(record))
        source = next(i for i, end in enumerate(self.starts[1:]) if number < end)
        return self.sources[source][number - self.starts[source]]  # type: ignore[index]


class _Named(NamedTuple):
    name: str


# ---- a document's rows


class DocumentRows:
    """Document -> [n] arrays: tokens, labels within the document, what is supervised, and hashes for the anchors."""

    def __init__(self, tokenizer: Any, anchors: Anchors | None):
        self.encode, self.anchors = Encoder(tokenizer), anchors

    def __call__(self, document: Document, number: int, epoch: int) -> Arrays:
        tokens, supervised, _ = self.encode(document)
        n = len(tokens)
        rows = {
            "tokens": tokens,
            "labels": np.append(tokens[1:], np.int32(0))[:n],
            "supervised": np.append(supervised[1:], False)[:n],
            "documents": np.full(n, number, np.int64),
        }
        if self.anchors is not None:
            rows["hashes"] = hash_positions(self.anchors.seed, epoch, int(document.draw * 2**63), np.arange(n))
        return rows


class _Prepare(grain.transforms.Map):
    """Draw -> `Prepared`."""

    def __init__(
        self,
        sources: list[SourceDocuments],
        names: DocumentNames,
        rows: DocumentRows,
        length: int,
        too_long: TooLong,
        readers: dict[int, StreamReader],
    ):
        self.sources, self.names, self.rows, self.readers = sources, names, rows, readers
        self.length, self.too_long = length, too_long

    def map(self, draw: Draw) -> Prepared:
        source, epoch, number = draw
        if source in self.readers:
            epoch, record = self.readers[source].get(number)
            number = record.number
            document: Document = record
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
        sources: list[SourceDocuments],
        weights: list[float],
        seed: int,
        names: DocumentNames,
        rows: DocumentRows,
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
        # Reading ahead in threads keeps the order, so the state stays exact.
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        lanes = {}
        for b, state in self.start.states.items():
            documents = self.draws[b :: self.start.batch_size].map(read)
            lanes[b] = Lane(documents, self.length, self.rows.anchors, state, ahead)
        return lanes

    def _places(self, source: int) -> Iterator[int]:
        return itertools.count() if len(self.sources) == 1 else places_of(self.draws, source)

    def __next__(self) -> Batch:
        if self.lanes is None:
            self.lanes = self._open()
        sequences = [lane.take() for lane in self.lanes.values()]
        return {name: np.stack([sequence[name] for sequence in sequences]) for name in sequences[0]}  # type: ignore[return-value]

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
        self.too_long, first = lanes.too_long, lanes.sources[0]
        self.bad_records = (first if isinstance(first, Stream) else first[0]).bad_records  # of all sources
        self.inner = grain.experimental.ThreadPrefetchDatasetIterator(lanes, _BATCHES_AHEAD)
        # A thread within native code while Python shuts down would abort the process.
        weakref.finalize(self, self.inner.close)

    def __next__(self) -> Batch:
        return next(self.inner)

    def get_state(self) -> dict[str, Any]:
        """`{"lanes": {number: state}}` of this process's lanes, fit for JSON."""
        return {"lanes": {str(b): state.to_json() for b, state in self.inner.get_state().states.items()}}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from the states of all lanes, of which this process takes its own.

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
                f"the state of the data does not fit a batch of {batch_size} sequences ({error}): it was saved by "
                "another version or with another global batch size."
            ) from error
        self.inner.set_state(_LaneStates(batch_size, states))

    def counts(self) -> dict[str, int]:
        """Documents that this process's lanes have read so far, and how many were too long or gave nothing."""
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
            f"{counts['unused']:,} with nothing to train on{self.bad_records.summary()}"
        )

    def close(self) -> None:
        self.inner.close()


def merge_states(states: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One state from those of several processes' iterators at the same step."""
    lanes: dict[str, Any] = {}
    for state in states:
        lanes |= state["lanes"]
    return {"lanes": dict(sorted(lanes.items(), key=lambda lane: int(lane[0])))}
