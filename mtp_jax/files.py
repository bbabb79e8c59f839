"""Files of this machine: paths as people write them, caches that may be missing, JSON, and folders whole or absent."""

import atexit
import codecs
import contextlib
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtp_jax.errors import UserError, warn


def expanded(name: str | os.PathLike[str]) -> Path:
    """A path with ~ replaced; where there is no such home, as it is, so that it is reported as missing."""
    return Path(os.path.expanduser(name))  # noqa: PTH111  (that of Path raises)


def cache_folder(name: str) -> Path | None:
    """A folder to keep things in between runs, made where there is none; None, with one warning, where it cannot be."""
    return _writable(expanded(name))


@functools.cache
def _writable(folder: Path) -> Path | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        warn(f"{folder}: cannot be written ({error.strerror or error}), so nothing is kept there for the next time.")
        return None


@functools.cache
def scratch_folder() -> Path:
    """A folder for as long as this process runs, in place of a cache that cannot be written."""
    folder = tempfile.mkdtemp(prefix="mtp_jax-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file in UTF-8, also one that begins with a byte order mark.

    Raises:
        UserError: the file is missing, unreadable or no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}).") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: should hold a JSON object, not a {type(value).__name__}.")
    return value


def starts_with_mark(file: Path) -> bool:
    """Whether a file starts with a byte order mark, which transformers does not read in JSON."""
    with file.open("rb") as opened:
        return opened.read(3) == codecs.BOM_UTF8


def write_json(path: Path, value: dict[str, Any], sort_keys: bool = True) -> None:
    """Write a JSON object that people may read."""
    path.write_text(json.dumps(value, indent=2, sort_keys=sort_keys) + "\n", encoding="utf-8")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is never seen half written: under a temporary name beside it, which then takes its place."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_or_absent(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` to write into, which takes its name, and its place, when all is on disk."""
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        for path in (path for path in part.rglob("*") if path.is_file()):
            with path.open("rb") as file:
                os.fsync(file.fileno())
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    part.rename(out)
    shutil.rmtree(old, ignore_errors=True)
