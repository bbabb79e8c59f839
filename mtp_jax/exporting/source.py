"""What is exported: an adapter with its base, or a whole model that a run trained."""

import re
from dataclasses import dataclass
from pathlib import Path

from mtp_jax import storage
from mtp_jax.errors import UserError
from mtp_jax.files import read_json
from mtp_jax.locate import find_folder
from mtp_jax.model.base import Base, open_base
from mtp_jax.mtp.adapter_folder import CONFIG, Adapter, files_of, find_adapter, open_adapter


@dataclass(frozen=True)
class Source:
    """What an export is made from."""

    base: Base  # of the adapter; or the model itself
    adapter: Adapter | None  # None for a whole model
    name: str  # of the base, as the adapter knows it
    revision: str | None  # of the base on the hub

    @property
    def hub_name(self) -> str | None:
        """The name by which others can load the base from the hub, if it has one."""
        return self.name if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", self.name) and not Path(self.name).exists() else None


def find_source(run: str | None, adapter: str | None, model: str | None) -> Source:
    """Open and check what a run's or an adapter's folder holds; writes nothing.

    Args:
        model: the base's folder or hub name, where it is no longer where the adapter was trained with it.
    Raises:
        UserError: a run without result, an adapter of another base, a base that cannot be found or read.
    """
    if run is not None:
        result = _result(run.rstrip("/"))
        if result.name == "model":
            return Source(open_base(str(result)), None, result.parent.name, None)
        adapter = str(result)
    assert adapter is not None
    folder = find_adapter(adapter)
    pointer = read_json(files_of(folder)[0]).get("base") or {}
    name, revision = str(pointer.get("name", "")), pointer.get("revision")
    where, weights = _base_folder(folder, name, revision, model), str(pointer.get("weights", "stored"))
    base = open_base(str(where), weights=weights)
    if revision is None and base.folder.parent.name == "snapshots":  # where the hub's library keeps a revision
        revision = base.folder.name
    return Source(base, open_adapter(str(folder), base), name, revision)


_OF_BASE = ("fingerprint", "values", "weights")


def pointer_of(source: Source) -> dict[str, str]:
    """What an adapter's config says of its base."""
    assert source.adapter is not None
    known = {key: value for key, value in source.adapter.config["base"].items() if key in _OF_BASE}
    return {"name": source.name, **known, **({} if source.revision is None else {"revision": source.revision})}


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
        f"--run {run}: has no finished model or adapter{so_far}. Rerun the training command to finish the run."
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
