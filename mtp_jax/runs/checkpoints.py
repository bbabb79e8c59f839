"""Checkpoints: what is trained, its optimizer, the step and the data iterator, saved in the background by Orbax.

    checkpoints/120/state/         the arrays, by Orbax; all processes write
    checkpoints/120/data/0.json    the data iterator, a file per process, named after the first sequence it feeds
    checkpoints/120/manifest.json  size and sha256 of every other file, written last: without it 120 is unfinished

A damaged checkpoint is set aside as 120.damaged and kept; an unfinished one is set aside as 120.unfinished until the
next checkpoint is finished. In a bucket, each process uploads the files it wrote, and the first uploads the manifest
when all have reported theirs; the local copy then keeps the manifest alone.
"""

import json
import logging
import os
import re
import shutil
import sys
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import orbax.checkpoint as ocp

from mtp_jax.config import Checkpoints as CheckpointConfig
from mtp_jax.data.batches import merge_states
from mtp_jax.errors import FULL_DISK, UserError, reason, warn
from mtp_jax.runs import processes
from mtp_jax.runs.folder import RunFolder
from mtp_jax.runs.manifest import MANIFEST, digests, fault_of, read_manifest, write_manifest

State = TypeVar("State", bound=Any)  # a named tuple of trees, with a `step`


@runtime_checkable
class Resumable(Protocol):
    """Batches that can say where they are and go there."""

    def get_state(self) -> Any:
        """What JSON can hold."""

    def set_state(self, state: Any) -> None:
        """The inverse."""


class Checkpoints:
    """The checkpoint folder of a run. A checkpoint exists from the moment its manifest does.

    Use as a context: on the way out, pending saves are finished, and their errors raised.
    """

    def __init__(self, run: RunFolder, config: CheckpointConfig, first_sequence: int = 0):
        """`first_sequence`: the first sequence of the batch that this process feeds."""
        # Orbax warns of choices made here on purpose, and logs, with tracebacks, errors that it then raises; asyncio
        # logs those of arrays that nobody awaited after the first error.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self.run, self.folder = run, (run.path / "checkpoints").absolute()
        self.config, self.first_sequence = config, first_sequence
        # Two queues of one thread each: Orbax may save the next checkpoint while the last one is still being hashed.
        self.committer, self.sealer = ThreadPoolExecutor(1, "commit"), ThreadPoolExecutor(1, "seal")
        self.saved: Future[None] | None = None
        self.pending: deque[Future[None]] = deque()

    # ---- finding and restoring

    def latest(self) -> int | None:
        """Step of the newest whole checkpoint; damaged ones are set aside with a warning.

        Raises:
            UserError: a folder that cannot be read or written.
        """
        return processes.from_first(self._newest_whole)

    def _newest_whole(self) -> int | None:
        self.run.pull_names(self.folder, MANIFEST)
        steps = sorted(self._steps(), reverse=True)
        for step in steps:
            if self._is_whole(step):
                return step
        if steps:
            warn(
                f"{self._name()}: no whole checkpoint is left. The run starts afresh from step 0; its metrics are "
                "written anew, and come out the same."
            )
        return None

    def is_whole(self, step: int) -> bool:
        """Whether a checkpoint exists with every byte as it was written; a damaged one is set aside with a warning."""
        return processes.from_first(lambda: self._is_whole(step))

    def _is_whole(self, step: int) -> bool:
        path, name = self.folder / str(step), self._name(step)
        if not path.is_dir():
            return False
        if not (path / MANIFEST).exists():
            aside = self._set_aside(path, "unfinished")
            warn(f"{name}: this checkpoint was never finished (it has no {MANIFEST}). It is set aside as {aside.name}.")
            return False
        self.run.pull(path)
        fault = fault_of(path)
        if fault is not None:
            aside = self._set_aside(path, "damaged")
            warn(f"{name}: this checkpoint is damaged: {fault}. It is set aside as {aside.name}.")
        return fault is None

    def _name(self, step: int | None = None) -> str:
        return self.run.name(self.folder if step is None else self.folder / str(step))

    def _steps(self) -> list[int]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return [int(path.name) for path in self.folder.iterdir() if re.fullmatch(r"[1-9]\d*", path.name)]
        except OSError as error:
            if error.errno in FULL_DISK:
                raise
            raise UserError(f"output_dir: {self.folder} cannot be written ({error.strerror}).") from error

    def _set_aside(self, path: Path, why: str) -> Path:
        names = (path.with_name(f"{path.name}.{why}{'' if n == 1 else f'-{n}'}") for n in range(1, 1000))
        aside = next(name for name in names if not name.exists())
        try:
            path.rename(aside)
        except OSError as error:
            raise UserError(f"{path}: {why}, and it cannot be renamed to {aside.name} ({error.strerror}).") from error
        self.run.move(path, aside, MANIFEST)
        self.run.drop(aside, MANIFEST)
        return aside

    def restore(self, step: int, like: State, batches: Resumable | None = None) -> State:
        """The state of a whole checkpoint, placed like `like` (shapes and shardings); `batches` is moved to its place.

        Raises:
            UserError: a checkpoint that does not fit `like`.
        """
        path = self.folder / str(step)
        self.run.pull(path)
        try:
            if self.run.bucket and not processes.is_first() and (fault := fault_of(path)):
                raise ValueError(f"it was damaged on the way: {fault}")
            if batches is not None:
                files = [name for name in read_manifest(path)["files"] if name.startswith("data/")]
                batches.set_state(merge_states([json.loads((path / name).read_text()) for name in sorted(files)]))
            with ocp.StandardCheckpointer() as reader:
                restored = reader.restore(path / "state", like._asdict())
        except Exception as error:  # a checkpoint that does not fit shows as any error of the reader
            raise UserError(
                f"{self._name(step)}: the checkpoint is undamaged but cannot be restored ({reason(error)}); "
                "delete this folder to resume from the checkpoint before it."
            ) from error
        state = jax.block_until_ready(type(like)(**restored))
        self.run.drop(path, MANIFEST)
        return state

    # ---- saving

    def save(self, state: Any, batches: Resumable, best: int | None = None) -> None:
        """Start saving; the arrays are copied before this returns, so the state may be donated.

        Args:
            best: step of the best checkpoint, which is kept along with the newest ones.
        """
        while len(self.pending) > 1:  # one may still be hashed while the next is being saved
            self.pending.popleft().result()
        step = int(state.step)
        path = self.folder / str(step)
        self._write_data(path / "data", batches.get_state())
        checkpointer, form = _checkpointer(shared=self.run.bucket is None)
        if self.saved is not None:
            self.saved.result()
        checkpointer.save(path / "state", args=form(state._asdict()))
        self.saved = self.committer.submit(_commit, checkpointer)
        self.pending.append(self.sealer.submit(self._seal, step, best, self.saved))

    def _write_data(self, folder: Path, state: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{self.first_sequence}.{jax.process_index()}.part"
        with part.open("w", encoding="utf-8") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(folder / f"{self.first_sequence}.json")  # processes that feed the same sequences write the same

    def _seal(self, step: int, best: int | None, saved: "Future[None]") -> None:
        saved.result()
        path, apart = self.folder / str(step), self.run.bucket is not None
        if processes.is_first() or apart:
            files = digests(path)
        if apart and not processes.is_first():
            self.run.push(path)
        if apart:
            self.run.push_records()  # up to this step at least: a checkpoint is never ahead of its metrics
            # Of files of the same name, the first process's counts: it is uploaded last.
            reported = processes.to_first(f"checkpoint/{step}", files)
            files = {name: entry for some in reversed(reported) for name, entry in some.items()}
        if processes.is_first():
            self.run.push(path)
            write_manifest(path, step, files)
            self.run.push(path / MANIFEST)
            self.run.drop(path, MANIFEST)
            self._prune(step, best)
        elif apart:
            shutil.rmtree(path)

    def _prune(self, newest: int, best: int | None) -> None:
        """Keep the newest checkpoints and the best; nothing newer than `newest` is touched."""
        steps = sorted(step for step in self._steps() if step <= newest)
        finished = [step for step in steps if (self.folder / str(step) / MANIFEST).exists()]
        for step in set(steps) - {*finished[-self.config.keep :], best}:
            (self.folder / str(step) / MANIFEST).unlink(
                missing_ok=True
            )  # one that is half removed counts as unfinished
            self.run.remove(self.folder / str(step), MANIFEST)
            shutil.rmtree(self.folder / str(step))
        for path in self.folder.glob("*.unfinished*"):
            self.run.remove(path, MANIFEST)
            shutil.rmtree(path, ignore_errors=True)

    def finish(self) -> None:
        """Wait until everything is on disk; raises the error of a save that failed in the background."""
        while self.pending:
            self.pending.popleft().result()

    def __enter__(self) -> "Checkpoints":
        self.say_unraisable = sys.unraisablehook
        sys.unraisablehook = self._unraisable
        return self

    def _unraisable(self, what: Any) -> None:
        # When writing one array fails, the others report to an event loop that Orbax has closed by then.
        if "Event loop is closed" not in str(what.exc_value):
            self.say_unraisable(what)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        failure = None
        while self.pending:
            try:
                self.finish()
            except Exception as found:
                failure = failure or found
        self.committer.shutdown()
        self.sealer.shutdown()
        if failure is not None and isinstance(error, UserError):
            raise UserError(
                *error.faults, f"{self._name()}: the last checkpoint was not saved ({failure})."
            ) from failure
        if failure is not None:
            raise failure
        sys.unraisablehook = self.say_unraisable


def _checkpointer(shared: bool) -> tuple[ocp.AsyncCheckpointer, Any]:
    """For processes that share a folder, or have one each, whose files can then be merged by copying."""
    if shared:
        return ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler()), ocp.args.StandardSave
    each = ocp.options.MultiprocessingOptions(primary_host=None)
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, multiprocessing_options=each)
    return ocp.AsyncCheckpointer(handler, multiprocessing_options=each), ocp.args.PyTreeSave


def _commit(checkpointer: ocp.AsyncCheckpointer) -> None:
    try:
        checkpointer.wait_until_finished()
    finally:
        checkpointer.close()
