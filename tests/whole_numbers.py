"""Weights of a model as int8, and the same as floats: by the definition, apart from how the package loads them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mtp_jax.cpu import native
from mtp_jax.model.weights import leaf_at, weight_table


def can_round():
    """Whether the C++ engine is there and rounds what meets whole numbers too."""
    try:
        return native.library().rounds
    except native.BuildError:
        return False


def quantised(params, g):
    """Geometry and weights of the int8 model of stacked float weights."""
    g8, items = dataclasses.replace(g, int8=True), {}
    for weight in weight_table(g8):
        head = weight.path[0] == "unembed"
        path = ("embed", "embedding") if head and g.tied else weight.path
        name = path[-1].removesuffix("_scale") if weight.quantised else path[-1]
        matrix = np.asarray(leaf_at(params, (*path[:-1], name)), np.float32)
        if weight.quantised:
            scale = np.abs(matrix).max(axis=-1 if head else -2, keepdims=True) / 127.5
            whole = np.clip(np.round(matrix / scale), -127, 127)
            matrix = scale.reshape(weight.shape) if weight.quantised == "scale" else whole
        items[weight.path] = jnp.asarray(matrix, weight.dtype(np.float32))
    return g8, unflatten_dict(items)


def as_floats(params, g):
    """int8 weights multiplied out; their model has a head of its own, as rounding changes it and not the embeddings."""
    flat = flatten_dict(params)
    scales = {path: x for path, x in flat.items() if path[-1].endswith("_scale")}
    for path, scale in scales.items():
        matrix = (*path[:-1], path[-1].removesuffix("_scale"))
        across = scale[:, None] if path[0] == "unembed" else scale[..., None, :]
        flat[matrix] = flat[matrix].astype(jnp.float32) * across
    return dataclasses.replace(g, int8=False, tied=False), unflatten_dict(
        {path: x for path, x in flat.items() if path not in scales}
    )
