"""The projections of a layer: a frozen matrix, and beside it the adapter's low-rank pair for the rows that meet it."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from mtp_jax.sharding import place


class Matrices(NamedTuple):
    """What a projection multiplies with, gathered from the devices that hold its parts."""

    kernel: Num[Array, "in out"]
    bias: Float[Array, " out"] | None
    scale: Float[Array, " out"] | None  # of a kernel of whole numbers
    lora: tuple[Float[Array, "in R"], Float[Array, "R out"]] | None

    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        """y = x W (+ b) (+ (x A) B), in the dtype of x."""
        y = product(x, self.kernel, self.scale)
        if self.bias is not None:
            y = y + self.bias
        if self.lora is not None:
            a, b = self.lora
            y = y + low_rank(x, a.astype(x.dtype), b.astype(x.dtype))
        return y


def product(
    x: Float[Array, "... in"], kernel: Num[Array, "in out"], scale: Float[Array, " out"] | None
) -> Float[Array, "... out"]:
    """x W in the dtype of x; W may be whole numbers, of which each column has a scale."""
    y = x @ kernel.astype(x.dtype)
    return y if scale is None else (y * scale).astype(x.dtype)


class Projection(nn.Module):
    """y = x W (+ b), in the dtype of x; for adapted rows y + (x A) B, where the `lora` collection holds A and B.

    `axes` are the logical axes that stay spread while it is used: those of the tensor axis.
    """

    features: int
    bias: bool = False
    int8: bool = False
    axes: tuple[str | None, str | None] = (None, None)

    @nn.compact
    def matrices(self, width: int, dtype: DTypeLike, adapted: bool = False, gather: bool = True) -> Matrices:
        """The matrices for rows so wide.

        Without `gather` the compiler may move the rows to the weights' parts: right for the few rows of decoding.
        """
        row, column = self.axes
        kernel = self.param("kernel", nn.initializers.zeros, (width, self.features))
        bias, scale, lora = None, None, None
        if self.int8:
            scale = self.param("kernel_scale", nn.initializers.zeros, (self.features,))
        else:
            kernel = kernel.astype(dtype)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(dtype)
        if adapted and self.has_variable("lora", "a"):
            a, b = self.get_variable("lora", "a"), self.get_variable("lora", "b")
            lora = place(a, row, None), place(b, None, column)
        return Matrices(place(kernel, row, column) if gather else kernel, bias, scale, lora)

    def __call__(
        self, x: Float[Array, "... in"], adapted: bool = False, gather: bool = True
    ) -> Float[Array, "... out"]:
        return self.matrices(x.shape[-1], x.dtype, adapted, gather)(x)


@jax.custom_vjp
def low_rank(x: Float[Array, "... in"], a: Float[Array, "in R"], b: Float[Array, "R out"]) -> Float[Array, "... out"]:
    """(x A) B. Its backward pass transposes only arrays of width R, where autodiff would transpose full rows."""
    return (x @ a) @ b


def _low_rank_forward(x: Array, a: Array, b: Array) -> tuple[Array, tuple[Array, ...]]:
    inner = x @ a
    return inner @ b, (x, a, b, inner)


def _low_rank_backward(saved: tuple[Array, ...], dy: Float[Array, "... out"]) -> tuple[Array, Array, Array]:
    x, a, b, inner = saved
    d_inner = dy @ b.T
    d_a = jnp.einsum("...r,...i->ri", d_inner, x).T
    d_b = jnp.einsum("...r,...o->ro", inner, dy)
    return d_inner @ a.T, d_a, d_b


low_rank.defvjp(_low_rank_forward, _low_rank_backward)
