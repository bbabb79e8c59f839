"""Checkpoints: what is trained, its optimizer, the step and the data iterator, saved in the background by Orbax."""

import logging
import sys
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp

from mtp_jax.config import Checkpoints as CheckpointConfig
from mtp_jax.errors import UserError
from mtp_jax.training.step import TrainState


class Checkpoints:
    """The checkpoint folder of a run. A checkpoint exists under its final name only when it is complete.

    Use as a context: on the way out, saves still under way are finished, and their errors raised.
    """

    def __init__(self, folder: Path, config: CheckpointConfig):
        # Orbax warns of choices made here on purpose and logs, with tracebacks, the errors that it then raises; asyncio
        # does so for the arrays that were not waited for after the first error.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        self.folder = folder
        self.manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest(self) -> int | None:
        """Step of the newest checkpoint."""
        return self.manager.latest_step()

    def save(self, state: TrainState, batches: grain.DatasetIterator) -> None:
        """Start saving; the arrays are copied before this returns, so that the state may be donated."""
        self.manager.save(
            int(state.step),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state._asdict()), data=grain.checkpoint.CheckpointSave(batches)
            ),
        )

    def restore(self, step: int, like: TrainState, batches: grain.DatasetIterator) -> TrainState:
        """The state of a checkpoint, placed like `like` (shapes and shardings); `batches` moves to where it was.

        Raises:
            UserError: a checkpoint that cannot be read.
        """
        try:
            restored = self.manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(like._asdict()), data=grain.checkpoint.CheckpointRestore(batches)
                ),
            )
        except Exception as error:  # damage shows as whatever the reader stumbles over
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"{self.folder / str(step)}: the checkpoint cannot be restored ({reason}); "
                "delete this folder to resume from the one before it."
            ) from error
        return jax.block_until_ready(TrainState(**restored["state"]))

    def finish(self) -> None:
        """Wait until everything is on disk; raises the error of a save that failed in the background."""
        self.manager.wait_until_finished()
        self.manager.check_for_errors()

    def __enter__(self) -> "Checkpoints":
        self.say_unraisable = sys.unraisablehook
        sys.unraisablehook = self._unraisable
        return self

    def _unraisable(self, what: Any) -> None:
        # When the writing of one array fails, the others report to an event loop that Orbax has closed by then.
        if "Event loop is closed" not in str(what.exc_value):
            self.say_unraisable(what)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        failures = []
        for end in (self.finish, self.manager.close):  # the second raises the error of the first again
            try:
                end()
            except Exception as failure:
                failures.append(failure)
        if failures and isinstance(error, UserError):
            fault = f"{self.folder}: the last checkpoint was not saved ({failures[0]})."
            raise UserError(*error.faults, fault) from failures[0]
        if failures:
            raise failures[0]
        sys.unraisablehook = self.say_unraisable
