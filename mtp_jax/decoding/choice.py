"""Greedy choice."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mtp_jax.model.products import largest


def likeliest(logits: Float[Array, "... V"], in_cpp: bool = False) -> Int[Array, "..."]:
    """The first index of the largest logit; in two passes, which CPUs do faster than an argmax of pairs."""
    if in_cpp:
        return largest(logits, 1)[..., 0]
    V = logits.shape[-1]
    top = jnp.max(logits, axis=-1, keepdims=True)
    first = jnp.min(jnp.where(logits == top, jnp.arange(V), V), axis=-1)
    return jnp.minimum(first, V - 1)  # V where a logit is not a number
