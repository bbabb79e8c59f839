"""The tokens that training documents hold most often in their supervised parts, from a sample."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from mtp_jax.data.datasets import SourceDocuments
from mtp_jax.data.sources import ENOUGH_TOKENS, in_any_order, sample_of
from mtp_jax.data.tokens import Encoder


def frequent_tokens(
    sources: list[SourceDocuments], weights: list[float], tokenizer: Any, count: int, V: int, always: Sequence[int]
) -> Int[np.ndarray, " U"]:
    """The `count` tokens most frequent in training, as ascending ids; of equally frequent ones those of smaller ids.

    Of each source it counts up to 10,000 documents, spread evenly (1,000 at the beginning of a stream), or fewer that
    have 2 million tokens; sources count by their weights, which are shares of documents.

    Args:
        V: tokens that there are, `count` or more.
        always: ids that are among them whatever their frequency, `count` or fewer.
    Raises:
        UserError: documents that cannot be read, bad records that may not be skipped.
    """
    encode, frequency = Encoder(tokenizer), np.zeros(V)
    for source, weight in zip(sources, weights, strict=True):
        sample, counts, read, tokens = sample_of(source), np.zeros(V), 0, 0
        for number in in_any_order(sample):
            if tokens > ENOUGH_TOKENS:
                break
            encoded = encode(sample[number])
            np.add.at(counts, encoded.tokens[1:][encoded.supervised[1:]], 1)
            read, tokens = read + 1, tokens + len(encoded.tokens)
        frequency += weight / read * counts
    frequency[[token for token in always if 0 <= token < V]] = np.inf
    return np.sort(np.argsort(-frequency, kind="stable")[:count]).astype(np.int32)
