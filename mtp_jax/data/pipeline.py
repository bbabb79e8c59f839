"""From documents to batches: tokenise, shuffle, mix, pack, batch; a grain pipeline with a checkpointable state."""

from collections.abc import Iterator
from typing import Any, NamedTuple, NotRequired, TypedDict

import grain
import numpy as np

from mtp_jax.data.encoding import Encoder
from mtp_jax.data.examples import Example
from mtp_jax.mtp.blocks import choose_anchors, hash_positions


class Anchors(NamedTuple):
    """How many blocks of masks stand in a sequence: `count`, chosen by hash, or one behind every row (None)."""

    count: int | None
    seed: int


class Batch(TypedDict):
    """Packed rows: `segments` numbers the documents of a sequence from 1, 0 is padding; positions restart with each."""

    tokens: np.ndarray  # [B, T] int32
    labels: np.ndarray  # [B, T] int32, the next token of the same document
    supervised: np.ndarray  # [B, T] bool, whether there is a label and it is to be predicted
    positions: np.ndarray  # [B, T] int32
    segments: np.ndarray  # [B, T] int32
    documents: np.ndarray  # [B, T] int32, which document a token is from
    anchors: NotRequired[np.ndarray]  # [B, G] int32, rows with a block of masks behind them; -1 for none


class Tokenize(grain.transforms.MapWithIndex):
    """Document number -> its tokens, and which of them are to be predicted."""

    def __init__(self, documents: list[Example], tokenizer: Any, anchors: Anchors | None, epoch_length: int):
        self.documents, self.encode = documents, Encoder(tokenizer)
        self.anchors, self.epoch_length = anchors, epoch_length

    def map_with_index(self, index: int, element: int) -> dict[str, np.ndarray]:
        document = self.documents[element]
        encoded = self.encode(document)
        n = len(encoded.tokens)
        features = {
            "tokens": encoded.tokens,
            "supervised": encoded.supervised,
            "documents": np.full(n, element, np.int32),
        }
        if self.anchors is not None:
            epoch, example = index // self.epoch_length, int(document.draw * 2**63)
            features["hashes"] = hash_positions(self.anchors.seed, epoch, example, np.arange(n))
        return features


class Label(grain.transforms.Map):
    """Shift a packed sequence of T+1 tokens into T rows with labels that never cross a document's end; add anchors."""

    def __init__(self, anchors: Anchors | None):
        self.anchors = anchors

    def map(self, packed: dict[str, np.ndarray]) -> Batch:
        segments = packed["tokens_segment_ids"]
        rows: Batch = {
            "tokens": packed["tokens"][:-1],
            "labels": packed["tokens"][1:],
            "supervised": (segments[:-1] == segments[1:]) & (segments[1:] != 0) & packed["supervised"][1:],
            "positions": packed["tokens_positions"][:-1],
            "segments": segments[:-1],
            "documents": packed["documents"][:-1],
        }
        if self.anchors is not None:
            hashes = packed["hashes"][:-1]
            rows["anchors"] = choose_anchors(hashes, rows["supervised"], rows["segments"], self.anchors.count)
        return rows


def _pack(dataset: grain.MapDataset, sequence_length: int, anchors: Anchors | None) -> grain.IterDataset:
    # Reading ahead in threads keeps the order, so the iterator's state stays exact.
    ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)
    rows = dataset.to_iter_dataset(ahead)
    features = ("tokens", "supervised", "documents") + (() if anchors is None else ("hashes",))
    length = dict.fromkeys(features, sequence_length + 1)
    return grain.experimental.ConcatThenSplitIterDataset(rows, length_struct=length).map(Label(anchors))


def training_batches(
    sources: list[list[Example]],
    weights: list[float],
    tokenizer: Any,
    batch_size: int,
    sequence_length: int,
    seed: int,
    anchors: Anchors | None = None,
) -> tuple[grain.DatasetIterator, list[Example]]:
    """An endless iterator of batches, and the documents that their `documents` field numbers.

    Each source is shuffled anew in every epoch; documents of the sources alternate in proportion to the weights.
    The iterator's state is a few numbers, and restoring it continues with the very next batch.
    """
    documents = [document for source in sources for document in source]
    parts, start = [], 0
    for i, source in enumerate(sources):
        numbers = list(range(start, start + len(source)))
        read = Tokenize(documents, tokenizer, anchors, len(source))
        shuffled = grain.MapDataset.source(numbers).seed(seed + i).shuffle().repeat()
        parts.append(shuffled.map_with_index(read))
        start += len(source)
    mixed = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights)
    batches = _pack(mixed, sequence_length, anchors).batch(batch_size, drop_remainder=True)
    return iter(batches), documents


def merge_states(states: list[dict[str, Any]]) -> dict[str, Any]:
    """One state of the iterator from those that several processes saved; each draws the whole batch."""
    return states[0]


def held_out_batches(
    documents: list[Example],
    tokenizer: Any,
    batch_size: int,
    sequence_length: int,
    limit: int | None = None,
    anchors: Anchors | None = None,
) -> Iterator[Batch]:
    """Every held-out document once, in order of name; the last batch is filled up with padding rows."""
    ordered = sorted(documents, key=lambda document: document.name)
    read = Tokenize(ordered, tokenizer, anchors, len(ordered))
    numbers = grain.MapDataset.source(list(range(len(ordered))))
    rows = _pack(numbers.map_with_index(read), sequence_length, anchors)
    for number, batch in enumerate(rows.batch(batch_size, drop_remainder=False)):
        if number == limit:
            return
        short = batch_size - len(batch["tokens"])
        fill = {"anchors": -1}
        yield {  # type: ignore[misc]
            key: np.pad(value, ((0, short), (0, 0)), constant_values=fill.get(key, 0)) for key, value in batch.items()
        }
