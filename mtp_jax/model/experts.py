"""A mixture of experts in place of the MLP: each row goes through the few experts that its router scores highest.

Experts are spread over devices along their own axis. Rows travel to the experts, which are much larger: the rows of the
devices that share them are gathered, each device computes what its experts add, and the sum goes back.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mtp_jax.model.activation import ACTIVATIONS
from mtp_jax.model.geometry import Geometry
from mtp_jax.model.projection import Projection
from mtp_jax.sharding import parts_of, spec_of

Weights = tuple[Float[Array, "E D F"], Float[Array, "E D F"], Float[Array, "E F D"]]  # gate, up, down


class Mixture(nn.Module):
    """The router and the experts of one layer."""

    g: Geometry

    def setup(self) -> None:
        assert self.g.experts is not None
        self.router, self.experts = Projection(self.g.experts.total), _ExpertWeights(self.g)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """What the chosen experts add, weighted by the router."""
        g, e = self.g, self.g.experts
        assert e is not None
        share = jax.nn.softmax(self.router(x).astype(jnp.float32), axis=-1)
        share, chosen = jax.lax.top_k(share, e.chosen)
        if e.normalised:
            share = share / share.sum(axis=-1, keepdims=True)
        return _over_devices(x, chosen, share, self.experts(x.dtype), g)


class _ExpertWeights(nn.Module):
    g: Geometry

    @nn.compact
    def __call__(self, dtype: DTypeLike) -> Weights:
        g = self.g
        assert g.experts is not None
        wide, narrow = (g.experts.total, g.D, g.F), (g.experts.total, g.F, g.D)
        zeros = nn.initializers.zeros
        gate, up = (self.param(name, zeros, wide).astype(dtype) for name in ("gate", "up"))
        return gate, up, self.param("down", zeros, narrow).astype(dtype)


def _over_devices(
    x: Float[Array, "B *rows D"],
    chosen: Int[Array, "B *rows k"],
    share: Float[Array, "B *rows k"],
    weights: Weights,
    g: Geometry,
) -> Float[Array, "B *rows D"]:
    """`_mixed` on every device for its experts and its part of their width, summed."""
    if jax.sharding.get_abstract_mesh().size <= 1:
        return _mixed(x, chosen, share, weights, jnp.int32(0), g)
    assert g.experts is not None
    experts = _axes_of("experts", g.experts.total)
    width = _axes_of("mlp", g.F)
    batch = _axes_of("batch", x.shape[0])
    shared = tuple(axis for axis in batch if axis in experts)  # axes whose devices have rows of their own, not experts

    def here(x: Array, chosen: Array, share: Array, gate: Array, up: Array, down: Array) -> Array:
        if shared:
            x, chosen, share = (jax.lax.all_gather(y, shared, tiled=True) for y in (x, chosen, share))
        first = jax.lax.axis_index(experts) * len(gate) if experts else jnp.int32(0)
        y = _mixed(x, chosen, share, (gate, up, down), first, g)
        for axis in (*experts, *width):
            y = jax.lax.psum_scatter(y, axis, tiled=True) if axis in shared else jax.lax.psum(y, axis)
        return y

    of_rows = PartitionSpec(batch or None, *[None] * (x.ndim - 1))
    each, part = experts or None, width or None
    wide, narrow = PartitionSpec(each, None, part), PartitionSpec(each, part, None)
    run = jax.shard_map(here, in_specs=(of_rows,) * 3 + (wide, wide, narrow), out_specs=of_rows, check_vma=False)
    return run(x, chosen, share, *weights)


def _axes_of(name: str, size: int) -> tuple[str, ...]:
    """The mesh axes over which a logical axis of this size is spread; none where they do not divide it."""
    entry = spec_of(name)[0]
    axes = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
    return axes if size % parts_of(name) == 0 else ()


def _mixed(
    x: Float[Array, "B *rows D"],
    chosen: Int[Array, "B *rows k"],
    share: Float[Array, "B *rows k"],
    weights: Weights,
    first: Int[Array, ""],
    g: Geometry,
) -> Float[Array, "B *rows D"]:
    """What experts `first`, first + 1, ... add to each row; 0 for a row that chose none of them."""
    gate, up, down = weights
    k, count = chosen.shape[-1], len(gate)
    flat, rows = x.reshape(-1, x.shape[-1]), math.prod(x.shape[:-1])
    # Rows of one expert side by side, those of experts elsewhere behind them.
    expert = chosen.reshape(-1) - first
    expert = jnp.where((expert >= 0) & (expert < count), expert, count)
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=count + 1)[:count].astype(jnp.int32)
    h = flat[order // k]
    h = ACTIVATIONS[g.activation](jax.lax.ragged_dot(h, gate, sizes)) * jax.lax.ragged_dot(h, up, sizes)
    y = jax.lax.ragged_dot(h, down, sizes)
    y = jnp.where((jnp.arange(rows * k) < sizes.sum())[:, None], y, 0)
    y = jnp.zeros_like(y).at[order].set(y, unique_indices=True).reshape(rows, k, -1)
    return jnp.einsum("rkd,rk->rd", y, share.reshape(rows, k).astype(y.dtype)).reshape(x.shape)
