"""Which step of a run is the best so far, by what it achieves on held-out documents."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_PREFIX = "held_out_"


class Best:
    """The best step: most tokens per step at most masks where these are estimated, then the smallest loss."""

    def __init__(self, records: Iterable[dict[str, Any]]):
        self.step: int | None = None
        self.figures: dict[str, Any] = {}
        for record in records:
            self.offer(record["step"], record)

    def offer(self, step: int, record: dict[str, Any]) -> bool:
        """Take a line of metrics; whether its held-out figures are better than all before."""
        if f"{_PREFIX}loss" not in record:
            return False
        figures = {"step": step} | {name.removeprefix(_PREFIX): value for name, value in record.items()}
        if self.step is not None and _goodness(figures) <= _goodness(self.figures):
            return False
        self.step, self.figures = step, figures
        return True

    def write(self, path: Path) -> None:
        """Note the step and its figure."""
        name, value = _figure(self.figures)
        part = path.with_name(f".{path.name}.part")
        part.write_text(json.dumps({"step": self.step, "by": name, "value": value}) + "\n", encoding="utf-8")
        part.replace(path)


def _figure(figures: dict[str, Any]) -> tuple[str, float]:
    estimate = figures.get("tokens_per_step")
    if estimate:
        masks = max(estimate, key=int)
        return f"{_PREFIX}tokens_per_step.{masks}", estimate[masks]
    return f"{_PREFIX}loss", figures["loss"]


def _goodness(figures: dict[str, Any]) -> tuple[float, float]:
    name, value = _figure(figures)
    return 0.0 if name.endswith("loss") else value, -figures["loss"]  # the loss decides between equals
