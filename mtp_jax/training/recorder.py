"""Turns the numbers of each step into lines of metrics.jsonl and timing.jsonl, and into progress."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mtp_jax.config import Config
from mtp_jax.data.batches import Batch
from mtp_jax.errors import UserError
from mtp_jax.runs.progress import ProgressBar
from mtp_jax.runs.records import Journal, Trackers
from mtp_jax.training.evaluation import plain
from mtp_jax.training.step import WEIGHTS_FINITE

_WHEN_NOT_FINITE = (
    "Nothing of this step was saved: lower train.learning_rate and start in a new output_dir, or correct the data and "
    "rerun in this one, which resumes from the last checkpoint."
)


class Recorder:
    """Writes each step's numbers one step late, so that the devices never wait for the host to read them."""

    def __init__(
        self,
        config: Config,
        metrics: Journal,
        timing: Journal,
        trackers: Trackers,
        progress: ProgressBar,
        documents: Sequence[Any],
        mask_rows: int | None,
        flops_at: Callable[[int], float],
        peak: float | None,
    ):
        """
        Args:
            mask_rows: trained before this start; None where they were not counted, and are not from here on.
            flops_at: arithmetic of a step, counted from 0, over all devices.
            peak: arithmetic of all devices in a second; None where it is not known.
        """
        self.config, self.metrics, self.timing = config, metrics, timing
        self.trackers, self.progress, self.documents = trackers, progress, documents
        self.mask_rows, self.flops_at, self.peak = mask_rows, flops_at, peak
        self.pending: tuple[int, Any, Batch, float] | None = None
        self.clock = time.perf_counter()

    def step(self, step: int, values: Any, batch: Batch, waited: float) -> None:
        """Take a step's numbers, which are still being computed, and write those of the step before."""
        self._finish(timed=False)
        self.pending = (step, values, batch, waited)

    def finish(self) -> None:
        """Read and write the pending step, which may be saved: with a line of timing whatever `logging.every` is.

        Raises:
            UserError: its loss is not finite.
        """
        self._finish(timed=True)

    def _finish(self, timed: bool) -> None:
        if self.pending is None:
            return
        step, values, batch, waited = self.pending
        self.pending = None
        values = {name: plain(value) for name, value in values.items()}
        weights_finite, mask_rows = values.pop(WEIGHTS_FINITE) == 1, values.pop("mask_rows", None)
        if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"]) and weights_finite):
            raise UserError(self._not_finite(step, values, weights_finite, batch))
        seconds = time.perf_counter() - self.clock
        self.clock = time.perf_counter()
        rate = self.flops_at(step - 1) / seconds
        of_peak = None if self.peak is None else rate / self.peak
        self.progress.update(step, values["loss"], rate, of_peak)
        so_far = {}
        if mask_rows is not None and self.mask_rows is not None:
            self.mask_rows += mask_rows
            so_far = {"mask_rows": self.mask_rows}
        logged = step % self.config.logging.every == 0 or step == self.config.train.steps
        if logged:
            self.line(step, values | so_far)
        if logged or timed:
            # Figures are of all processes; each has only its own sequences of the batch.
            share = len(batch["tokens"]) / self.config.train.batch_size
            self.timing.write(
                {
                    "step": step,
                    "seconds": round(seconds, 6),
                    "rows_per_second": round(batch["tokens"].size / share / seconds, 1),
                    "tokens_per_second": round(int((batch["segments"] != 0).sum()) / share / seconds, 1),
                    "input_wait_seconds": round(waited, 6),
                    "model_tflops_per_second": round(rate / 1e12, 4),
                    **({} if of_peak is None else {"share_of_peak": round(of_peak, 4)}),
                    **so_far,
                }
            )

    def line(self, step: int, values: dict[str, Any]) -> None:
        """Write one line of metrics, also to the trackers; raises UserError where a held-out loss is not finite."""
        if not math.isfinite(values.get("held_out_loss", 0.0)):
            raise UserError(f"the held-out loss at step {step} is not finite; {_WHEN_NOT_FINITE}")
        line = {"step": step, **values}
        self.metrics.write(line)
        self.trackers.write(line)
        if "held_out_loss" in values:
            self.progress.say(f"step {step}  {_summary(values)}")

    def _not_finite(self, step: int, values: dict[str, float], weights_finite: bool, batch: Batch) -> str:
        names = [self.documents[i].name for i in np.unique(batch["documents"][batch["segments"] != 0])]
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        return (
            f"step {step} is not finite (loss {values['loss']}, gradient norm {values['gradient_norm']}, weights "
            f"after it {'finite' if weights_finite else 'not finite'}); batch {step} holds {shown}. {_WHEN_NOT_FINITE}"
        )


def _summary(values: dict[str, Any]) -> str:
    """The held-out figures a person watches."""
    parts = [f"held-out loss {values['held_out_loss']:.4f}"]
    if "held_out_accuracy" in values:
        parts.append(f"accuracy {values['held_out_accuracy']:.4f}")
    if "held_out_agreement" in values:
        parts.append("agreement " + " ".join(f"{a:.2f}" for a in values["held_out_agreement"]))
    if "held_out_tokens_per_step" in values:
        estimate = values["held_out_tokens_per_step"]
        parts.append("tokens per step " + ", ".join(f"{v:.2f} with {m}" for m, v in estimate.items()))
    return "  ".join(parts)
