"""Adapter folders: safetensors beside `mtp_config.json`, tied to a base model by a fingerprint."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mtp_jax.errors import UserError
from mtp_jax.model.folder import find_folder, read_json, read_slice, stored_tensors
from mtp_jax.model.folder_writer import on_host, whole_or_absent
from mtp_jax.model.geometry import Geometry
from mtp_jax.model.weights import PROJECTIONS, Params, leaf_at
from mtp_jax.mtp.adapter import AdapterShape, adapter_table
from mtp_jax.storage import local

CONFIG, TENSORS = "mtp_config.json", "adapter.safetensors"
FORMAT = 1
_SAMPLE_BYTES = 64 << 10


def fingerprint(folder: Path) -> str:
    """A digest of a base model: names, shapes and dtypes of all tensors and the first and last rows of each.

    It does not depend on how the tensors are spread over files, and reads a bounded part of each.
    """
    digest = hashlib.sha256()
    for key, tensor in sorted(stored_tensors(folder).items()):
        row_bytes = tensor.dtype.itemsize * math.prod(tensor.shape[1:])
        count = min(tensor.shape[0], max(1, _SAMPLE_BYTES // max(1, row_bytes)))
        digest.update(f"{key} {tensor.shape} {tensor.dtype.name}\n".encode())
        for rows in (slice(0, count), slice(tensor.shape[0] - count, tensor.shape[0])):
            digest.update(np.ascontiguousarray(read_slice(tensor, key, (rows,))).tobytes())
    return digest.hexdigest()


def write_adapter(
    out: Path,
    g: Geometry,
    shape: AdapterShape,
    adapter: Params,
    base: dict[str, str],
    summary: dict[str, Any],
    dtype: jnp.dtype = jnp.float32,
) -> None:
    """Write an adapter folder that is whole or absent; the rest is as in `write_adapter_files`.

    All processes that hold a part call this; the first one writes.
    """
    adapter = jax.tree.map(on_host, adapter)
    if jax.process_index() != 0:
        return
    with whole_or_absent(out) as part:
        write_adapter_files(part, g, shape, adapter, base, summary, dtype)


def write_adapter_files(
    folder: Path,
    g: Geometry,
    shape: AdapterShape,
    adapter: Params,
    base: dict[str, str],
    summary: dict[str, Any],
    dtype: jnp.dtype,
    measured: dict[str, Any] | None = None,
) -> None:
    """Write an adapter's two files into a folder.

    Args:
        base: `name` and `fingerprint` of the base model; `revision` where the hub has it.
        summary: what is worth knowing about its training.
        measured: tokens per step by domain, and how they were measured.
    """
    tensors = {w.key: np.asarray(leaf_at(adapter, w.path)).astype(dtype) for w in adapter_table(g, shape)}
    config = {
        "format": FORMAT,
        "masks": shape.masks,
        "rank": shape.rank,
        "alpha": shape.alpha,
        "targets": list(shape.targets),
        "sampler": shape.sampler,
        "gated": shape.gated,
        "base": base,
        "training": summary,
        **({} if measured is None else {"measured": measured}),
    }
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def find_adapter(name: str) -> Path:
    """The folder of an adapter: `bundled:NAME` for the one beside a bundled model, a local folder, or a hub name.

    Raises:
        UserError: nothing of that name, or a folder without an adapter.
    """
    if name.startswith("bundled:"):
        folder = find_folder(name) / "adapter"
    elif (found := local(name)).exists():
        folder = found
    else:
        folder = find_folder(name, patterns=(CONFIG, TENSORS))
    if (folder / "adapter" / CONFIG).is_file():  # a run's output folder
        folder = folder / "adapter"
    for file in (CONFIG, TENSORS):
        if not (folder / file).is_file():
            raise UserError(f"{name}: {file} is missing, so this is no adapter folder.")
    return folder


def read_shape(folder: Path) -> AdapterShape:
    """What an adapter folder's `mtp_config.json` says it consists of.

    Raises:
        UserError: a config of another format, or with values that make no adapter.
    """
    where, config = folder / CONFIG, read_json(folder / CONFIG)
    if config.get("format") != FORMAT:
        raise UserError(f"{where}: format {config.get('format')!r} is not {FORMAT}, the one this version reads.")
    try:
        shape = AdapterShape(
            masks=int(config["masks"]),
            rank=int(config["rank"]),
            alpha=float(config["alpha"]),
            targets=tuple(config["targets"]),
            sampler=config["sampler"],
            gated=bool(config["gated"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: not a complete adapter config ({error!r}).") from error
    if shape.masks < 1 or shape.rank < 1 or set(shape.targets) - set(PROJECTIONS):
        raise UserError(f"{where}: masks and rank must be at least 1, and targets among {', '.join(PROJECTIONS)}.")
    return shape


def load_adapter(folder: Path, g: Geometry, base_folder: Path | None) -> tuple[AdapterShape, Params]:
    """An adapter's shape and its arrays on the host, checked against the base it is to be used with.

    Args:
        base_folder: the base model's folder; None skips the comparison of fingerprints.
    Raises:
        UserError: an adapter of another base (both are named), or arrays that do not fit config and base.
    """
    shape, base = read_shape(folder), read_json(folder / CONFIG).get("base") or {}
    if base_folder is not None and (here := fingerprint(base_folder)) != base.get("fingerprint"):
        raise UserError(
            f"{folder}: this adapter was trained for {base.get('name', 'another base')} (fingerprint "
            f"{str(base.get('fingerprint'))[:12]}), but the base model is {base_folder.name} (fingerprint {here[:12]})."
        )
    table, items, faults = adapter_table(g, shape), [], []
    try:
        with safe_open(folder / TENSORS, "numpy") as tensors:
            names = set(tensors.keys())
            for weight in table:
                if weight.key not in names:
                    faults.append(f"{weight.key} is missing")
                    continue
                names.remove(weight.key)
                array = tensors.get_tensor(weight.key)
                if array.shape != weight.shape:
                    faults.append(f"{weight.key} is {array.shape}, should be {weight.shape}")
                items.append((weight.path, array.astype(np.float32)))
            faults += [f"{name} is not expected" for name in sorted(names)]
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / TENSORS}: damaged or truncated ({error}).") from error
    if faults:
        raise UserError(f"{folder / TENSORS}: does not fit {CONFIG} and the base model: {'; '.join(faults)}.")
    return shape, unflatten_dict(dict(items))
