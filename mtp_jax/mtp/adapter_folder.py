"""Adapter folders: safetensors beside `mtp_config.json`, tied to a base model by a fingerprint.

What `mtp_jax.export --engine` writes is read too: the same config as `uno.json`, beside the LoRA as PEFT stores it.
"""

import hashlib
import json
import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.typing import DTypeLike
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mtp_jax.errors import UserError, warn
from mtp_jax.files import read_json, whole_or_absent, write_json
from mtp_jax.locate import bundled_adapter, find_folder
from mtp_jax.model.base import Base
from mtp_jax.model.folder_writer import on_host
from mtp_jax.model.geometry import Geometry
from mtp_jax.model.weights import PROJECTIONS, Params, Weight, leaf_at
from mtp_jax.mtp.adapter import SAMPLERS, AdapterShape, adapter_table
from mtp_jax.mtp.peft import peft_names
from mtp_jax.storage import local

CONFIG, TENSORS = "mtp_config.json", "adapter.safetensors"
ENGINE_CONFIG, ENGINE_TENSORS = "uno.json", "adapter_model.safetensors"
_VOCABULARY = "mtp.vocabulary"  # the key of the draft vocabulary
FORMAT = 1


@dataclass(frozen=True)
class Adapter:
    """An adapter that was opened once and fits its base."""

    folder: Path
    shape: AdapterShape
    arrays: Params  # on the host, float32; the draft vocabulary int32
    config: dict[str, Any]  # its mtp_config.json
    dtype: np.dtype  # as stored

    @cached_property
    def digest(self) -> str:
        """sha256 of the stored arrays."""
        return hashlib.sha256(files_of(self.folder)[1].read_bytes()).hexdigest()


def write_adapter(
    out: Path,
    g: Geometry,
    shape: AdapterShape,
    adapter: Params,
    base: dict[str, str],
    summary: dict[str, Any],
    dtype: DTypeLike = jnp.float32,
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
    dtype: DTypeLike,
    measured: dict[str, Any] | None = None,
) -> None:
    """Write an adapter's two files into a folder.

    Args:
        base: `name`, `fingerprint` and `values` (see `Base`) of the base model; `revision` where the hub has it.
        summary: what is worth knowing about its training.
        measured: tokens per step by domain, and how they were measured.
    """
    tensors = {w.key: np.asarray(leaf_at(adapter, w.path)).astype(dtype) for w in adapter_table(g, shape)}
    if shape.vocabulary is not None:
        tensors[_VOCABULARY] = np.asarray(adapter["vocabulary"])
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    write_json(folder / CONFIG, described(shape, base, summary, measured), sort_keys=False)


def described(
    shape: AdapterShape, base: dict[str, str], summary: dict[str, Any], measured: dict[str, Any] | None = None
) -> dict[str, Any]:
    """An adapter's config, for `mtp_config.json`; arguments as in `write_adapter_files`."""
    return {
        "format": FORMAT,
        "masks": shape.masks,
        "rank": shape.rank,
        "alpha": shape.alpha,
        "targets": list(shape.targets),
        "sampler": shape.sampler,
        "gated": shape.gated,
        **({} if shape.vocabulary is None else {"vocabulary": shape.vocabulary}),
        **({} if shape.noise is None else {"noise": {"low": shape.noise.low, "high": shape.noise.high}}),
        "base": base,
        "training": summary,
        **({} if measured is None else {"measured": measured}),
    }


def files_of(folder: Path) -> tuple[Path, Path]:
    """An adapter folder's config and its tensors; of an engine's folder where it is one."""
    if (folder / ENGINE_CONFIG).is_file():
        return folder / ENGINE_CONFIG, folder / ENGINE_TENSORS
    return folder / CONFIG, folder / TENSORS


def find_adapter(name: str) -> Path:
    """The folder of an adapter: `bundled:NAME` for one that comes with the package, a local folder, or a hub name.

    Raises:
        UserError: nothing of that name, or a folder without an adapter.
    """
    if name.startswith("bundled:"):
        folder = bundled_adapter(name)
    elif (found := local(name)).exists():
        folder = found
    else:
        folder = find_folder(name, patterns=(CONFIG, TENSORS, ENGINE_CONFIG, ENGINE_TENSORS))
    if (folder / "adapter" / CONFIG).is_file():  # a run's output folder
        folder = folder / "adapter"
    for file in files_of(folder):
        if not file.is_file():
            raise UserError(f"{name}: {file.name} is missing, so this is no adapter folder.")
    return folder


def read_shape(folder: Path) -> AdapterShape:
    """What an adapter folder's config says it consists of.

    Raises:
        UserError: a config of another format, or with values that make no adapter.
    """
    where = files_of(folder)[0]
    config = read_json(where)
    if config.get("format") != FORMAT:
        raise UserError(f"{where}: format {config.get('format')!r} is not {FORMAT}, the one this version reads.")
    try:
        shape = TypeAdapter(AdapterShape).validate_json(json.dumps(config), strict=True)
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise UserError(*(f"{where}: not a complete adapter config ({fault})." for fault in faults)) from error
    if shape.vocabulary is not None and shape.vocabulary < 1:
        raise UserError(f"{where}: vocabulary {shape.vocabulary} should be at least 1.")
    if shape.masks < 1 or shape.rank < 1 or set(shape.targets) - set(PROJECTIONS):
        raise UserError(f"{where}: masks and rank must be at least 1, and targets among {', '.join(PROJECTIONS)}.")
    if not math.isfinite(shape.alpha):
        raise UserError(f"{where}: alpha {shape.alpha} should be a number.")
    if shape.sampler not in SAMPLERS:
        raise UserError(f"{where}: sampler {shape.sampler!r} is unknown; it should be one of {', '.join(SAMPLERS)}.")
    if shape.noise is not None:
        if not 0 <= shape.noise.low < shape.noise.high:
            raise UserError(f"{where}: noise should be token ids from low to below high, not {config['noise']}.")
        if shape.sampler != "none" or shape.vocabulary is not None or not shape.gated:
            raise UserError(f"{where}: mask rows of noise go with the gate, without sampler and draft vocabulary.")
    return shape


def open_adapter(name: str, base: Base) -> Adapter:
    """An adapter, checked against the base it is to be used with.

    Args:
        name: what `find_adapter` takes.
    Raises:
        UserError: an adapter of another base (both are named), or arrays that do not fit config and base.
    """
    folder = find_adapter(name)
    (where, file), shape = files_of(folder), read_shape(folder)
    config, of_engine = read_json(where), where.name == ENGINE_CONFIG
    trained_for = config["base"] if isinstance(config.get("base"), dict) else {}
    weights = trained_for.get("weights", "stored")
    known = trained_for.get("fingerprint"), trained_for.get("values")
    same = replace(base, g=replace(base.g, int8=weights == "int8"))  # the base, held as it was when this was trained
    if same.fingerprint not in known and same.values not in known:
        raise UserError(
            f"{folder}: this adapter was trained for {trained_for.get('name', 'another base')} (fingerprint "
            f"{str(trained_for.get('fingerprint'))[:12]}), but the base model is {base.folder.name} (fingerprint "
            f"{same.fingerprint[:12]}). If it is the same model, saved anew, make base.fingerprint in {where.name} "
            f"{same.fingerprint}."
        )
    if weights != base.weights:
        warn(
            f"{folder}: was trained on weights held as {weights}; drafts for weights held as {base.weights} may fit "
            f"less well (--weights {weights}; in a config model.weights)."
        )
    items: dict[tuple[str, ...], np.ndarray] = {}
    dtypes, faults = [], []
    try:
        with safe_open(file, "numpy") as tensors:
            names = set(tensors.keys())
            for weight, parts in _stored(base.g, shape, of_engine):
                if missing := [part for part in parts if part not in names]:
                    faults += [f"{part} is missing" for part in missing]
                    continue
                names -= set(parts)
                found = [tensors.get_tensor(part) for part in parts]
                if len({part.shape for part in found}) > 1:
                    faults.append(f"{weight.key} differs in shape between layers")
                    continue
                array = np.stack([part.T for part in found]) if of_engine else found[0]
                if array.shape != weight.shape:
                    faults.append(f"{weight.key} is {array.shape}, should be {weight.shape}")
                dtypes.append(array.dtype)
                items[weight.path] = array.astype(np.float32)
            if shape.vocabulary is not None and _VOCABULARY in names:
                names.remove(_VOCABULARY)
                items["vocabulary",] = ids = tensors.get_tensor(_VOCABULARY)
                if not _is_vocabulary(ids, shape.vocabulary, base.g.V):
                    faults.append(f"{_VOCABULARY} should be {shape.vocabulary} ascending token ids below {base.g.V}")
            elif shape.vocabulary is not None:
                faults.append(f"{_VOCABULARY} is missing")
            faults += [f"{name} is not expected" for name in sorted(names)]
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged or truncated ({error}).") from error
    if shape.noise is not None and shape.noise.high > base.g.V:
        faults.append(f"its noise is of ids below {shape.noise.high}, and the model has {base.g.V}")
    if faults:
        raise UserError(f"{file}: does not fit {where.name} and the base model: {'; '.join(faults)}.")
    return Adapter(folder, shape, unflatten_dict(items), config, dtypes[0])


def _stored(g: Geometry, shape: AdapterShape, of_engine: bool) -> list[tuple[Weight, list[str]]]:
    """Every array of an adapter, and the names of what it is stored as: itself, or for an engine its layers."""
    if not of_engine:
        return [(weight, [weight.key]) for weight in adapter_table(g, shape)]
    named = peft_names(g, shape.targets, shape.rank)
    return [(replace(weight, path=("lora", *weight.path)), parts) for weight, parts in named]


def _is_vocabulary(ids: np.ndarray, count: int, V: int) -> bool:
    if ids.dtype != np.int32 or ids.shape != (count,):
        return False
    return bool(ids[0] >= 0 and ids[-1] < V and np.all(np.diff(ids) > 0))
