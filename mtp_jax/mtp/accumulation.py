"""Sums over chunks of blocks whose gradient is taken chunk by chunk, so that memory never holds all mask rows.

Blocks of masks are independent of one another given the real rows' keys and values. Reverse mode would first run all
chunks forward and then each again; where the loss is a sum, its gradient can be summed beside it in one pass.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Share = Callable[[Any, Any, Any], tuple[Float[Array, ""], Any]]


def cut(rows: Any, chunk: int) -> Any:
    """A tree of arrays [B, G, ...] as [chunks, B, chunk, ...], filled up with zeros."""

    def pieces(leaf: Array) -> Array:
        B, G = leaf.shape[:2]
        count = -(-G // chunk)
        leaf = jnp.pad(leaf, [(0, 0), (0, count * chunk - G)] + [(0, 0)] * (leaf.ndim - 2))
        return jnp.moveaxis(leaf.reshape(B, count, chunk, *leaf.shape[2:]), 1, 0)

    return jax.tree.map(pieces, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def accumulated(
    share: Share, placed: Callable[[Any], Any], trained: Any, rest: Any, chunks: Any
) -> tuple[Float[Array, ""], Any]:
    """The total of `share(trained, rest, chunk)`, a scalar and a tree of sums, over all chunks.

    Only the scalar has a gradient, and it has one only in `trained`; that is summed in the dtype of `trained`, float32.

    Args:
        placed: puts a tree like `trained` where its leaves are to lie, or each device would hold all of the gradient.
    """
    return _total(lambda chunk: share(trained, rest, chunk), chunks)


def _forward(share: Share, placed: Callable[[Any], Any], trained: Any, rest: Any, chunks: Any) -> tuple[Any, Any]:
    def with_gradient(chunk: Any) -> tuple[Any, Any]:
        values, gradient = jax.value_and_grad(share, has_aux=True)(trained, rest, chunk)
        return values, placed(gradient)

    return _total(with_gradient, chunks)


def _backward(share: Share, placed: Callable[[Any], Any], gradient: Any, cotangents: Any) -> tuple[Any, None, None]:
    return jax.tree.map(lambda g: g * cotangents[0].astype(g.dtype), gradient), None, None


def _total(f: Callable[[Any], Any], chunks: Any) -> Any:
    shapes = jax.eval_shape(f, jax.tree.map(lambda x: x[0], chunks))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(lambda total, chunk: (jax.tree.map(jnp.add, total, f(chunk)), None), zero, chunks)[0]


accumulated.defvjp(_forward, _backward)
