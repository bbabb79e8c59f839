"""Matrices as a decoding step takes them: projections that read one input side by side, fewer and larger products."""

from typing import Any

import jax.numpy as jnp
from jax.scipy.linalg import block_diag
from jaxtyping import Array

from mtp_jax.model.geometry import Geometry
from mtp_jax.model.products import PanelLora, native, pack
from mtp_jax.model.weights import Params

# Groups of projections that read one input; the decoder knows them by these names.
GROUPS = {"attention_in": ("q", "k", "v"), "attention_out": ("o",), "mlp_in": ("gate", "up"), "mlp_out": ("down",)}


def fuse(g: Geometry, params: Params, lora: Params | None, dtype: jnp.dtype, kernels: bool = True) -> tuple[Any, Any]:
    """`params` without what was joined, and what `Decoder.step` takes as `fused`.

    Args:
        params: unstacked; the dicts of the layers are changed.
        lora: the scaled collection, stacked; None without adapter.
        kernels: join the base's matrices too. Not where they are sharded over columns: parts would have to move.
    """
    panels = in_cpp(dtype, kernels)
    layers: dict[str, Any] = {}
    for i in range(g.L):
        layer = layers[f"layer_{i}"] = {}
        for group, names in GROUPS.items():
            into = layer[group] = {}
            if lora is not None and any(name in lora["layers"] for name in names):
                a, b = _lora_parts(g, lora["layers"], names, i, dtype)
                into |= (
                    {"lora": _panel_lora(a, b)} if panels else {"a": jnp.concatenate(a, axis=-1), "b": block_diag(*b)}
                )
            if kernels:
                parts = [params[f"layer_{i}"].pop(name) for name in names]
                joined = {kind: [part[kind] for part in parts] for kind in parts[0]}
                into |= {
                    kind: pack(*arrays) if panels and kind == "kernel" else jnp.concatenate(arrays, axis=-1)
                    for kind, arrays in joined.items()
                }
    return params, layers


def in_cpp(dtype: jnp.dtype, kernels: bool) -> bool:
    """Whether the C++ product takes a step's matrices: joined ones in float32, where it is at hand."""
    return kernels and dtype == jnp.float32 and native()


def _lora_parts(
    g: Geometry, lora: Params, names: tuple[str, ...], layer: int, dtype: jnp.dtype
) -> tuple[list[Array], list[Array]]:
    """A [in, R] and B [R, out] of each projection; of rank 0 where it has none."""
    widths = {"q": g.N * g.H, "k": g.K * g.H, "v": g.K * g.H, "o": g.D, "gate": g.F, "up": g.F, "down": g.D}
    width = next(lora[name]["a"].shape[1] for name in names if name in lora)
    none = {"a": jnp.zeros((g.L, width, 0)), "b": None}
    a = [jnp.asarray(lora.get(name, none)["a"][layer], dtype) for name in names]
    b = [jnp.asarray(lora[name]["b"][layer] if name in lora else jnp.zeros((0, widths[name])), dtype) for name in names]
    return a, b


def _panel_lora(a: list[Array], b: list[Array]) -> PanelLora:
    ranks = [len(part) for part in b]
    rows = [jnp.pad(part, ((0, max(ranks) - len(part)), (0, 0))) for part in b]  # none adds zero
    offsets = [int(sum(ranks[:i])) if rank else 0 for i, rank in enumerate(ranks)]
    return PanelLora(pack(jnp.concatenate(a, axis=-1)), pack(*rows), tuple(offsets))
