"""One decoding step from a geometry alone, for `mtp_jax.preflight` to compile: shapes and shardings, but no array."""

from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.typing import DTypeLike

from mtp_jax import sharding
from mtp_jax.decoding.forward import XlaForward
from mtp_jax.decoding.loop import PREFILL_CHUNK, DecodeState, Decoding, Limits
from mtp_jax.decoding.options import Options
from mtp_jax.decoding.plan import BlockPlan
from mtp_jax.model.decoder import Decoder
from mtp_jax.model.geometry import Geometry
from mtp_jax.model.weights import Params, weight_table
from mtp_jax.mtp.adapter import AdapterShape, abstract_adapter


def decoding_program(
    g: Geometry,
    shape: AdapterShape | None,
    plan: BlockPlan,
    slots: int,
    batch: int,
    dtype: DTypeLike,
    mesh: jax.sharding.Mesh,
) -> tuple[Any, tuple[Any, ...]]:
    """A jitted greedy step, its state donated, and its arguments' shapes, weights and cache spread over the mesh."""
    whole = sharding.replicated(mesh)
    forward = XlaForward(Decoder(g, dtype, scanned=False), shape, joined=False)
    decoding = Decoding(forward, Options(plan))
    params = _params(g, dtype, mesh)
    adapter = None if shape is None or not plan.block else abstract_adapter(g, shape)
    variables = jax.eval_shape(forward.prepare, params, adapter)
    variables = _placed({name: part for name, part in variables.items() if name != "params"}, whole)
    variables["params"] = params

    lengths: Any = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=whole)
    stop_ids: Any = jax.ShapeDtypeStruct((1,), jnp.int32, sharding=whole)
    limits = Limits(lengths, stop_ids)
    prompts = jax.ShapeDtypeStruct((batch, min(slots, PREFILL_CHUNK)), jnp.int32)
    room = slots + plan.drafts + 1

    def prefill(variables: Any, prompts: Any, lengths: Any, limits: Limits) -> DecodeState:
        return decoding.prefill(variables, prompts, lengths, limits, room, dtype)

    state = jax.eval_shape(prefill, variables, prompts, lengths, limits)
    cache = sharding.sharding_of(mesh, ("batch", "kv_heads", None, None), (batch, g.K, room, g.H))
    placed = _placed(state._replace(cache=None), whole)._replace(cache=_placed(state.cache, cache))
    step = jax.jit(
        lambda variables, state, limits: decoding.step(variables, state, limits, None),
        donate_argnums=1,
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, placed),
    )
    return step, (variables, placed, limits)


def _params(g: Geometry, dtype: DTypeLike, mesh: jax.sharding.Mesh) -> Params:
    """Weights as decoding holds them, a dict per layer."""
    items: list[tuple[tuple[str, ...], Any]] = []
    for weight in weight_table(g):
        if weight.stacked:
            shape = weight.shape[1:]
            leaf = jax.ShapeDtypeStruct(
                shape, weight.dtype(dtype), sharding=sharding.sharding_of(mesh, weight.axes[1:], shape)
            )
            items += [((f"layer_{i}", *weight.path[1:]), leaf) for i in range(g.L)]
        else:
            placed = sharding.weight_sharding(mesh, weight)
            items.append((weight.path, jax.ShapeDtypeStruct(weight.shape, weight.dtype(dtype), sharding=placed)))
    return unflatten_dict(dict(items))


def _placed(tree: Any, where: jax.sharding.Sharding) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree)
