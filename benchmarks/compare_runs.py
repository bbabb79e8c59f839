"""Runs side by side: where their configs differ, what they were trained on, and their held-out figures.

    python benchmarks/compare_runs.py runs/one runs/two

Reads `config.yaml`, `metrics.jsonl` and `timing.jsonl` of each run, finished or not. Held-out figures are of the last
evaluation, and in brackets the best of all. Seconds include evaluations; where not every step is logged, they are the
mean of those that are, times the number of steps.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mtp_jax.config_file import load_config
from mtp_jax.errors import UserError, run_command

_WIDTH = 30  # columns of the terminal for each run
_HELD_OUT = "held_out_"


@dataclass(frozen=True)
class Run:
    """What a run's folder says of it."""

    name: str
    settings: dict[str, Any]  # by dotted key
    steps: int
    mask_rows: int | None
    seconds: float
    tokens_per_step: dict[str, list[float]]  # of each evaluation, by the number of masks
    agreement: list[list[float]]  # of each evaluation, by offset

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Read a folder; raises UserError where it holds no run."""
        config = load_config(str(folder / "config.yaml"), []).model_dump()
        metrics, timing = (_lines(folder / f"{name}.jsonl") for name in ("metrics", "timing"))
        if not timing:
            raise UserError(f"{folder}: no step of this run is logged yet.")
        held = [line for line in metrics if f"{_HELD_OUT}loss" in line]
        estimates = [line.get(f"{_HELD_OUT}tokens_per_step", {}) for line in held]
        agreement = (line.get(f"{_HELD_OUT}agreement", line.get(f"{_HELD_OUT}agreement_base")) for line in held)
        steps = timing[-1]["step"]
        return cls(
            folder.resolve().name,
            {key: value for key, value in _flat(config) if key != "output_dir"},
            steps,
            timing[-1].get("mask_rows"),
            sum(line["seconds"] for line in timing) / len(timing) * steps,
            {masks: [estimate[masks] for estimate in estimates] for masks in (estimates[-1] if held else {})},
            [of for of in agreement if of is not None],
        )


def _lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that a run may be writing to."""
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error}).") from error


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value below a mapping or list, with its dotted key."""
    if isinstance(value, dict | list) and value:
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def differences(runs: list[Run]) -> dict[str, list[str]]:
    """The values of each key that is not the same in all runs."""
    found = {}
    for key in dict.fromkeys(key for run in runs for key in run.settings):
        values = [str(run.settings[key]) if key in run.settings else "-" for run in runs]
        if len(set(values)) > 1:
            found[key] = values
    return found


def figures(runs: list[Run]) -> dict[str, list[str]]:
    """What the runs cost and what came of it, a text for each run under each name."""

    def last_and_best(of: list[float], digits: int) -> str:
        return f"{of[-1]:.{digits}f} ({max(of):.{digits}f})" if of else "-"

    rows = {
        "steps": [f"{run.steps:,}" for run in runs],
        "mask rows": ["-" if run.mask_rows is None else f"{run.mask_rows:,}" for run in runs],
        "seconds": [f"{run.seconds:,.0f}" for run in runs],
    }
    for masks in sorted({masks for run in runs for masks in run.tokens_per_step}, key=int):
        name = f"tokens per step, {masks} mask{'s' * (masks != '1')}"
        rows[name] = [last_and_best(run.tokens_per_step.get(masks, []), 3) for run in runs]
    for j in range(max(len(of) for run in runs for of in [[], *run.agreement])):
        each = [[of[j] for of in run.agreement if j < len(of)] for run in runs]
        rows[f"agreement, offset {j + 1}"] = [last_and_best(of, 3) for of in each]
    return rows


def main() -> None:
    """Parse, read, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    runs = [Run.read(folder) for folder in parser.parse_args().runs]
    table = Table("", *(run.name for run in runs))
    for section in (differences(runs), figures(runs)):
        for name, values in section.items():
            table.add_row(name, *values)
        table.add_section()
    Console(width=_WIDTH * (len(runs) + 1)).print(table)


if __name__ == "__main__":
    run_command(main)
