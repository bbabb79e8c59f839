"""What a run writes about itself: metrics.jsonl (deterministic), timing.jsonl (the rest), and trackers on request."""

import importlib.util
import io
import json
import os
from pathlib import Path
from typing import Any

from mtp_jax.config import Config
from mtp_jax.errors import UserError
from mtp_jax.runs import processes


class Journal:
    """A file of JSON lines, each with a `step`. Every line reaches the system before `write` returns.

    Only the first process has one; in the others nothing is read or written.
    """

    def __init__(self, path: Path):
        self.path = path
        self.file = self._open()

    def _open(self) -> io.FileIO | None:
        # Without a buffer of Python's own, nothing is left to be written when a full disk ends the run.
        return io.FileIO(self.path, "a") if processes.is_first() else None

    def cut(self, step: int) -> None:
        """Drop what was written after `step`, and a last line that a crash left unfinished."""
        if self.file is None:
            return
        self.file.close()
        kept = [line for line in self.path.read_bytes().splitlines(keepends=True) if _step(line, step + 1) <= step]
        part = self.path.with_name(f".{self.path.name}.part")
        with part.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.path)
        self.file = self._open()

    def write(self, record: dict[str, Any]) -> None:
        """Append one line."""
        line = (json.dumps(record) + "\n").encode()
        while self.file is not None and line:  # an almost full disk takes a part of it
            line = line[self.file.write(line) :]

    def records(self) -> list[dict[str, Any]]:
        """All lines."""
        return [] if self.file is None else [json.loads(line) for line in self.path.read_bytes().splitlines()]

    def last_figures(self) -> dict[str, Any]:
        """The newest line with held-out figures, without their prefix; empty where there is none."""
        for record in reversed(self.records()):
            if "held_out_loss" in record:
                return {name.removeprefix("held_out_"): value for name, value in record.items()}
        return {}

    def sync(self) -> None:
        """Force everything to disk."""
        if self.file is not None:
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Force everything to disk, and write no more."""
        self.sync()
        if self.file is not None:
            self.file.close()


def _step(line: bytes, broken: int) -> int:
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else broken
    except (ValueError, KeyError, TypeError):
        return broken


def check_trackers(config: Config) -> None:
    """Refuse trackers whose packages are not installed."""
    asked = {"tensorboard": ("tensorboardX", config.logging.tensorboard), "wandb": ("wandb", config.logging.wandb)}
    faults = [
        f"logging.{name} needs a package: pip install 'mtp_jax[{name}]'."
        for name, (package, wanted) in asked.items()
        if wanted and importlib.util.find_spec(package) is None
    ]
    if faults:
        raise UserError(*faults)


class Trackers:
    """TensorBoard and Weights & Biases, each only where the config asks for it; what came after `start` is hidden.

    Only the first process reports.
    """

    def __init__(self, config: Config, run_dir: Path, start: int):
        self.board = self.wandb = None
        if not processes.is_first():
            return
        if config.logging.tensorboard:
            from tensorboardX import SummaryWriter

            self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start + 1)
        if config.logging.wandb:
            import wandb

            self.wandb = wandb.init(
                project=config.logging.wandb, id=run_dir.name, resume="allow", dir=run_dir, config=config.model_dump()
            )

    def write(self, record: dict[str, Any]) -> None:
        """Record the numbers of one step."""
        values: dict[str, float] = {}
        for name, value in record.items():
            if isinstance(value, list):
                values |= {f"{name}/{i + 1}": entry for i, entry in enumerate(value)}
            elif isinstance(value, dict):
                values |= {f"{name}/{key}": entry for key, entry in value.items()}
            elif name != "step":
                values[name] = value
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, record["step"])
        if self.wandb:
            self.wandb.log(values, step=record["step"])

    def close(self) -> None:
        """Finish both."""
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()
