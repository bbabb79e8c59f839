"""The parts of benchmarks/accelerator.py: each yields named cases, the most telling first."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_jax.runs.profile import traced

Case = tuple[str, Callable[[], dict[str, Any]]]  # a name, and what measures it: figures for JSON
Cases = Iterator[Case]


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    tiny: bool  # a rehearsal: every part on small shapes
    decoding: str  # geometry of steps and decode: "1b", "8b", "tiny" or a config.json
    training: tuple[str, ...]  # of train
    rank: int
    dtype: str  # of steps, decode and train
    minutes: float  # that training of the part `adapter` may take
    adapter: str | None = None  # a training config
    suites: tuple[str, ...] = ()  # what its adapter is evaluated on
    out: Path = Path()
    profile: Path | None = None  # a folder for traces

    def trace(self, run: Callable[[], object], *names: str) -> None:
        """Run once more into a trace, in a folder of these names, where traces are wanted."""
        if self.profile is not None:
            with traced(self.profile.joinpath(*names)):
                run()
