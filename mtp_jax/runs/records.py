"""What a run records: metrics.jsonl (deterministic), timing.jsonl, trackers on request, and its best step."""

import importlib.util
import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mtp_jax.config import Config
from mtp_jax.errors import UserError
from mtp_jax.runs import processes

_HELD_OUT = "held_out_"


class Journal:
    """A file of JSON lines, each with a `step`. Every line reaches the system before `write` returns.

    Only the first process has one; in the others nothing is read or written.
    """

    def __init__(self, path: Path):
        self.path = path
        self.file = self._open()

    def _open(self) -> io.FileIO | None:
        # Python buffers nothing, so nothing is left to be written when a full disk ends the run.
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

    def write(self, line: dict[str, Any]) -> None:
        """Append one line."""
        data = (json.dumps(line) + "\n").encode()
        while self.file is not None and data:  # an almost full disk takes only part of it
            data = data[self.file.write(data) :]

    def lines(self) -> list[dict[str, Any]]:
        """All lines."""
        return [] if self.file is None else [json.loads(line) for line in self.path.read_bytes().splitlines()]

    def at(self, step: int, name: str) -> Any:
        """What a line of `step` holds under `name`; None where no line does."""
        return next((line[name] for line in self.lines() if line["step"] == step and name in line), None)

    def last_figures(self) -> dict[str, Any]:
        """The newest line with held-out figures, without their prefix; empty where there is none."""
        for line in reversed(self.lines()):
            if f"{_HELD_OUT}loss" in line:
                return {name.removeprefix(_HELD_OUT): value for name, value in line.items()}
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
    """TensorBoard and Weights & Biases, where the config asks for them; what they hold beyond `start` is hidden.

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

    def write(self, line: dict[str, Any]) -> None:
        """Report the numbers of one line."""
        values: dict[str, float] = {}
        for name, value in line.items():
            if isinstance(value, list):
                values |= {f"{name}/{i + 1}": entry for i, entry in enumerate(value)}
            elif isinstance(value, dict):
                values |= {f"{name}/{key}": entry for key, entry in value.items()}
            elif name != "step":
                values[name] = value
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, line["step"])
        if self.wandb:
            self.wandb.log(values, step=line["step"])

    def close(self) -> None:
        """Finish both."""
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()


class Best:
    """The best step by its held-out figures: most tokens per step at most masks, if estimated; then smallest loss."""

    def __init__(self, lines: Iterable[dict[str, Any]]):
        self.step: int | None = None
        self.figures: dict[str, Any] = {}
        for line in lines:
            self.offer(line["step"], line)

    def offer(self, step: int, line: dict[str, Any]) -> bool:
        """Take a line of metrics; returns whether its held-out figures are better than all before."""
        if f"{_HELD_OUT}loss" not in line:
            return False
        figures = {"step": step} | {name.removeprefix(_HELD_OUT): value for name, value in line.items()}
        if self.step is not None and _goodness(figures) <= _goodness(self.figures):
            return False
        self.step, self.figures = step, figures
        return True

    def write(self, path: Path) -> None:
        """Write the step and the figure it is the best by."""
        name, value = _figure(self.figures)
        part = path.with_name(f".{path.name}.part")
        part.write_text(json.dumps({"step": self.step, "by": name, "value": value}) + "\n", encoding="utf-8")
        part.replace(path)


def _figure(figures: dict[str, Any]) -> tuple[str, float]:
    estimate = figures.get("tokens_per_step")
    if estimate:
        masks = max(estimate, key=int)
        return f"{_HELD_OUT}tokens_per_step.{masks}", estimate[masks]
    return f"{_HELD_OUT}loss", figures["loss"]


def _goodness(figures: dict[str, Any]) -> tuple[float, float]:
    name, value = _figure(figures)
    return 0.0 if name.endswith("loss") else value, -figures["loss"]  # the loss breaks ties
