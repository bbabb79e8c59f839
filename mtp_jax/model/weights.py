"""The weight table: for each weight our path, shape and logical axes, and its key and layout in a Hugging Face folder.

Initialisation, sharding, import, export and LoRA targets all read this table.
"""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, PRNGKeyArray

from mtp_jax.model.geometry import Geometry

Params = dict[str, Any]
# The projections of a layer that the adapter can extend. A mixture of experts has the first four.
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Weight:
    """One row of the table. Weights of the layers are stacked: their first axis, of length L, is the layer.

    Weights of experts are stacked twice: their second axis, of length E, is the expert.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical axis names, mapped to the mesh by `mtp_jax.sharding`
    key: str  # the Hugging Face name, with {layer} and {expert} where stacked
    transposed: bool = False  # stored as [out, in], ours is [in, out]
    part: tuple[int, int] | None = None  # where it begins among the rows of a stored tensor, and how many those are
    quantised: str | None = None  # of a stored matrix "values", whole numbers, or the "scale" of each output channel
    reduced: int = 0  # of a scale: how many numbers of the stored matrix share each

    @property
    def stacked(self) -> int:
        """How many leading axes number stored tensors."""
        return (self.axes[0] == "layers") + (self.axes[:2] == ("layers", "experts"))

    def stored_keys(self) -> list[str]:
        """The names of the stored tensors that make up this weight, in order of layer and expert."""
        numbers = itertools.product(*map(range, self.shape[: self.stacked]))
        return [self.key.format(**dict(zip(("layer", "expert"), index, strict=False))) for index in numbers]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of each stored tensor."""
        inner = self.shape[self.stacked :]
        shape = (*inner, self.reduced) if self.quantised == "scale" else inner[:: -1 if self.transposed else 1]
        return shape if self.part is None else (self.part[1], *shape[1:])

    def dtype(self, of: DTypeLike) -> np.dtype:
        """The dtype it is held in, in a model whose other weights are held in `of`."""
        return np.dtype({"values": np.int8, "scale": np.float32}.get(self.quantised or "", of))

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to matrices, not to norms and biases."""
        return self.path[-1] not in ("scale", "bias")


EMBED_KEY, UNEMBED_KEY = "model.embed_tokens.weight", "lm_head.weight"


def weight_table(g: Geometry) -> tuple[Weight, ...]:
    """Every weight of a base model of geometry `g`, once."""
    layer, heads, kv = "model.layers.{layer}.", g.N * g.H, g.K * g.H
    projections = {
        "q": ("self_attn.q_proj", g.D, heads, "embed", "heads", g.qkv_bias),
        "k": ("self_attn.k_proj", g.D, kv, "embed", "kv_heads", g.qkv_bias),
        "v": ("self_attn.v_proj", g.D, kv, "embed", "kv_heads", g.qkv_bias),
        "o": ("self_attn.o_proj", heads, g.D, "heads", "embed", g.o_bias),
        "gate": ("mlp.gate_proj", g.D, g.F, "embed", "mlp", g.mlp_bias),
        "up": ("mlp.up_proj", g.D, g.F, "embed", "mlp", g.mlp_bias),
        "down": ("mlp.down_proj", g.F, g.D, "mlp", "embed", g.mlp_bias),
    }
    parts: dict[str, tuple[int, int]] = {}  # of matrices that are stored as one
    if g.fused:
        parts = {name: (at, heads + 2 * kv) for name, at in (("q", 0), ("k", heads), ("v", heads + kv))}
        parts |= {"gate": (0, 2 * g.F), "up": (g.F, 2 * g.F)}
        for name in parts:
            joined = "self_attn.qkv_proj" if name in "qkv" else "mlp.gate_up_proj"
            projections[name] = (joined, *projections[name][1:])
    if g.experts:
        projections = {name: row for name, row in projections.items() if not row[0].startswith("mlp")}

    table = [Weight(("embed", "embedding"), (g.V, g.D), ("vocab", "embed"), EMBED_KEY)]
    for name, (key, rows, columns, row_axis, column_axis, bias) in projections.items():
        axes = ("layers", row_axis, column_axis)
        path, stored, part = ("layers", name, "kernel"), layer + key + ".weight", parts.get(name)
        table += _matrix(g, Weight(path, (g.L, rows, columns), axes, stored, True, part))
        if bias:
            path = ("layers", name, "bias")
            table.append(Weight(path, (g.L, columns), ("layers", column_axis), layer + key + ".bias"))
    table += _expert_table(g, layer) if g.experts else []
    for name, (key, width) in _norms(g).items():
        stored = layer + key + ".weight"
        table.append(Weight(("layers", name, "scale"), (g.L, width), ("layers", None), stored))
    table.append(Weight(("norm", "scale"), (g.D,), (None,), "model.norm.weight"))
    if g.own_head:
        key = EMBED_KEY if g.tied else UNEMBED_KEY
        table += _matrix(g, Weight(("unembed", "embedding"), (g.V, g.D), ("vocab", "embed"), key))
    return tuple(table)


def _matrix(g: Geometry, weight: Weight) -> list[Weight]:
    """A projection [in, out] or the base head [out, in] as it is, or as whole numbers and a scale for each output."""
    if not g.int8:
        return [weight]
    (*path, name), reduced = weight.path, -2 if weight.transposed else -1
    shape, axes = list(weight.shape), list(weight.axes)
    width, _ = shape.pop(reduced), axes.pop(reduced)
    scale = replace(
        weight, path=(*path, f"{name}_scale"), shape=tuple(shape), axes=tuple(axes), quantised="scale", reduced=width,
    )  # fmt: skip
    return [replace(weight, quantised="values"), scale]


def _norms(g: Geometry) -> dict[str, tuple[str, int]]:
    """The norms of a layer: their keys and widths."""
    norms = {}
    if g.norm_before:
        mlp_norm = "pre_feedforward_layernorm" if g.norm_after else "post_attention_layernorm"
        norms |= {"attention_norm": ("input_layernorm", g.D), "mlp_norm": (mlp_norm, g.D)}
    if g.norm_after:
        norms |= {"attention_out_norm": ("post_attention_layernorm", g.D)}
        norms |= {"mlp_out_norm": ("post_feedforward_layernorm", g.D)}
    if g.qk_norm:
        widths = (g.H, g.H) if g.qk_norm == "head" else (g.N * g.H, g.K * g.H)
        norms |= {f"{x}_norm": (f"self_attn.{x}_norm", width) for x, width in zip("qk", widths, strict=True)}
    return norms


def _expert_table(g: Geometry, layer: str) -> list[Weight]:
    """The router and the experts of every layer."""
    assert g.experts is not None
    E, (block, *names) = g.experts.total, g.experts.stored
    block, path = layer + block, ("layers", "mixture")
    table = [Weight((*path, "router", "kernel"), (g.L, g.D, E), ("layers", None, None), block + ".gate.weight", True)]
    for ours, name in zip(("gate", "up", "down"), names, strict=True):
        shape: tuple[int, ...] = (g.L, E, g.D, g.F)
        axes: tuple[str | None, ...] = ("layers", "experts", None, "mlp")
        if ours == "down":
            shape, axes = (g.L, E, g.F, g.D), ("layers", "experts", "mlp", None)
        table += _matrix(
            g, Weight((*path, "experts", ours), shape, axes, f"{block}.experts.{{expert}}.{name}.weight", True)
        )
    return table


def projections(g: Geometry) -> tuple[str, ...]:
    """Those of `PROJECTIONS` that a model has."""
    return PROJECTIONS[:4] if g.experts else PROJECTIONS


def leaf_at(tree: Params, path: tuple[str, ...]) -> Any:
    """The leaf of a nested dict at a path."""
    for name in path:
        tree = tree[name]
    return tree


def init_params(g: Geometry, key: PRNGKeyArray, dtype: DTypeLike = jnp.float32) -> Params:
    """Fresh weights: normal of scale `init_scale`, 1/sqrt(2L) of it where a projection writes to the residual."""

    def draw(index: int, weight: Weight) -> Array:
        if not weight.decays:
            return jnp.full(weight.shape, 1 - g.norm_offset if weight.path[-1] == "scale" else 0, dtype)
        residual = "o" in weight.path or "down" in weight.path
        scale = g.init_scale / (math.sqrt(2 * g.L) if residual else 1.0)
        return (scale * jax.random.normal(jax.random.fold_in(key, index), weight.shape)).astype(dtype)

    return unflatten_dict({weight.path: draw(i, weight) for i, weight in enumerate(weight_table(g))})


def abstract_params(g: Geometry, dtype: DTypeLike) -> Params:
    """Shapes and dtypes of all weights, without the weights."""
    return unflatten_dict(
        {weight.path: jax.ShapeDtypeStruct(weight.shape, weight.dtype(dtype)) for weight in weight_table(g)}
    )


def unstack_layers(params: Params) -> Params:
    """The same weights with a dict per layer in place of the stacked one, for decoding without a scan.

    The stacked weights are consumed one after another, so that never more than one of them exists twice.
    """
    rest = {name: leaf for name, leaf in params.items() if name != "layers"}
    items: list[tuple[tuple[str, ...], Any]] = []
    for path, leaf in flatten_dict(params["layers"]).items():
        layers = list(leaf)
        if isinstance(leaf.sharding, NamedSharding):  # a layer stays where its part of the stack was
            placed = NamedSharding(leaf.sharding.mesh, PartitionSpec(*leaf.sharding.spec[1:]))
            layers = jax.device_put(layers, placed)
        items += [((f"layer_{i}", *path), layer) for i, layer in enumerate(layers)]
        leaf.delete()
    return rest | unflatten_dict(dict(items))
