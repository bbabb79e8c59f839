"""An output folder belongs to one run, and to one process group at a time."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from mtp_jax.config import Config
from mtp_jax.config_file import dump, validate
from mtp_jax.errors import FULL_DISK, UserError
from mtp_jax.runs.folder import RunFolder
from mtp_jax.storage import BucketLock

# A run may continue with other values of these; any other change would change what it computes.
FREE = ("output_dir", "checkpoints", "logging", "compilation_cache", "mesh", "data.bad_records")


@contextlib.contextmanager
def claim(run: RunFolder, config: Config) -> Iterator[None]:
    """Within: the output folder belongs to this run and this process group alone."""
    written = run.path / "config.yaml"
    with _locked(run.path) if run.bucket is None else BucketLock(run.bucket):
        run.begin()
        run.pull(written)
        if written.exists():
            _check_same_run(run, written, config)
        part = run.path / ".config.yaml.part"
        part.write_text(dump(config), encoding="utf-8")
        part.replace(written)
        run.push(written)
        yield


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Within: the folder is locked for this process; the system releases the lock when the process ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
    except OSError as error:
        if error.errno in FULL_DISK:
            raise
        raise UserError(f"output_dir: {folder} cannot be written ({error.strerror}).") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"output_dir: {folder} is in use by another run that has not ended.") from error
        yield


def _check_same_run(run: RunFolder, written: Path, config: Config) -> None:
    try:
        before = yaml.safe_load(written.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        before = None
    if not isinstance(before, dict):
        raise UserError(
            f"output_dir: {run.name(written)} is damaged; choose another output_dir, or delete this one to start "
            "afresh."
        )
    with contextlib.suppress(UserError):  # keys that this version has and the run's did not take their defaults
        before = validate(before, run.name(written)).model_dump()
    changes = _changes(before, config.model_dump())
    changed = [path for path in changes if path.split(".")[0] not in FREE and path.removesuffix("_limit") not in FREE]
    if changed:
        raise UserError(
            f"output_dir: {run.name()} holds a run with other values of {', '.join(changed)}; "
            "choose another output_dir, or delete this one to start afresh."
        )


def _changes(a: Any, b: Any, path: str = "") -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            yield from _changes(a.get(key), b.get(key), f"{path}.{key}" if path else key)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _changes(x, y, f"{path}.{i}")
    elif a != b:
        yield path
