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


def before(owner, name, count, action, only=lambda *_: True, half=None):
    """Disturb before the `count`-th call that `only` counts, or after half of it is done."""
    original, calls = getattr(owner, name), []

    def disturbed(*arguments, **named):
        if only(*arguments):
            calls.append(0)
            if len(calls) == count:
                if half:
                    half(*arguments)
                disturb(action)
        return original(*arguments, **named)

    setattr(owner, name, disturbed)


def is_metrics(journal, _):
    return journal.path.name == "metrics.jsonl"


def main(point, count, action, command, *arguments):
    if point == "tokenizer":
        before(Path, "rename", count, action, lambda path, to: Path(to).name == "tokenizer")
    elif point == "line":
        before(Journal, "write", count, action, is_metrics)
    elif point == "torn":
        before(Journal, "write", count, action, is_metrics, lambda journal, _: journal.file.write(b'{"step": 1, "los'))
    elif point == "save":
        before(Checkpoints, "save", count, action)
    elif point == "begun":
        original, calls = Checkpoints.save, []

        def save(*arguments):
            original(*arguments)
            calls.append(0)
            if len(calls) == count:
                disturb(action)

        Checkpoints.save = save
    elif point == "manifest":
        before(Path, "replace", count, action, lambda path, to: Path(to).name == "manifest.json")
    elif point == "cut":
        before(Path, "replace", count, action, lambda path, to: Path(to).name == "metrics.jsonl")
    elif point == "model":
        before(folder_writer, "save_file", count, action)
    else:
        raise ValueError(point)
    sys.argv = [command, *arguments]
    runpy.run_module(f"mtp_jax.{command}", run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
