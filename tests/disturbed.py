"""`python disturbed.py POINT N ACTION COMMAND ...`: run a command of mtp_jax and disturb it at a certain point.

POINT is where: `tokenizer` is written, a `line` of metrics, `torn` in its middle, a checkpoint `save` begins, a save
has `begun`, its `manifest` takes its name, metrics are `cut`, the `model` folder is written. N says which time. ACTION
is `kill`, or a folder whose disk is filled up.
"""

import contextlib
import os
import runpy
import signal
import sys
from pathlib import Path

from mtp_jax.model import folder_writer
from mtp_jax.runs.checkpoints import Checkpoints
from mtp_jax.runs.records import Journal

BALLAST = "ballast"


def disturb(action):
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    with contextlib.suppress(OSError), (Path(action) / BALLAST).open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while file.write(b"\0" * size):
                    pass


def is_metrics(journal, _):
    return journal.path.name == "metrics.jsonl"


def arrange(point, count, action, patch=setattr):
    """Let a point be disturbed when it is reached in this process; `patch` sets attributes."""

    def before(owner, name, only=lambda *_: True, half=None, after=False):
        """Disturb before or after the `count`-th call that `only` counts, or when half of it is done."""
        original, calls = getattr(owner, name), []

        def disturbed(*arguments, **named):
            if counts := only(*arguments):
                calls.append(0)
            now = counts and len(calls) == count
            if now and not after:
                if half:
                    half(*arguments)
                disturb(action)
            result = original(*arguments, **named)
            if now and after:
                disturb(action)
            return result

        patch(owner, name, disturbed)

    if point == "tokenizer":
        before(Path, "rename", lambda path, to: Path(to).name == "tokenizer")
    elif point == "line":
        before(Journal, "write", is_metrics)
    elif point == "torn":
        before(Journal, "write", is_metrics, lambda journal, _: journal.file.write(b'{"step": 1, "los'))
    elif point in ("save", "begun"):
        before(Checkpoints, "save", after=point == "begun")
    elif point == "manifest":
        before(Path, "replace", lambda path, to: Path(to).name == "manifest.json")
    elif point == "cut":
        before(Path, "replace", lambda path, to: Path(to).name == "metrics.jsonl")
    elif point == "model":
        before(folder_writer, "save_file")
    else:
        raise ValueError(point)


def main(point, count, action, command, *arguments):
    arrange(point, count, action)
    sys.argv = [command, *arguments]
    runpy.run_module(f"mtp_jax.{command}", run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
