"""Packing: whole documents side by side in sequences of T rows, with little padding."""

from typing import Any, Literal, NamedTuple

import numpy as np

from mtp_jax.errors import UserError
from mtp_jax.mtp.blocks import Anchors, add_blocks

Arrays = dict[str, np.ndarray]
TooLong = Literal["split", "cut", "drop"]

# Pieces to choose from. With 20,000 lengths drawn evenly from 1 to T, 2.8% of the rows are padding; with 32, 4.3%.
_CHOICE = 64
_FRUITLESS = 10_000  # consecutive documents with nothing to train on, before giving up


class Prepared(NamedTuple):
    """A document as it is packed."""

    pieces: list[Arrays]  # each of at most T rows, at least one of them supervised
    too_long: bool  # for one sequence


def prepare(rows: Arrays, length: int, too_long: TooLong) -> Prepared:
    """Divide a document's rows into pieces of at most `length`; a piece without a supervised row is dropped.

    Args:
        rows: [n] arrays, `supervised` among them. The last row has no label, so n = T + 1 fits.
        length: T.
        too_long: Whether a longer document is split into pieces, cut off, or dropped.
    """
    n = len(rows["supervised"])
    if fits := n <= length + 1:
        starts = range(min(n, 1))
    elif too_long == "drop":
        starts = range(0)
    else:
        starts = range(0, n if too_long == "split" else 1, length)
    pieces = [{name: values[start : start + length] for name, values in rows.items()} for start in starts]
    return Prepared([piece for piece in pieces if piece["supervised"].any()], not fits)


class LaneState(NamedTuple):
    """How far a lane is: all that its next sequences depend on."""

    next: int = 0  # number of the document that is read next
    pending: tuple[tuple[int, int], ...] = ()  # pieces not yet packed: document and place in it, oldest first
    too_long: int = 0  # documents so far that were longer than a sequence
    unused: int = 0  # documents so far that gave nothing to train on

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> "LaneState":
        """The inverse of `to_json`."""
        return cls(**{**state, "pending": tuple((document, place) for document, place in state["pending"])})

    def to_json(self) -> dict[str, Any]:
        """Numbers and lists of numbers."""
        return {**self._asdict(), "pending": [list(piece) for piece in self.pending]}


class Lane:
    """One of the batch's sequences, step after step: it packs documents of its own and depends on no other lane.

    The oldest piece comes first, then repeatedly the longest that still fits.
    """

    def __init__(self, documents: Any, length: int, anchors: Anchors | None, state: LaneState, ahead: Any):
        """
        Args:
            documents: A grain.MapDataset of `Prepared`, endless.
            length: T.
            anchors: What blocks a sequence gets; None for none.
            state: Where to continue.
            ahead: grain.ReadOptions.
        """
        self.length, self.anchors, self.state = length, anchors, state
        numbers = sorted({document for document, _ in state.pending})
        again = {number: documents[number].pieces for number in numbers}
        self.pending = [(document, place, again[document][place]) for document, place in state.pending]
        self.reader = iter(documents[state.next :].to_iter_dataset(ahead))

    def snapshot(self) -> LaneState:
        """The state after the last sequence that was taken."""
        return self.state._replace(pending=tuple((document, place) for document, place, _ in self.pending))

    def _refill(self) -> None:
        fruitless = 0
        while len(self.pending) < _CHOICE:
            prepared = next(self.reader)
            number, unused = self.state.next, not prepared.pieces
            self.pending += [(number, place, piece) for place, piece in enumerate(prepared.pieces)]
            self.state = self.state._replace(
                next=number + 1,
                too_long=self.state.too_long + prepared.too_long,
                unused=self.state.unused + unused,
            )
            fruitless = fruitless + 1 if unused else 0
            if fruitless == _FRUITLESS:
                raise UserError(
                    f"{_FRUITLESS:,} consecutive documents gave nothing to train on: they are longer than "
                    f"train.sequence_length={self.length} and data.too_long drops them, or none of their tokens is "
                    "supervised."
                )

    def take(self) -> Arrays:
        """The next sequence: [T] arrays."""
        chosen: list[Arrays] = []
        room = self.length
        while True:
            self._refill()
            sizes = [len(piece["supervised"]) for _, _, piece in self.pending]
            fitting = [i for i, size in enumerate(sizes) if size <= room]
            if not fitting:
                break
            place = max(fitting, key=sizes.__getitem__) if chosen else 0
            chosen.append(self.pending.pop(place)[2])
            room -= sizes[place]
        return join(chosen, self.length, self.anchors)


def join(pieces: list[Arrays], length: int, anchors: Anchors | None) -> Arrays:
    """Pieces side by side, numbered from 1 in `segments`, then padding; with blocks where they are wanted."""
    sizes = [len(piece["supervised"]) for piece in pieces]
    empty = (0, length - sum(sizes))
    rows = {name: np.pad(np.concatenate([piece[name] for piece in pieces]), empty) for name in pieces[0]}
    rows["segments"] = np.pad(np.repeat(np.arange(1, len(sizes) + 1, dtype=np.int32), sizes), empty)
    rows["positions"] = np.pad(np.concatenate([np.arange(size, dtype=np.int32) for size in sizes]), empty)
    if anchors is not None:
        add_blocks(rows, anchors)
    return rows
