"""The progress bar: loss and time left; without a terminal, a plain line now and then."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class ProgressBar:
    """Use as a context; call `update` after every step. `quiet` where another process reports."""

    def __init__(self, steps: int, start: int, quiet: bool = False):
        self.console = Console(stderr=True, quiet=quiet)
        self.steps, self.begin, self.start = steps, time.monotonic(), start
        self.last_line = self.begin
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self.task = self.bar.add_task("training", total=steps, completed=start, loss=float("nan"), rate="")

    def __enter__(self) -> "ProgressBar":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def update(self, step: int, loss: float, flops: float, of_peak: float | None) -> None:
        """Show that `step` is done, at so many operations per second, perhaps a known share of the devices' peak."""
        share = "" if of_peak is None else f", {of_peak:.0%} of peak"
        rate = f"  {flops / 1e12:.3g} TFLOP/s{share}"
        self.bar.update(self.task, completed=step, loss=loss, rate=rate)
        now = time.monotonic()
        if not self.console.is_terminal and (now - self.last_line > _SECONDS_BETWEEN_LINES or step == self.steps):
            self.last_line = now
            left = (now - self.begin) / max(step - self.start, 1) * (self.steps - step)
            self.say(f"step {step}/{self.steps}  loss {loss:.4f}{rate}  {left / 60:.1f} min left")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
