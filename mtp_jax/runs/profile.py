"""Traces for TensorBoard or Perfetto."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from mtp_jax.errors import UserError

_COMPILED, _TRACED = 2, 3  # steps before the trace, and in it


@contextlib.contextmanager
def traced(folder: str | Path) -> Iterator[None]:
    """Within, a trace is written to `folder`.

    Raises:
        UserError: JAX cannot trace here.
    """
    check_profiler()
    _begin(folder)
    try:
        yield
    finally:
        jax.profiler.stop_trace()


class Trace:
    """A trace of a few training steps.

    Use as a context, and call `before` and `after` each step; does nothing without a folder.
    """

    def __init__(self, folder: str | None, start: int):
        """`start`: the step that the run continues from."""
        self.folder, self.first, self.last = folder, start + _COMPILED + 1, start + _COMPILED + _TRACED
        self.going = False

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_: object) -> None:
        if self.going:  # the run ended before
            jax.profiler.stop_trace()

    def before(self, step: int) -> None:
        """Begin in front of the first traced step."""
        if self.folder is not None and step == self.first:
            _begin(self.folder)
            self.going = True

    def after(self, step: int, values: Any) -> None:
        """End behind the last one, once `values` are there."""
        if self.going and step == self.last:
            jax.block_until_ready(values)
            jax.profiler.stop_trace()
            self.going = False


def check_profiler() -> None:
    """Raise UserError where the profiler would end the process: it asks libtpu, which has found no TPU."""
    asked, backend = os.environ.get("JAX_PLATFORMS", ""), jax.default_backend()
    if backend != "tpu" and importlib.util.find_spec("libtpu") and (not asked or "tpu" in asked):
        raise UserError(
            "--profile: libtpu is installed here without a TPU, and JAX's profiler fails then; set "
            f"JAX_PLATFORMS={backend}."
        )


def _begin(folder: str | Path) -> None:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it has crashed processes of many threads, and says little of the devices
    jax.profiler.start_trace(str(folder), profiler_options=options)
