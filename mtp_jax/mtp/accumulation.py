"""Sums over chunks of blocks whose gradient is taken chunk by chunk, so that memory never holds all mask rows.

Blocks of masks are independent of one another given the real rows' keys and values. Reverse mode would first run all
chunks forward and then each again; where the loss is a sum, its gradient can be summed beside it in one pass.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from mtp_jax.model.chunks import total

Share = Callable[[Any, Any, Any], tuple[Float[Array, ""], Any]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def accumulated(
    share: Share, placed: Callable[[Any], Any], trained: Any, rest: Any, chunks: Any
) -> tuple[Float[Array, ""], Any]:
    """The total of `share(trained, rest, chunk)`, a scalar and a tree of sums, over all chunks.

    Only the scalar has a gradient, and it has one only in `trained`; that is summed in the dtype of `trained`, float32.

    Args:
        placed: puts a tree like `trained` where its leaves are to lie, or each device would hold all of the gradient.
    """
    return total(lambda chunk: (share(trained, rest, chunk), ()), chunks)[0]


def _forward(share: Share, placed: Callable[[Any], Any], trained: Any, rest: Any, chunks: Any) -> tuple[Any, Any]:
    def with_gradient(chunk: Any) -> tuple[Any, Any]:
        values, gradient = jax.value_and_grad(share, has_aux=True)(trained, rest, chunk)
        return (values, placed(gradient)), ()

    return total(with_gradient, chunks)[0]


def _backward(share: Share, placed: Callable[[Any], Any], gradient: Any, cotangents: Any) -> tuple[Any, None, None]:
    return jax.tree.map(lambda g: g * cotangents[0].astype(g.dtype), gradient), None, None


accumulated.defvjp(_forward, _backward)
