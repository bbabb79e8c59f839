"""Prompt lookup: drafts are what followed the last tokens of the text where they stood in it before."""

import jax.numpy as jnp
from jaxtyping import Array, Int

_LONGEST = 3  # tokens that are searched for


def look_up(tokens: Int[Array, "B S"], length: Int[Array, " B"], d: int) -> tuple[Int[Array, "B d"], Int[Array, " B"]]:
    """What followed an earlier occurrence of the last three tokens, of the last two, or of the last one.

    Of several occurrences it takes the latest that d tokens follow, or else the one that most tokens follow.

    Args:
        tokens: texts, `length` tokens of each; what is beyond has no meaning.

    Returns:
        The tokens, and how many of them there are: fewer than d near the end of a text, none without an occurrence.
    """
    S = tokens.shape[1]
    slots = jnp.arange(S)
    same, matched = jnp.ones_like(tokens, bool), jnp.zeros_like(tokens)
    for n in range(1, _LONGEST + 1):  # matched: how many of the last tokens also stand right before each slot
        last = jnp.take_along_axis(tokens, jnp.maximum(length - n, 0)[:, None], axis=1)
        same &= (jnp.roll(tokens, n, axis=1) == last) & (slots >= n)
        matched += same
    follow = jnp.clip(length[:, None] - slots, 0, d)
    rank = jnp.where((matched > 0) & (follow > 0), matched * (d + 1) + follow, 0)
    start = S - 1 - jnp.argmax(rank[:, ::-1], axis=1, keepdims=True)  # the latest of the best
    found = jnp.take_along_axis(rank, start, axis=1) > 0
    count = jnp.where(found, jnp.take_along_axis(follow, start, axis=1), 0)[:, 0]
    return jnp.take_along_axis(tokens, jnp.minimum(start + jnp.arange(d), S - 1), axis=1), count
