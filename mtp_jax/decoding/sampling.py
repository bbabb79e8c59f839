"""Lossless speculative sampling: what is emitted is distributed as if the base model had been sampled token by token.

Each draft s was drawn from a known distribution q (one point of mass 1 for greedy drafts) and is accepted with
probability min(1, p(s) / q(s)), p being the base model's distribution after temperature, top-k and top-p. The first one
rejected is replaced by a draw from the residual (p - q)+, normalised (docs/how-it-works.md, section 7.3).
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


@dataclass(frozen=True)
class SamplingKind:
    """What of sampling is compiled in; the numbers are run-time values."""

    truncated: bool  # top-k or top-p is set
    sampled_drafts: bool  # drafts are drawn from the sampler head, not its likeliest tokens


class Tempering(NamedTuple):
    """How a distribution is made from logits, in this order."""

    temperature: Float[Array, ""]  # above 0
    top_k: Int[Array, ""]  # V for all
    top_p: Float[Array, ""]  # 1 for all


class Proposal(NamedTuple):
    """The distribution that each draft was drawn from, over C candidate tokens; the rest have probability 0."""

    ids: Int[Array, "B d C"]
    probabilities: Float[Array, "B d C"]


def likeliest(logits: Float[Array, "... V"]) -> Int[Array, "..."]:
    """Greedy choice: the first index of the largest logit; in two passes, which CPUs do faster than an argmax."""
    V = logits.shape[-1]
    top = jnp.max(logits, axis=-1, keepdims=True)
    first = jnp.min(jnp.where(logits == top, jnp.arange(V), V), axis=-1)
    return jnp.minimum(first, V - 1)  # V where a logit is not a number


def distribution(logits: Float[Array, "... V"], how: Tempering, truncated: bool) -> Float[Array, "... V"]:
    """Tempered probabilities, float32.

    top-p keeps the smallest set of likeliest tokens, among those that top-k left, whose probability reaches it.
    """
    logits = logits.astype(jnp.float32)
    # Differences from the best one: temperatures near 0 must not make all of them infinite.
    temperature = jnp.maximum(how.temperature, jnp.finfo(jnp.float32).tiny)
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    if truncated:
        ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
        first = jnp.arange(ordered.shape[-1]) < how.top_k
        share = jax.nn.softmax(jnp.where(first, ordered, -jnp.inf), axis=-1)
        kept = first & (jnp.cumsum(share, axis=-1) - share < how.top_p)
        lowest = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= lowest, logits, -jnp.inf)
    return jax.nn.softmax(logits, axis=-1)


def verify(
    p: Float[Array, "B R V"],
    drafts: Int[Array, "B d"],
    valid: Int[Array, " B"],
    q: Proposal,
    keys: Key[Array, " B"],
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """How many drafts are accepted, and the token behind them.

    Args:
        p: the base model's distribution at each real row; row i judges draft i, R = d + 1.
        valid: how many of the drafts there are.
    """
    d = drafts.shape[1]
    accept_keys, draw_keys = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, 2))(keys), 1, 0)
    here = jnp.take_along_axis(p[:, :d], drafts[..., None], axis=-1)[..., 0]
    there = jnp.sum(jnp.where(q.ids == drafts[..., None], q.probabilities, 0.0), axis=-1)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (d,)))(accept_keys)
    accept = (uniform * there < here) & (jnp.arange(d) < valid[:, None])
    accepted = prefix(accept)
    left = jnp.take_along_axis(p, accepted[:, None, None], axis=1)[:, 0]
    if d:
        at = jnp.minimum(accepted, d - 1)[:, None, None]
        ids = jnp.take_along_axis(q.ids, at, axis=1)[:, 0]
        mass = jnp.take_along_axis(q.probabilities, at, axis=1)[:, 0]
        left = jnp.where((accepted < valid)[:, None], residual(left, ids, mass), left)
    return accepted, draw(left, draw_keys)


def prefix(right: Bool[Array, "B d"]) -> Int[Array, " B"]:
    """How many drafts are right up to the first that is not: what follows that one was conditioned on it."""
    return jnp.sum(jnp.cumprod(right, axis=1), axis=1)


def residual(p: Float[Array, "B V"], ids: Int[Array, "B C"], mass: Float[Array, "B C"]) -> Float[Array, "B V"]:
    """(p - q)+, not normalised; p itself where it is zero, which takes p and q equal up to rounding."""
    left = jnp.maximum(p.at[jnp.arange(len(p))[:, None], ids].add(-mass), 0.0)
    return jnp.where(jnp.sum(left, axis=-1, keepdims=True) > 0, left, p)


def draw(
    probabilities: Float[Array, "B C"], keys: Key[Array, " B"], ids: Int[Array, "B C"] | None = None
) -> Int[Array, " B"]:
    """The index of one token for each row, from probabilities that need not add up to 1.

    Args:
        ids: the tokens, where they are not all in order. What is drawn does not depend on their order.
    """
    if ids is None:
        return jax.vmap(jax.random.categorical)(keys, jnp.log(probabilities))
    noise = jax.vmap(jax.vmap(lambda key, token: jax.random.gumbel(jax.random.fold_in(key, token)), (None, 0)))
    return jnp.argmax(jnp.log(probabilities) + noise(keys, ids), axis=-1)
