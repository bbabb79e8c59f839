"""What is exported: an adapter and the base it belongs to, or a whole model that a run trained."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mtp_jax import storage
from mtp_jax.errors import UserError
from mtp_jax.model.folder import (
    find_folder,
    match_table,
    read_geometry,
    read_json,
    stored_dtype,
    stored_tensors,
)
from mtp_jax.model.geometry import Geometry
from mtp_jax.model.weights import Params, weight_table
from mtp_jax.mtp.adapter import AdapterShape
from mtp_jax.mtp.adapter_folder import CONFIG, TENSORS, find_adapter, load_adapter


@dataclass(frozen=True)
class Trained:
    """An adapter as it was read."""

    folder: Path
    shape: AdapterShape
    arrays: Params
    config: dict[str, Any]  # its mtp_config.json
    dtype: np.dtype  # stored


@dataclass(frozen=True)
class Source:
    """What an export is made from; `folder` holds the model's weights."""

    folder: Path
    g: Geometry
    adapter: Trained | None  # None for a whole model
    name: str  # of the base, as the adapter knows it
    revision: str | None  # of the base on the hub

    @property
    def hub_name(self) -> str | None:
        """The base's name where others can load it."""
        return self.name if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", self.name) and not Path(self.name).exists() else None


def find_source(run: str | None, adapter: str | None, model: str | None) -> Source:
    """Read and check what a run or an adapter's folder holds; writes nothing.

    Args:
        model: the base's folder or hub name, where it is not where the adapter was trained with it.
    Raises:
        UserError: a run without result, an adapter of another base, a base that cannot be found or read.
    """
    if run is not None:
        result = _result(run.rstrip("/"))
        if result.name == "model":
            g = read_geometry(result)
            match_table(weight_table(g), g, stored_tensors(result), result)
            return Source(result, g, None, result.parent.name, None)
        adapter = str(result)
    assert adapter is not None
    found = find_adapter(adapter)
    config = read_json(found / CONFIG)
    base = config.get("base") or {}
    name, revision = str(base.get("name", "")), base.get("revision")
    folder = _base_folder(found, name, revision, model)
    g = read_geometry(folder)
    match_table(weight_table(g), g, stored_tensors(folder), folder)
    shape, arrays = load_adapter(found, g, folder)
    if revision is None and folder.parent.name == "snapshots":  # where the hub's library keeps a revision
        revision = folder.name
    trained = Trained(found, shape, arrays, config, stored_dtype_of(found / TENSORS))
    return Source(folder, g, trained, name, revision)


def stored_dtype_of(file: Path) -> np.dtype:
    """The dtype of a safetensors file's tensors."""
    from safetensors import safe_open

    with safe_open(file, "numpy") as tensors:
        return next(iter(tensors.get_tensor(key).dtype for key in sorted(tensors.keys())))


def _result(run: str) -> Path:
    folder = storage.local(run)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"--run {run}: holds no config.yaml, so this is no run's output folder.")
    for name, file in (("adapter", CONFIG), ("model", "config.json")):
        if (folder / name / file).is_file():
            return folder / name
    if storage.is_bucket(run):
        saved = {path.split("/")[0] for path in storage.listing(f"{run}/checkpoints")}
    else:
        saved = {path.name for path in (folder / "checkpoints").glob("*")}
    steps = [int(name) for name in saved if name.isdigit()]
    so_far = f"; its newest checkpoint is of step {max(steps)}" if steps else " and no checkpoint"
    raise UserError(
        f"--run {run}: has no finished model or adapter{so_far}. Let the run end, with the command it was started with."
    )


def _base_folder(adapter: Path, name: str, revision: str | None, model: str | None) -> Path:
    if model is not None:
        return find_folder(model)
    if (adapter / "config.json").is_file():  # an exported folder that holds its base
        return adapter
    try:
        return find_folder(name, revision)
    except UserError as error:
        raise UserError(
            f"{adapter}: the base model {name!r} that it was trained for is not there; name its folder with --model. "
            + " ".join(error.faults)
        ) from error


def dtype_of_model(source: Source) -> np.dtype:
    """The dtype most of a model's tensors are stored in."""
    return stored_dtype(source.folder)
