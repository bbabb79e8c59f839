"""Hugging Face folders out: stream our tree into sharded safetensors that `from_pretrained` loads."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from mtp_jax.files import whole_or_absent, write_json
from mtp_jax.model.folder import INDEX, SINGLE
from mtp_jax.model.geometry import Geometry
from mtp_jax.model.weights import Params, leaf_at, weight_table

SHARD_BYTES = 2 << 30


def on_host(leaf: Any) -> np.ndarray:
    """A whole array, wherever its parts lie; where processes hold them, all of these call this."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def stored_form(params: Params, g: Geometry, dtype: DTypeLike) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor under its Hugging Face name and in its layout, one at a time on the host.

    Where several processes hold the weights, all of them go through this.
    """
    for _, group in itertools.groupby(weight_table(g), key=lambda weight: weight.key):  # parts of one tensor together
        parts = list(group)
        for slot, key in zip(np.ndindex(parts[0].shape[: parts[0].stacked]), parts[0].stored_keys(), strict=True):
            tensors = []
            for weight in parts:
                tensor = on_host(leaf_at(params, weight.path)[slot].astype(dtype))
                tensors.append(tensor.T if weight.transposed else tensor)
            yield key, np.ascontiguousarray(np.concatenate(tensors) if len(tensors) > 1 else tensors[0])


def write_folder(
    out: Path,
    params: Params,
    g: Geometry,
    config: dict[str, Any],
    tokenizer: Any,
    dtype: DTypeLike,
    shard_bytes: int = SHARD_BYTES,
    generation: dict[str, Any] | None = None,
) -> None:
    """Write a model folder: safetensors, `config.json`, `generation_config.json` and the tokenizer.

    `out` is whole or absent; an older one is replaced. Without `generation`, the special ids of `config` stand there.
    All processes that hold weights call this, and the first one writes.
    """
    if jax.process_index() != 0:
        for _ in stored_form(params, g, dtype):
            pass  # gathered for the first process
        return
    config = {key: value for key, value in config.items() if key not in ("torch_dtype", "dtype")}
    config["dtype"] = jnp.dtype(dtype).name
    ids: dict[str, Any] = {
        key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config
    }
    with whole_or_absent(out) as part:
        write_tensors(part, stored_form(params, g, dtype), shard_bytes)
        write_json(part / "config.json", config)
        write_json(part / "generation_config.json", ids if generation is None else generation)
        tokenizer.save_pretrained(part)


def write_tensors(folder: Path, tensors: Iterator[tuple[str, np.ndarray]], shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors to `model.safetensors`, or to several files and an index; one file's tensors are held at a time."""
    shards: list[list[str]] = []
    total, held, held_bytes = 0, {}, 0

    def flush() -> None:
        nonlocal held, held_bytes
        save_file(held, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append(list(held))
        held, held_bytes = {}, 0

    for key, tensor in tensors:
        if held and held_bytes + tensor.nbytes > shard_bytes:
            flush()
        held[key] = tensor
        held_bytes += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "0.part").rename(folder / SINGLE)
        return
    weight_map = {}
    for i, keys in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{i}.part").rename(folder / name)
        weight_map |= dict.fromkeys(keys, name)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def parameter_count(params: Params) -> int:
    """Number of weights in a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
