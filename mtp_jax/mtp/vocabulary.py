"""Losses over the vocabulary, a chunk of rows at a time, so that memory never holds rows x vocabulary."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mtp_jax.sharding import parts_of


def over_chunks(f: Callable[[Any], tuple[Any, Any]], rows: Any, chunk: int) -> tuple[Any, Any]:
    """Apply `f` to chunks of rows: the total of its first result, and its second for all rows.

    Where there are several chunks, `f` is computed again in the backward pass, a chunk at a time.

    Args:
        f: from arrays [B, c, ...] to a tree of sums and a tree of arrays [B, c, ...]; rows of zeros must add nothing.
        rows: a tree of arrays [B, T, ...].
        chunk: about how many rows of each device are in a chunk.
    """
    B, T = jax.tree.leaves(rows)[0].shape[:2]
    c = min(T, max(1, chunk * parts_of("batch") // B))
    count = -(-T // c)

    def cut(leaf: Array) -> Array:  # chunks go along T, so that rows stay where the batch is sharded
        leaf = jnp.pad(leaf, [(0, 0), (0, count * c - T)] + [(0, 0)] * (leaf.ndim - 2))
        return jnp.moveaxis(leaf.reshape(B, count, c, *leaf.shape[2:]), 1, 0)

    chunks = jax.tree.map(cut, rows)
    first = jax.tree.map(lambda x: x[0], chunks)
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(f, first)[0])
    step = jax.checkpoint(f) if count > 1 else f

    def body(total: Any, part: Any) -> tuple[Any, Any]:
        sums, values = step(part)
        return jax.tree.map(jnp.add, total, sums), values

    total, values = jax.lax.scan(body, zero, chunks)
    join = lambda leaf: jnp.moveaxis(leaf, 0, 1).reshape(B, count * c, *leaf.shape[3:])[:, :T]  # noqa: E731
    return total, jax.tree.map(join, values)


def sum_over_chunks(f: Callable[[Any], Any], rows: Any, chunk: int) -> Any:
    """The total of `f` over chunks of rows; see `over_chunks`."""
    return over_chunks(lambda part: (f(part), None), rows, chunk)[0]


def cross_entropy(logits: Float[Array, "... V"], labels: Int[Array, "..."]) -> Float[Array, "..."]:
    """Cross-entropy of each row, in nats."""
    gold = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - gold


def cross_entropy_sums(
    logits: Float[Array, "B c V"], labels: Int[Array, "B c"], counted: Bool[Array, "B c"]
) -> dict[str, Float[Array, ""]]:
    """Sums over the counted rows: cross-entropy in nats, and how often the likeliest token is the label."""
    right = jnp.argmax(logits, axis=-1) == labels
    loss = jnp.sum(cross_entropy(logits, labels) * counted)
    return {"loss": loss, "accuracy": jnp.sum(right & counted).astype(jnp.float32)}


def divergence(kind: str, target: Float[Array, "... V"], logits: Float[Array, "... V"]) -> Float[Array, "..."]:
    """Distance of each row from a target distribution: "base_soft" KL(p || q) in nats, "total_variation" |p - q| / 2.

    Args:
        target: logits of p, the base model's.
        logits: logits of q.
    """
    log_p, log_q = jax.nn.log_softmax(target), jax.nn.log_softmax(logits)
    if kind == "base_soft":
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    return 0.5 * jnp.sum(jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)), axis=-1)
