"""Losses over the vocabulary; callers take a chunk of rows at a time, so that memory never holds rows x vocabulary."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mtp_jax.sharding import parts_of


def rows_at_a_time(rows: int, batch: int) -> int:
    """How many rows of each sequence make about `rows` on each device."""
    return max(1, rows * parts_of("batch") // batch)


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
