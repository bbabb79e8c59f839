"""The manifest of a checkpoint: size and sha256 of each of its files, written last and checked before restoring."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_THREADS = 4  # hashing releases the interpreter lock; more threads would only compete for the disk

Files = dict[str, dict[str, Any]]


def digests(folder: Path) -> Files:
    """Size and sha256 of every file of a checkpoint; on return all of them are on disk."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    with ThreadPoolExecutor(_THREADS) as threads:
        found = list(threads.map(lambda path: _digest(path, sync=True), paths))
    return {
        path.relative_to(folder).as_posix(): {"bytes": size, "sha256": digest}
        for path, (size, digest) in zip(paths, found, strict=True)
    }


def write_manifest(folder: Path, step: int, files: Files) -> None:
    """Write the manifest of a checkpoint, which appears whole or not at all."""
    content = {"step": step, "files": files}
    part = folder / f".{MANIFEST}.part"
    with part.open("w", encoding="utf-8") as file:
        file.write(json.dumps({**content, "sha256": _own_digest(content)}, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(folder / MANIFEST)
    sync_folder(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest's content; raises OSError or ValueError where it cannot be read or has changed since."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != _own_digest(manifest):
        raise ValueError("it has changed since it was written")
    return manifest


def fault_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint that has a manifest; None where every byte is as it was written."""
    try:
        manifest = read_manifest(folder)
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    if manifest["step"] != int(folder.name):
        return f"it is the checkpoint of step {manifest['step']}"

    def fault(item: tuple[str, dict[str, Any]]) -> str | None:
        name, entry = item
        path = folder / name
        try:
            size = path.stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size} bytes instead of {entry['bytes']}"
            if _digest(path)[1] != entry["sha256"]:
                return f"{name} has changed since it was written: its sha256 differs"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        return None

    with ThreadPoolExecutor(_THREADS) as threads:
        return next((found for found in threads.map(fault, manifest["files"].items()) if found), None)


def _digest(path: Path, sync: bool = False) -> tuple[int, str]:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256")  # reads a bounded part of the file at a time
        return file.tell(), digest.hexdigest()


def _own_digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
