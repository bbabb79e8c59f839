"""Completions on a terminal: each pass's tokens in a colour of their own."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.segment import Segment, Segments

from mtp_jax.decoding.generator import Completion, tokens_per_step
from mtp_jax.decoding.plan import BlockPlan
from mtp_jax.text import TextStream

# Neighbouring passes differ; the token of prefill and what is not yet a whole character stay as they are.
_COLOURS = ("green", "cyan", "yellow", "magenta")


class PassWriter:
    """Writes tokens behind a prompt as they come. Text appears when its characters are complete."""

    def __init__(self, tokenizer: Any, console: Console, prompt: Sequence[int], shown: bool = True):
        """With `shown`, the prompt's text is written too."""
        self.stream, self.console = TextStream(tokenizer, prompt, skip_special_tokens=True), console
        self.prompt_style: str | None = "dim" if shown else None
        self._write((self.stream.prompt, ""))

    def __call__(self, tokens: list[int], emitted_by: list[int]) -> None:
        """Write new tokens; `emitted_by` is the decoding step of each."""
        for step, run in groupby(zip(tokens, emitted_by, strict=True), key=lambda pair: pair[1]):
            self._write(self.stream([token for token, _ in run]), _COLOURS[step % len(_COLOURS)] if step else "")

    def finish(self) -> None:
        """Write what was held back, and end the line."""
        self._write(self.stream.finish())
        self.console.print()

    def _write(self, texts: tuple[str, str], style: str = "") -> None:
        for text, of in zip(texts, (self.prompt_style, style), strict=True):
            if text and of is not None:  # as it is: `Text` would expand tabs
                self.console.print(Segments([Segment(text, self.console.get_style(of))]), end="")


def speed_line(done: list[Completion], plan: str) -> str:
    """Tokens, tokens per step and speed of one batch of completions, and how many the context has cut short."""
    tokens, seconds = sum(len(c.token_ids) for c in done), done[0].prefill_seconds + done[0].seconds
    full = [len(c.prompt_ids) + len(c.token_ids) for c in done if c.finish_reason == "context"]
    cut = f"; {len(full)} of {len(done)} cut short, as the context of {full[0]} tokens is full" if full else ""
    return f"[{plan}: {tokens} tokens, {tokens_per_step(done):.2f} per step, {tokens / seconds:.0f} tokens/s{cut}]"


def comparison(
    drafted: list[Completion], plain: list[Completion], batch_size: int, plan: BlockPlan, sampled: bool
) -> list[str]:
    """What drafts gained on the same prompts: passes saved, output, wall-clock, and why where that is below 1x."""

    def passes(done: list[Completion]) -> tuple[int, float, float]:
        """Decoding passes over the batches, their seconds, and tokens per second with prefill."""
        batches = [done[at : at + batch_size] for at in range(0, len(done), batch_size)]
        seconds = sum(batch[0].seconds for batch in batches)
        whole = seconds + sum(batch[0].prefill_seconds for batch in batches)
        return sum(max(c.steps for c in b) for b in batches), seconds, sum(len(c.token_ids) for c in done) / whole

    (before, plain_seconds, plain_rate), (after, seconds, rate) = passes(plain), passes(drafted)
    width = max(len("without drafts"), len(str(plan)))
    lines = [
        f"{name:>{width}}: {count:4} passes, {tokens_per_step(done):.2f} tokens per pass, {speed:7.1f} tokens/s"
        for name, count, done, speed in (
            ("without drafts", before, plain, plain_rate),
            (str(plan), after, drafted, rate),
        )
    ]
    same = sum(x.token_ids == y.token_ids for x, y in zip(drafted, plain, strict=True))
    output = "another draw from the same distribution" if sampled else f"identical for {same} of {len(plain)} prompts"
    lines += [
        f"passes saved: {1 - after / before if before else 0:.0%}",
        f"output: {output}",
        f"wall-clock: {rate / plain_rate:.2f}x of decoding without drafts",
    ]
    if rate < plain_rate and before and after and plan.drafts:
        cost = (seconds / after) / (plain_seconds / before)
        lines += [
            f"Why slower: here a pass of {plan.rows} rows takes {cost:.1f} times as long as a pass of one row, and "
            f"plain decoding needs only {before / after:.1f} times as many passes.",
            "Drafts pay off where a pass is bound by reading weights: larger models, GPUs, TPUs (docs/benchmarks.md).",
        ]
    return lines
