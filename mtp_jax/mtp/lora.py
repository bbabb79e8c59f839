"""Gated LoRA: low-rank pairs beside the frozen projections, met by mask rows alone (docs/how-it-works.md, section 4).

The gate is structural. Real rows and mask rows are two streams through the same frozen weights and only the mask stream
asks for the `lora` collection, so real rows cannot depend on it and nothing is multiplied by zero.
"""

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jaxtyping import PRNGKeyArray

from mtp_jax.model.geometry import Geometry
from mtp_jax.model.weights import Params, Weight, weight_table


def lora_table(g: Geometry, targets: tuple[str, ...], rank: int) -> tuple[Weight, ...]:
    """The matrices A [L, in, R] and B [L, R, out] of every target projection, in the order of the weight table."""
    table = []
    for weight in weight_table(g):
        if weight.path[0] == "layers" and weight.path[1] in targets and weight.path[2] == "kernel":
            (L, rows, columns), (layers, row_axis, column_axis) = weight.shape, weight.axes
            # Each is spread over the fsdp axis once: by the model's width, or else by its rank.
            for name, shape, axes in (
                ("a", (L, rows, rank), (layers, row_axis, None if row_axis == "embed" else "rank")),
                ("b", (L, rank, columns), (layers, None if column_axis == "embed" else "rank", column_axis)),
            ):
                path = ("layers", weight.path[1], name)
                table.append(Weight(path, shape, axes, "lora." + ".".join(path)))
    return tuple(table)


def init_lora(g: Geometry, targets: tuple[str, ...], rank: int, key: PRNGKeyArray) -> Params:
    """A normal of deviation 1/sqrt(in), B zero: at first mask rows compute what real rows would."""
    items = []
    for i, weight in enumerate(lora_table(g, targets, rank)):
        if weight.path[-1] == "a":
            draw = jax.random.normal(jax.random.fold_in(key, i), weight.shape) * weight.shape[1] ** -0.5
        else:
            draw = jnp.zeros(weight.shape)
        items.append((weight.path, draw))
    return unflatten_dict(dict(items))


def scaled(lora: Params, scale: float) -> Params:
    """The collection as the decoder applies it: B times alpha/R, so that y = W x + (alpha/R) B (A x)."""
    return jax.tree.map_with_path(lambda path, x: x * scale if path[-1].key == "b" else x, lora)
