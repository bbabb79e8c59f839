"""The parts of benchmarks/accelerator.py: each yields named cases, the most telling first."""

import contextlib
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

    def traced(self, *names: str) -> contextlib.AbstractContextManager[None]:
        """Within, a trace is written where one is wanted, into a folder below it."""
        return traced(None if self.profile is None else self.profile.joinpath(*names))
