"""The folder of a run, which may be in a bucket.

A run in a bucket works in a local folder, each process in its own. A file goes to the bucket when it is complete; of
several that belong together, the one that marks them complete goes last. A run resumes from the bucket alone: nothing
else survives.
"""

import shutil
import traceback
from pathlib import Path
from typing import Any

import jax

from mtp_jax import storage
from mtp_jax.errors import Unreachable, UserError, faults_of
from mtp_jax.files import expanded

RECORDS = ("metrics.jsonl", "timing.jsonl", "tensorboard", "logs")


class RunFolder:
    """The local folder where a run works, `path`, and its counterpart in a bucket; without one, nothing is transferred.

    Use as a context once the folder is claimed: on the way out, what the run recorded is pushed.
    """

    def __init__(self, name: str):
        self.bucket = name.rstrip("/") if storage.is_bucket(name) else None
        self.path, self.begun = expanded(name), False
        if self.bucket is not None:
            # Not even processes on one machine share a folder.
            here = storage.scratch_for(f"{self.bucket} {jax.process_index()}")
            self.path = here / self.bucket.rsplit("/", 1)[-1]

    def name(self, path: Path | None = None) -> str:
        """What the user calls the folder, or a path in it."""
        path = path or self.path
        if self.bucket is None:
            return str(path)
        return "/".join((self.bucket, *path.relative_to(self.path).parts))

    def begin(self) -> None:
        """Start with an empty folder: what an earlier process left on this machine may be outdated."""
        if self.bucket is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
            self.begun = True

    # ---- from the bucket

    def pull(self, path: Path, last: str = "") -> None:
        """Download a file, or what is missing here of a folder; nothing of a folder that lacks its file `last`."""
        if self.bucket is None:
            return
        there = storage.listing(self.name(path))
        if last and last not in there:
            return
        storage.download(self.name(path), (name for name in there if not (path / name).is_file()), path)

    def pull_names(self, folder: Path, last: str) -> None:
        """Make the folders that `folder` holds, each with its file `last` alone."""
        if self.bucket is None:
            return
        there = [name for name in storage.listing(self.name(folder)) if "/" in name]
        for name in there:
            (folder / name.split("/")[0]).mkdir(parents=True, exist_ok=True)
        storage.download(self.name(folder), (name for name in there if name.split("/")[1:] == [last]), folder)

    # ---- to the bucket

    def push(self, path: Path) -> None:
        """Upload a file, or the files of a folder."""
        if self.bucket is None:
            return
        found = [path] if path.is_file() else [inner for inner in path.rglob("*") if inner.is_file()]
        paths = (inner.relative_to(self.path).as_posix() for inner in found if not inner.name.endswith(".part"))
        storage.upload(self.path, paths, self.bucket)

    def push_result(self, folder: Path, last: str) -> None:
        """Upload a whole folder in place of an older one; its file `last`, which marks it complete, goes last."""
        if self.bucket is not None:
            storage.replace(folder, self.name(folder), last)

    def push_records(self) -> None:
        """Upload what this process has recorded so far, in files that may still grow."""
        if self.bucket is None:
            return
        for name in RECORDS:
            found = self.path / name
            for path in [found] if found.is_file() else sorted(found.rglob("*")):
                if path.is_file():
                    storage.write(self.name(path), path.read_bytes())

    def move(self, path: Path, to: Path, last: str) -> None:
        """Rename a folder in the bucket as it was renamed here."""
        if self.bucket is not None:
            storage.move(self.name(path), self.name(to), last)

    def remove(self, path: Path, first: str) -> None:
        """Remove a folder from the bucket, its file `first` first."""
        if self.bucket is not None:
            storage.remove(self.name(path), first, storage.listing(self.name(path)))

    def drop(self, folder: Path, but: str) -> None:
        """Delete the local copy of a folder that the bucket holds, except one file."""
        if self.bucket is None:
            return
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != but:
                path.unlink()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not self.begun:
            return
        if error is not None and jax.process_index() != 0 and faults_of(error) is None:
            traceback.print_exception(error)  # to this process's log, before the log is pushed
        try:
            if not isinstance(error, Unreachable):
                self.push_records()
        except UserError:
            if error is None:
                raise
        finally:
            shutil.rmtree(self.path, ignore_errors=True)
