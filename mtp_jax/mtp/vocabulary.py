"""Losses over the vocabulary; callers take a chunk of rows at a time, so that memory never holds rows x vocabulary."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from mtp_jax.model.chunks import KEPT
from mtp_jax.model.geometry import Geometry
from mtp_jax.model.head import Head
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


def index_in(ids: Int[Array, " U"], tokens: Int[Array, "..."]) -> Int[Array, "..."]:
    """Where each token stands in ascending ids, -1 where it does not."""
    at = jnp.minimum(jnp.searchsorted(ids, tokens), len(ids) - 1)
    return jnp.where(ids[at] == tokens, at, -1)


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


def over_vocabulary(
    f: Callable[[Float[Array, "... V"], Any], tuple[Float[Array, "..."], Any]],
    latents: Float[Array, "... D"],
    head: Head,
    g: Geometry,
    rest: Any,
) -> tuple[Float[Array, "..."], Any]:
    """`f` of the logits of each row: a loss, and a tree without gradient; the loss has a gradient in `latents` alone.

    A row's loss depends on its own logits only, so its gradient, D numbers, is found while they are there. Reverse mode
    would compute the logits, the largest products of a step, once more.
    """

    @jax.custom_vjp
    def run(latents: Array, head: Head, rest: Any) -> Any:
        return f(head(latents, g), rest)

    def forward(latents: Array, head: Head, rest: Any) -> Any:
        loss, pull, others = jax.vjp(lambda z: f(head(z, g), rest), latents, has_aux=True)
        # The results are kept as well: whoever weighs a loss by them needs them in the backward pass.
        return checkpoint_name(((loss, others), pull(jnp.ones_like(loss))[0]), KEPT)

    def backward(slope: Array, cotangents: Any) -> tuple[Array, None, None]:
        return (slope * cotangents[0][..., None]).astype(slope.dtype), None, None

    run.defvjp(forward, backward)
    return run(latents, head, rest)
