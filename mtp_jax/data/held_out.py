"""Held-out documents: batches that go through all of them once, and prompts cut from them."""

from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from mtp_jax.data.batches import Batch, DocumentRows
from mtp_jax.data.documents import Document
from mtp_jax.data.packing import Arrays
from mtp_jax.data.tokens import Encoder
from mtp_jax.mtp.blocks import Anchors, add_blocks


class _Windows(grain.transforms.Map):
    """A window of T+1 tokens as T rows, of which only those inside a document are supervised; adds anchors."""

    def __init__(self, anchors: Anchors | None):
        self.anchors = anchors

    def map(self, packed: Arrays) -> Arrays:
        segments, last = packed["tokens_segment_ids"], slice(None, -1)
        inside = (segments[:-1] == segments[1:]) & (segments[1:] != 0)
        rows: Arrays = {
            "tokens": packed["tokens"][last],
            "labels": packed["labels"][last],
            "supervised": inside & packed["supervised"][last],
            "positions": packed["tokens_positions"][last],
            "segments": segments[last],
            "documents": packed["documents"][last],
        }
        if self.anchors is not None:
            rows["hashes"] = packed["hashes"][last]
            add_blocks(rows, self.anchors)
        return rows


def held_out_batches(
    documents: Sequence[Document],
    tokenizer: Any,
    batch_size: int,
    sequence_length: int,
    limit: int | None = None,
    anchors: Anchors | None = None,
    *,
    sequences: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Every held-out document once, in order of name, cut into windows; the last batch is filled up with padding.

    Each process goes through all of them and takes its `sequences` of every batch (None for all).
    """
    ordered, encode = sorted(documents, key=lambda document: document.name), DocumentRows(tokenizer, anchors)
    numbers = grain.MapDataset.range(len(ordered)).map(lambda number: encode(ordered[number], number, 0))
    names = ("tokens", "labels", "supervised", "documents") + (() if anchors is None else ("hashes",))
    ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)
    windows = grain.experimental.ConcatThenSplitIterDataset(
        numbers.to_iter_dataset(ahead), length_struct=dict.fromkeys(names, sequence_length + 1)
    ).map(_Windows(anchors))
    part = slice(None) if sequences is None else np.asarray(sequences)
    for number, batch in enumerate(windows.batch(batch_size, drop_remainder=False)):
        if number == limit:
            return
        short = batch_size - len(batch["tokens"])
        fill = {"anchors": -1}
        yield {  # type: ignore[misc]
            key: np.pad(value, ((0, short), *((0, 0),) * (value.ndim - 1)), constant_values=fill.get(key, 0))[part]
            for key, value in batch.items()
        }


def held_out_prompts(documents: Sequence[Document], tokenizer: Any, count: int, length: int) -> list[list[int]]:
    """`count` prompts of `length` tokens from held-out documents, one each, or as many as there are.

    Each ends before a supervised token; a hash of the document's name chooses which.
    """
    encode, prompts = Encoder(tokenizer), []
    for document in sorted(documents, key=lambda document: document.draw):
        tokens, supervised, _ = encode(document)
        ends = length + np.flatnonzero(supervised[length:])
        if len(ends) > length:
            end = ends[int(document.draw * 1e9) % len(ends)]
            prompts.append(tokens[end - length : end].tolist())
        if len(prompts) == count:
            break
    return prompts
