"""Datasets that are read in order, without being stored or looked up: rows arrive while training runs."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from mtp_jax.data.examples import Content, Example
from mtp_jax.errors import UserError

_SHUFFLED = 1000  # rows that are held to change their order
_HEAD = 10_000  # rows at the beginning that are looked at for held-out ones


class StreamedRow(Example):
    """One row of a stream, held until it is used."""

    __slots__ = ("name", "number", "row", "to_content")

    def __init__(self, stream: "Stream", number: int, row: dict[str, Any]):
        self.name, self.number, self.row, self.to_content = stream.row_name(number), number, row, stream.to_content

    def content(self) -> Content:
        return self.to_content(self.row, self.name)


class Stream:
    """Rows in a fixed order, numbered from 0. Those that the hash of their name holds out are passed over."""

    def __init__(
        self,
        opened: Callable[[], Iterable[dict[str, Any]]],
        name: str,
        to_content: Callable[[dict[str, Any], str], Content],
        held_out: float = 0.0,
    ):
        """`opened` gives the rows from the first on, to each reader its own."""
        self.opened, self.name, self.to_content, self.held_out = opened, name, to_content, held_out

    def row_name(self, number: int) -> str:
        """Independent of the machine."""
        return f"{self.name}#{number}"

    def __iter__(self) -> Iterator[StreamedRow]:
        """The rows to be trained on, once; raises UserError where one cannot be read."""
        return (row for row in self._rows() if row.draw >= self.held_out)

    def _rows(self) -> Iterator[StreamedRow]:
        number, rows = 0, iter(self.opened())
        while True:
            try:
                row = next(rows, None)
            except Exception as error:  # of the network, or of a file
                reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
                raise UserError(f"{self.name}: cannot be read behind row {number} ({reason}).") from error
            if row is None:
                return
            yield StreamedRow(self, number, row)
            number += 1

    def split(self, held_out: float) -> tuple["Stream", list[Example]]:
        """The stream without its held-out rows, and those of them that stand near its beginning."""
        stream = Stream(self.opened, self.name, self.to_content, held_out)
        head = itertools.islice(self._rows(), _HEAD if held_out else 0)
        return stream, [row for row in head if row.draw < held_out]

    def endless(self, seed: int) -> Iterator[tuple[int, StreamedRow]]:
        """Epoch after epoch, each in an order of its own, as far as a buffer of rows can change it."""
        for epoch in itertools.count():
            draw, held = np.random.default_rng((seed, epoch)), []
            for row in self:
                if len(held) < _SHUFFLED:
                    held.append(row)
                    continue
                place = int(draw.integers(_SHUFFLED))
                yield epoch, held[place]
                held[place] = row
            if not held:
                raise UserError(f"{self.name}: no row is left to train on.")
            for place in draw.permutation(len(held)):
                yield epoch, held[place]


Documents = Sequence[Example] | Stream  # what is trained on, of one source
