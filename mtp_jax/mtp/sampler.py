"""The sampler head: corrects a mask row's latent for the token chosen just before (docs/how-it-works.md, section 5).

It draws nothing: sampling is in `mtp_jax/decoding/sampling.py`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from mtp_jax.model.weights import Params, Weight

_EPSILON = 1e-5


def sampler_table(D: int) -> tuple[Weight, ...]:
    """MLP = (Linear -> SiLU -> LayerNorm) x 2, of sizes 2D -> D -> D [paper, section 3]."""
    table = []
    for i, width in enumerate((2 * D, D)):
        for layer, name, shape in (
            ("linear", "kernel", (width, D)),
            ("linear", "bias", (D,)),
            ("norm", "scale", (D,)),
            ("norm", "bias", (D,)),
        ):
            path = ("sampler", f"{layer}_{i}", name)
            axes = ("embed",) + (None,) * (len(shape) - 1) if name == "kernel" else (None,)
            table.append(Weight(path, shape, axes, "mtp." + ".".join(path)))
    return tuple(table)


def init_sampler(D: int, form: str, embedding_rms: Array, key: PRNGKeyArray) -> Params:
    """Fresh weights. The rows that read the embedding are larger by as much as embeddings are smaller than latents.

    In the residual form the last norm's scale is zero, so that the head starts as the base head.
    """
    first, second = jax.random.split(key)
    read = jnp.where(jnp.arange(2 * D) < D, 1 / embedding_rms, 1.0)[:, None]
    zeros, ones = jnp.zeros(D), jnp.ones(D)
    return {
        "linear_0": {"kernel": jax.random.normal(first, (2 * D, D)) * (2 * D) ** -0.5 * read, "bias": zeros},
        "norm_0": {"scale": ones, "bias": zeros},
        "linear_1": {"kernel": jax.random.normal(second, (D, D)) * D**-0.5, "bias": zeros},
        "norm_1": {"scale": zeros if form == "residual" else ones, "bias": zeros},
    }


def corrected_latent(
    sampler: Params,
    form: str,
    previous: Float[Array, "... D"],
    z: Float[Array, "... D"],
    read: Float[Array, "... D"] | None = None,
) -> Float[Array, "... D"]:
    """The latent whose unembedding predicts the next token, from z and the embedding of the token chosen before it.

    Args:
        sampler: weights of `sampler_table`, or what `parted` makes of them.
        form: "paper", MLP([E[prev]; z]), or "residual", z + MLP([E[prev]; z]).
        read: what `read_latent` gives for z, where that was computed before.
    """
    h = _times(previous.astype(z.dtype), _halves(sampler)[0]) + (read_latent(sampler, z) if read is None else read)
    h = _layer_norm(nn.silu(h), sampler["norm_0"])
    linear = sampler["linear_1"]
    h = _layer_norm(nn.silu(_times(h, linear["kernel"]) + linear["bias"].astype(h.dtype)), sampler["norm_1"])
    return z + h if form == "residual" else h


def read_latent(sampler: Params, z: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """What the first linear layer reads from z; the rest of it waits for the token chosen before."""
    return _times(z, _halves(sampler)[1]) + sampler["linear_0"]["bias"].astype(z.dtype)


def parted(sampler: Params) -> Params:
    """The weights with the first kernel already split in halves, so that a loop does not split it in every step."""
    return sampler | {"linear_0": sampler["linear_0"] | {"kernel": _halves(sampler)}}


def _halves(sampler: Params) -> tuple[Float[Array, "D D"], Float[Array, "D D"]]:
    """What the first layer reads the embedding with, and what it reads the latent with."""
    kernel = sampler["linear_0"]["kernel"]
    return kernel if isinstance(kernel, tuple) else (kernel[: len(kernel) // 2], kernel[len(kernel) // 2 :])


def _times(x: Float[Array, "... in"], w: Float[Array, "in out"]) -> Float[Array, "... out"]:
    return x @ w.astype(x.dtype)


def _layer_norm(x: Float[Array, "... D"], norm: Params) -> Float[Array, "... D"]:
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + _EPSILON)
    return (wide * norm["scale"] + norm["bias"]).astype(x.dtype)
