"""The order in which documents are trained on: an endless stream that can be looked up anywhere."""

import itertools
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain

from mtp_jax.data.packing import LaneState
from mtp_jax.data.streams import Documents, Stream, StreamedRow


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


def draws_of(sources: list[Documents], weights: list[float], seed: int) -> grain.MapDataset:
    """Each source shuffled anew in every epoch; those of several sources alternate in proportion to the weights."""
    parts = []
    for i, source in enumerate(sources):
        length = None if isinstance(source, Stream) else len(source)
        numbers = grain.MapDataset.range(1 if length is None else length).seed(seed + i).shuffle().repeat()
        parts.append(numbers.map_with_index(_ToDraw(i, length)))
    return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights)


class StreamReader:
    """Reads a stream once for all lanes of a process, and keeps what one of them will ask for."""

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
            seed: Of the order of its rows.
            places: Where each row stands among the draws of all sources.
            batch_size: B, lanes of all processes.
            lanes: Where each lane of this process begins.
        """
        self.rows, self.places, self.batch_size, self.lanes = stream.endless(seed), places, batch_size, lanes
        self.pending = {b: {document for document, _ in state.pending} for b, state in lanes.items()}
        self.kept: dict[int, tuple[int, StreamedRow]] = {}
        self.lock, self.read = threading.Lock(), 0

    def get(self, number: int) -> tuple[int, StreamedRow]:
        """Epoch and row; each may be asked for once."""
        with self.lock:
            while number not in self.kept:
                row = next(self.rows)
                document, b = divmod(next(self.places), self.batch_size)
                state = self.lanes.get(b)
                if state is not None and (document >= state.next or document in self.pending[b]):
                    self.kept[self.read] = row
                self.read += 1
            return self.kept.pop(number)


class DocumentNames(Sequence[Any]):
    """What the numbers in a batch's `documents` stand for: each is an `Example`, or the name of one in a stream."""

    def __init__(self, sources: list[Documents]):
        self.sources = sources
        sizes = [0 if isinstance(source, Stream) else len(source) for source in sources]
        self.starts = [0, *itertools.accumulate(sizes)]
        self.streams = [i for i, source in enumerate(sources) if isinstance(source, Stream)]

    def number(self, source: int, number: int) -> int:
        """The number of a source's document among all."""
        if source in self.streams:  # of unknown length: they take turns behind the others
            return self.starts[-1] + number * len(self.streams) + self.streams.index(source)
        return self.starts[source] + number

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, number: Any) -> Any:
        number = int(number)
        if number >= self.starts[-1]:
            if not self.streams:
                raise IndexError(number)
            row, ordinal = divmod(number - self.starts[-1], len(self.streams))
            stream = self.sources[self.streams[ordinal]]
            assert isinstance(stream, Stream)
            return _Named(stream.row_name(row))
        source = next(i for i, end in enumerate(self.starts[1:]) if number < end)
        return self.sources[source][number - self.starts[source]]  # type: ignore[index]


class _Named(NamedTuple):
    name: str


def places_of(draws: grain.MapDataset, source: int) -> Iterator[int]:
    """Where the draws of one source stand among all."""
    return (place for place in itertools.count() if draws[place].source == source)
