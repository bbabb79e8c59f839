"""Matrices as a decoding step takes them: projections that read one input side by side, fewer and larger products."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mtp_jax.model.geometry import Geometry
from mtp_jax.model.weights import Params, unstack_layers

# Groups of projections that read one input; `Layer.step` knows them by these names.
GROUPS = {"attention_in": ("q", "k", "v"), "attention_out": ("o",), "mlp_in": ("gate", "up"), "mlp_out": ("down",)}


def fuse(g: Geometry, params: Params, lora: Params | None, dtype: jnp.dtype, kernels: bool = True) -> tuple[Any, Any]:
    """The unstacked `params`, and what `Decoder.step` takes as `fused`. Stacked weights are consumed.

    Args:
        lora: the scaled collection, stacked; None without adapter.
        kernels: join the base's matrices too. Not where they are sharded over columns: parts would have to move.
    """
    params = unstack_layers(params)
    layers: dict[str, Any] = {f"layer_{i}": {} for i in range(g.L)}
    if lora is not None:
        joined = join_lora(g, lora, dtype)
        for i in range(g.L):
            layers[f"layer_{i}"] = {group: {k: leaf[i] for k, leaf in pair.items()} for group, pair in joined.items()}
    for name in layers if kernels else ():
        for group, names in GROUPS.items():
            parts = [params[name].pop(projection) for projection in names]
            into = layers[name].setdefault(group, {})
            into |= {kind: jnp.concatenate([part[kind] for part in parts], axis=-1) for kind in parts[0]}
    return params, layers


def join_lora(g: Geometry, lora: Params, dtype: jnp.dtype) -> dict[str, dict[str, Array]]:
    """For each group A [L, in, n R] and B [L, n R, out] of its n adapted projections, B by blocks, else zero."""
    widths = {"q": g.N * g.H, "k": g.K * g.H, "v": g.K * g.H, "o": g.D, "gate": g.F, "up": g.F, "down": g.D}
    out = {}
    for group, names in GROUPS.items():
        pairs = {name: jax.tree.map(jnp.asarray, lora["layers"][name]) for name in names if name in lora["layers"]}
        if not pairs:
            continue
        rank = next(iter(pairs.values()))["b"].shape[1]
        b = jnp.zeros((g.L, rank * len(pairs), sum(widths[name] for name in names)), dtype)
        column = 0
        for name in names:
            if name in pairs:
                row = list(pairs).index(name) * rank
                b = b.at[:, row : row + rank, column : column + widths[name]].set(pairs[name]["b"].astype(dtype))
            column += widths[name]
        out[group] = {"a": jnp.concatenate([pair["a"].astype(dtype) for pair in pairs.values()], axis=-1), "b": b}
    return out
