"""Losses over the vocabulary, a chunk of rows at a time, so that memory never holds rows x vocabulary."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def sum_over_chunks(f: Callable[[Any], Any], rows: Any, chunk: int) -> Any:
    """The sum of `f` over chunks of rows; `f` is computed again in the backward pass, a chunk at a time.

    Args:
        f: from arrays [B, c, ...] to a tree of sums; rows of zeros must add nothing to them.
        rows: a tree of arrays [B, T, ...].
        chunk: about how many rows, over the whole batch, are in a chunk.
    """
    B, T = jax.tree.leaves(rows)[0].shape[:2]
    c = min(T, max(1, chunk // B))
    count = -(-T // c)

    def cut(leaf: Array) -> Array:  # chunks go along T, so that rows stay where the batch is sharded
        leaf = jnp.pad(leaf, [(0, 0), (0, count * c - T)] + [(0, 0)] * (leaf.ndim - 2))
        return jnp.moveaxis(leaf.reshape(B, count, c, *leaf.shape[2:]), 1, 0)

    chunks = jax.tree.map(cut, rows)
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(f, jax.tree.map(lambda x: x[0], chunks)))
    step = jax.checkpoint(f)
    total, _ = jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, step(part)), None), zero, chunks)
    return total


def cross_entropy_sums(
    logits: Float[Array, "B c V"], labels: Int[Array, "B c"], counted: Bool[Array, "B c"]
) -> dict[str, Float[Array, ""]]:
    """Sums over the counted rows: cross-entropy in nats, and how often the likeliest token is the label."""
    gold = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    loss = jax.nn.logsumexp(logits, axis=-1) - gold
    right = jnp.argmax(logits, axis=-1) == labels
    return {"loss": jnp.sum(loss * counted), "accuracy": jnp.sum(right & counted).astype(jnp.float32)}
