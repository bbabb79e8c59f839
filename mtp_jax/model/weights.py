"""The weight table: for each weight our path, shape and logical axes, and its key and layout in a Hugging Face folder.

Initialisation, sharding, import, export and LoRA targets all read this table.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, PRNGKeyArray

from mtp_jax.model.geometry import Geometry

Params = dict[str, Any]
# The seven projections of a layer that the adapter can extend.
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Weight:
    """One row of the table. Weights of the layers are stacked: their first axis, of length L, is the layer."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical axis names, mapped to the mesh by `mtp_jax.sharding`
    key: str  # the Hugging Face name, with {layer} where stacked
    transposed: bool = False  # stored as [out, in], ours is [in, out]

    @property
    def stacked(self) -> bool:
        return self.axes[0] == "layers"

    def stored_keys(self) -> list[str]:
        """The names of the stored tensors that make up this weight, in order of layer."""
        return [self.key.format(layer=layer) for layer in range(self.shape[0])] if self.stacked else [self.key]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of each stored tensor."""
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to matrices, not to norms and biases."""
        return self.path[-1] in ("kernel", "embedding")


EMBED_KEY, UNEMBED_KEY = "model.embed_tokens.weight", "lm_head.weight"


def weight_table(g: Geometry) -> tuple[Weight, ...]:
    """Every weight of a base model of geometry `g`, once."""
    attention, mlp = "model.layers.{layer}.self_attn.", "model.layers.{layer}.mlp."
    projections = {
        "q": (attention + "q_proj", g.D, g.N * g.H, "embed", "heads", g.qkv_bias),
        "k": (attention + "k_proj", g.D, g.K * g.H, "embed", "kv_heads", g.qkv_bias),
        "v": (attention + "v_proj", g.D, g.K * g.H, "embed", "kv_heads", g.qkv_bias),
        "o": (attention + "o_proj", g.N * g.H, g.D, "heads", "embed", g.o_bias),
        "gate": (mlp + "gate_proj", g.D, g.F, "embed", "mlp", g.mlp_bias),
        "up": (mlp + "up_proj", g.D, g.F, "embed", "mlp", g.mlp_bias),
        "down": (mlp + "down_proj", g.F, g.D, "mlp", "embed", g.mlp_bias),
    }
    norms = {"attention_norm": ("input_layernorm", g.D), "mlp_norm": ("post_attention_layernorm", g.D)}
    if g.qk_norm:
        norms |= {"q_norm": ("self_attn.q_norm", g.H), "k_norm": ("self_attn.k_norm", g.H)}

    table = [Weight(("embed", "embedding"), (g.V, g.D), ("vocab", "embed"), EMBED_KEY)]
    for name, (key, rows, columns, row_axis, column_axis, bias) in projections.items():
        axes = ("layers", row_axis, column_axis)
        table.append(Weight(("layers", name, "kernel"), (g.L, rows, columns), axes, key + ".weight", True))
        if bias:
            table.append(Weight(("layers", name, "bias"), (g.L, columns), ("layers", column_axis), key + ".bias"))
    for name, (key, width) in norms.items():
        stored = "model.layers.{layer}." + key + ".weight"
        table.append(Weight(("layers", name, "scale"), (g.L, width), ("layers", None), stored))
    table.append(Weight(("norm", "scale"), (g.D,), (None,), "model.norm.weight"))
    if not g.tied:
        table.append(Weight(("unembed", "embedding"), (g.V, g.D), ("vocab", "embed"), UNEMBED_KEY))
    return tuple(table)


def leaf_at(tree: Params, path: tuple[str, ...]) -> Any:
    """The leaf of a nested dict at a path."""
    for name in path:
        tree = tree[name]
    return tree


def init_params(g: Geometry, key: PRNGKeyArray, dtype: DTypeLike = jnp.float32) -> Params:
    """Fresh weights: normal of scale `init_scale`, 1/sqrt(2L) of it where a projection writes to the residual."""

    def draw(index: int, weight: Weight) -> Array:
        if not weight.decays:
            return (jnp.ones if weight.path[-1] == "scale" else jnp.zeros)(weight.shape, dtype)
        scale = g.init_scale / (math.sqrt(2 * g.L) if weight.path[1] in ("o", "down") else 1.0)
        return (scale * jax.random.normal(jax.random.fold_in(key, index), weight.shape)).astype(dtype)

    return unflatten_dict({weight.path: draw(i, weight) for i, weight in enumerate(weight_table(g))})


def abstract_params(g: Geometry, dtype: DTypeLike) -> Params:
    """Shapes and dtypes of all weights, without the weights."""
    return unflatten_dict({weight.path: jax.ShapeDtypeStruct(weight.shape, dtype) for weight in weight_table(g)})


def unstack_layers(params: Params) -> Params:
    """The same weights with a dict per layer in place of the stacked one, for decoding without a scan.

    The stacked weights are consumed one after another, so that never more than one of them exists twice.
    """
    rest = {name: leaf for name, leaf in params.items() if name != "layers"}
    items: list[tuple[tuple[str, ...], Any]] = []
    stacked = [((name, kind), leaf) for name, leaves in params["layers"].items() for kind, leaf in leaves.items()]
    for path, leaf in stacked:
        layers = list(leaf)
        if isinstance(leaf.sharding, NamedSharding):  # a layer stays where its part of the stack was
            placed = NamedSharding(leaf.sharding.mesh, PartitionSpec(*leaf.sharding.spec[1:]))
            layers = jax.device_put(layers, placed)
        items += [((f"layer_{i}", *path), layer) for i, layer in enumerate(layers)]
        leaf.delete()
    return rest | unflatten_dict(dict(items))
