"""From documents to batches: tokenise, shuffle, mix, pack, batch; a grain pipeline with a checkpointable state."""

from collections.abc import Iterator
from typing import Any, TypedDict

import grain
import numpy as np

from mtp_jax.data.sources import Document


class Batch(TypedDict):
    """Packed rows: `segments` numbers the documents of a sequence from 1, 0 is padding; positions restart with each."""

    tokens: np.ndarray  # [B, T] int32
    labels: np.ndarray  # [B, T] int32, the next token of the same document
    supervised: np.ndarray  # [B, T] bool, whether there is a label
    positions: np.ndarray  # [B, T] int32
    segments: np.ndarray  # [B, T] int32
    documents: np.ndarray  # [B, T] int32, which document a token is from


class Tokenize(grain.transforms.Map):
    """Document number -> its tokens, from the tokenizer's own start to an end-of-text token."""

    def __init__(self, documents: list[Document], tokenizer: Any):
        self.documents, self.tokenizer = documents, tokenizer

    def map(self, element: int) -> dict[str, np.ndarray]:
        ids = self.tokenizer(self.documents[element].text(), verbose=False)["input_ids"]
        if (end := self.tokenizer.eos_token_id) is not None:
            ids = [*ids, end]
        return {"tokens": np.asarray(ids, np.int32), "documents": np.full(len(ids), element, np.int32)}


def _label(packed: dict[str, np.ndarray]) -> Batch:
    """Shift a packed sequence of T+1 tokens into T rows with labels that never cross a document's end."""
    segments = packed["tokens_segment_ids"]
    return {
        "tokens": packed["tokens"][:-1],
        "labels": packed["tokens"][1:],
        "supervised": (segments[:-1] == segments[1:]) & (segments[1:] != 0),
        "positions": packed["tokens_positions"][:-1],
        "segments": segments[:-1],
        "documents": packed["documents"][:-1],
    }


def _pack(dataset: grain.MapDataset, sequence_length: int) -> grain.IterDataset:
    # Reading ahead in threads keeps the order, so the iterator's state stays exact.
    ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)
    rows = dataset.to_iter_dataset(ahead)
    length = {"tokens": sequence_length + 1, "documents": sequence_length + 1}
    return grain.experimental.ConcatThenSplitIterDataset(rows, length_struct=length).map(_label)


def training_batches(
    sources: list[list[Document]],
    weights: list[float],
    tokenizer: Any,
    batch_size: int,
    sequence_length: int,
    seed: int,
) -> tuple[grain.DatasetIterator, list[Document]]:
    """An endless iterator of batches, and the documents that their `documents` field numbers.

    Each source is shuffled anew in every epoch; documents of the sources alternate in proportion to the weights.
    The iterator's state is a few numbers, and restoring it continues with the very next batch.
    """
    documents = [document for source in sources for document in source]
    read = Tokenize(documents, tokenizer)
    parts, start = [], 0
    for i, source in enumerate(sources):
        numbers = list(range(start, start + len(source)))
        parts.append(grain.MapDataset.source(numbers).seed(seed + i).shuffle().repeat().map(read))
        start += len(source)
    mixed = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights)
    batches = _pack(mixed, sequence_length).batch(batch_size, drop_remainder=True)
    return iter(batches), documents


def held_out_batches(
    documents: list[Document], tokenizer: Any, batch_size: int, sequence_length: int, limit: int | None = None
) -> Iterator[Batch]:
    """Every held-out document once, in order of name; the last batch is filled up with padding rows."""
    ordered = sorted(documents, key=lambda document: document.name)
    read = Tokenize(ordered, tokenizer)
    rows = _pack(grain.MapDataset.source(list(range(len(ordered)))).map(read), sequence_length)
    for number, batch in enumerate(rows.batch(batch_size, drop_remainder=False)):
        if number == limit:
            return
        short = batch_size - len(batch["tokens"])
        yield {key: np.pad(value, ((0, short), (0, 0))) for key, value in batch.items()}  # type: ignore[misc]
