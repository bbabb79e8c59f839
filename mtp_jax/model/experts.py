"""A mixture of experts in place of the MLP: each row goes through the few experts that its router scores highest.

Experts are spread over devices along their own axis. Rows travel to the experts, which are much larger: the rows of the
devices that share them are gathered, each device computes what its experts add, and the sum goes back.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from mtp_jax.model.activation import ACTIVATIONS
from mtp_jax.model.geometry import Geometry
from mtp_jax.model.projection import Projection
from mtp_jax.sharding import parts_of, spec_of

# Devices make room for this multiple of the rows that would choose their experts if all were chosen alike; where more
# do, for all rows. With up to so many choices all rows have room anyway.
_ROOM, _FEW = 2, 4096
Matrix = tuple[Num[Array, "E _ _"], Float[Array, "E _"] | None]  # with the scales of whole numbers
Weights = tuple[Matrix, Matrix, Matrix]  # gate, up, down


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
        E, zeros = g.experts.total, nn.initializers.zeros

        def matrix(name: str, rows: int, columns: int) -> Matrix:
            values = self.param(name, zeros, (E, rows, columns))
            if not g.int8:
                return values.astype(dtype), None
            return values, self.param(f"{name}_scale", zeros, (E, columns))

        return matrix("gate", g.D, g.F), matrix("up", g.D, g.F), matrix("down", g.F, g.D)


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

    def here(x: Array, chosen: Array, share: Array, weights: Weights) -> Array:
        if shared:
            x, chosen, share = (jax.lax.all_gather(y, shared, tiled=True) for y in (x, chosen, share))
        first = jax.lax.axis_index(experts) * len(weights[0][0]) if experts else jnp.int32(0)
        y = _mixed(x, chosen, share, weights, first, g)
        for axis in (*experts, *width):
            y = jax.lax.psum_scatter(y, axis, tiled=True) if axis in shared else jax.lax.psum(y, axis)
        return y

    of_rows = PartitionSpec(batch or None, *[None] * (x.ndim - 1))
    each, part = experts or None, width or None
    wide = PartitionSpec(each, None, part), PartitionSpec(each, part)
    narrow = PartitionSpec(each, part, None), PartitionSpec(each, None)
    of_weights = tuple(
        (spec, None if scale is None else of_scale)
        for (spec, of_scale), (_, scale) in zip((wide, wide, narrow), weights, strict=True)
    )
    run = jax.shard_map(here, in_specs=(*(of_rows,) * 3, of_weights), out_specs=of_rows, check_vma=False)
    return run(x, chosen, share, weights)


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
    assert g.experts is not None
    count, total = len(weights[0][0]), g.experts.total
    every = math.prod(chosen.shape)
    room = -(-every * count * _ROOM // total)
    if every <= _FEW or room >= every:
        return _of_first(every, x, chosen, share, weights, first, g)
    here = jnp.sum((chosen >= first) & (chosen < first + count))
    # Recomputed in the backward pass: what it would keep has the size of the larger branch.
    branches = [jax.checkpoint(functools.partial(_of_first, n, g=g)) for n in (room, every)]
    return jax.lax.cond(here <= room, *branches, x, chosen, share, weights, first)


def _of_first(
    n: int,
    x: Float[Array, "B *rows D"],
    chosen: Int[Array, "B *rows k"],
    share: Float[Array, "B *rows k"],
    weights: Weights,
    first: Int[Array, ""],
    g: Geometry,
) -> Float[Array, "B *rows D"]:
    """`_mixed`, where experts here were chosen at most `n` times."""
    (gate, up, down), k, count = weights, chosen.shape[-1], len(weights[0][0])
    flat, rows = x.reshape(-1, x.shape[-1]), math.prod(x.shape[:-1])
    # Rows of one expert side by side, those of experts elsewhere behind them.
    expert = chosen.reshape(-1) - first
    expert = jnp.where((expert >= 0) & (expert < count), expert, count)
    order = jnp.argsort(expert)[:n]
    sizes = jnp.bincount(expert, length=count + 1)[:count].astype(jnp.int32)
    expert = expert[order]

    def times(h: Float[Array, "n in"], matrix: Matrix) -> Float[Array, "n out"]:
        values, scale = matrix
        y = jax.lax.ragged_dot(h, values.astype(h.dtype), sizes)
        return y if scale is None else (y * scale[jnp.minimum(expert, count - 1)]).astype(h.dtype)

    h = flat[order // k]
    y = times(ACTIVATIONS[g.activation](times(h, gate)) * times(h, up), down)
    y = jnp.where((expert < count)[:, None], y, 0)
    if n < rows * k:
        y = y * share.reshape(-1)[order, None].astype(y.dtype)
        return jnp.zeros_like(flat).at[order // k].add(y).reshape(x.shape)
    # In the order in which a row chose its experts, so that its sum does not depend on the rows beside it.
    y = jnp.zeros_like(y).at[order].set(y, unique_indices=True).reshape(rows, k, -1)
    return jnp.einsum("rkd,rk->rd", y, share.reshape(rows, k).astype(y.dtype)).reshape(x.shape)
