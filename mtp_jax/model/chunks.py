"""Arrays that are worked through a chunk at a time, so that memory never holds what all of them would need at once.

Chunks go along the second axis: the first is the batch, which stays where it is sharded.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

KEPT = "kept"  # the name of what the backward pass of a chunk is to keep, in place of computing it again


def cut(tree: Any, chunk: int) -> Any:
    """A tree of arrays [B, T, ...] as [chunks, B, chunk, ...], filled up with zeros."""

    def pieces(leaf: Array) -> Array:
        B, T = leaf.shape[:2]
        count = -(-T // chunk)
        leaf = jnp.pad(leaf, [(0, 0), (0, count * chunk - T)] + [(0, 0)] * (leaf.ndim - 2))
        return jnp.moveaxis(leaf.reshape(B, count, chunk, *leaf.shape[2:]), 1, 0)

    return jax.tree.map(pieces, tree)


def join(tree: Any, T: int) -> Any:
    """The inverse of `cut`: arrays [B, T, ...]."""

    def whole(leaf: Array) -> Array:
        count, B, chunk = leaf.shape[:3]
        return jnp.moveaxis(leaf, 0, 1).reshape(B, count * chunk, *leaf.shape[3:])[:, :T]

    return jax.tree.map(whole, tree)


def total(f: Callable[[Any], tuple[Any, Any]], chunks: Any) -> tuple[Any, Any]:
    """The sum over chunks of `f`'s first result, and its second results stacked."""
    first = jax.tree.map(lambda x: x[0], chunks)
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(f, first)[0])

    def body(sums: Any, chunk: Any) -> tuple[Any, Any]:
        more, values = f(chunk)
        return jax.tree.map(jnp.add, sums, more), values

    return jax.lax.scan(body, zero, chunks)


def over_chunks(f: Callable[[Any], tuple[Any, Any]], tree: Any, chunk: int) -> tuple[Any, Any]:
    """Apply `f` to chunks: the sum of its first result, and its second joined.

    Where there are several chunks, `f` is computed again in the backward pass, a chunk at a time, but for what has the
    name KEPT (`jax.ad_checkpoint.checkpoint_name`).

    Args:
        f: from arrays [B, chunk, ...] to a tree of sums and a tree of arrays [B, chunk, ...]; zeros must add nothing.
        tree: of arrays [B, T, ...].
    """
    T = jax.tree.leaves(tree)[0].shape[1]
    chunk = min(chunk, T)
    again = jax.checkpoint(f, policy=jax.checkpoint_policies.save_only_these_names(KEPT))
    sums, values = total(again if chunk < T else f, cut(tree, chunk))
    return sums, join(values, T)


def sum_over_chunks(f: Callable[[Any], Any], tree: Any, chunk: int) -> Any:
    """The sum of `f` over chunks; see `over_chunks`."""
    return over_chunks(lambda part: (f(part), ()), tree, chunk)[0]


def map_chunks(f: Callable[[Any], Any], tree: Any, chunk: int) -> Any:
    """`f`, which acts on each entry of the second axis alone, applied to chunks; see `over_chunks`."""
    if chunk >= jax.tree.leaves(tree)[0].shape[1]:
        return f(tree)
    return over_chunks(lambda part: ((), f(part)), tree, chunk)[1]
