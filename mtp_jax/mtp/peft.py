"""LoRA matrices under PEFT's names: a pair for each layer and projection, A as [R, in] and B as [out, R]."""

from collections.abc import Iterator

import numpy as np

from mtp_jax.model.geometry import Geometry
from mtp_jax.model.weights import Params, Weight, leaf_at, weight_table
from mtp_jax.mtp.lora import lora_table

_KINDS = {"a": "lora_A", "b": "lora_B"}


def modules_of(g: Geometry, targets: tuple[str, ...]) -> dict[str, str]:
    """The adapted projections, in the order of the weight table, and their modules in a layer, such as `q_proj`."""
    return {name: key.split(".")[-2] for name, key in _kernels(g).items() if name in targets}


def peft_names(g: Geometry, targets: tuple[str, ...], rank: int) -> Iterator[tuple[Weight, list[str]]]:
    """Every array of collection `lora`, and the name of each layer's matrix in it, which PEFT stores transposed."""
    keys = _kernels(g)
    for weight in lora_table(g, targets, rank):
        _, projection, kind = weight.path
        stem = "base_model.model." + keys[projection].removesuffix(".weight")
        yield weight, [f"{stem.format(layer=i)}.{_KINDS[kind]}.weight" for i in range(g.L)]


def to_peft(g: Geometry, targets: tuple[str, ...], rank: int, lora: Params) -> dict[str, np.ndarray]:
    """The matrices of collection `lora` by PEFT's names."""
    return {
        name: np.ascontiguousarray(np.asarray(matrix).T)
        for weight, names in peft_names(g, targets, rank)
        for name, matrix in zip(names, leaf_at(lora, weight.path), strict=True)
    }


def _kernels(g: Geometry) -> dict[str, str]:
    """The keys of the layers' projections in a checkpoint."""
    return {w.path[1]: w.key for w in weight_table(g) if w.path[0] == "layers" and w.path[2] == "kernel"}
