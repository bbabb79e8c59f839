"""Weights of a model as int8, and the same as floats: by the definition, apart from how the package loads them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mtp_jax.model.weights import leaf_at, weight_table


def quantised(params, g):
    """Geometry and weights of the int8 model of stacked float weights."""
    g8, items = dataclasses.replace(g, int8=True), {}
    for weight in weight_table(g8):
        name = weight.path[-1].removesuffix("_scale") if weight.quantised else weight.path[-1]
        matrix = np.asarray(leaf_at(params, (*weight.path[:-1], name)), np.float32)
        if weight.quantised:
            scale = np.abs(matrix).max(axis=-2) / 127.5
            matrix = (
                scale if weight.quantised == "scale" else np.clip(np.round(matrix / scale[..., None, :]), -127, 127)
            )
        items[weight.path] = jnp.asarray(matrix, weight.dtype(np.float32))
    return g8, unflatten_dict(items)


def as_floats(params):
    """int8 weights multiplied out."""
    flat = flatten_dict(params)
    scales = {path: x for path, x in flat.items() if path[-1].endswith("_scale")}
    for path, scale in scales.items():
        matrix = (*path[:-1], path[-1].removesuffix("_scale"))
        flat[matrix] = flat[matrix].astype(jnp.float32) * scale[..., None, :]
    return unflatten_dict({path: x for path, x in flat.items() if path not in scales})
