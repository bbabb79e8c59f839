"""Completions on a terminal: each pass's tokens in a colour of their own."""

from typing import Any

from rich.console import Console
from rich.text import Text

from mtp_jax.decoding.generator import Completion, tokens_per_step
from mtp_jax.decoding.plan import BlockPlan

# Neighbouring passes differ; the token of prefill and what is not yet a whole character stay as they are.
_COLOURS = ("green", "cyan", "yellow", "magenta")


class PassWriter:
    """Writes tokens as they come. Text appears when its characters are complete."""

    def __init__(self, tokenizer: Any, console: Console):
        self.tokenizer, self.console = tokenizer, console
        self.ids: list[int] = []
        self.shown = 0  # characters

    def __call__(self, tokens: list[int], emitted_by: list[int]) -> None:
        """Write new tokens; `emitted_by` is the decoding step of each."""
        at = 0
        while at < len(tokens):
            step, end = emitted_by[at], at
            while end < len(tokens) and emitted_by[end] == step:
                end += 1
            self.ids += tokens[at:end]
            at = end
            text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
            if not text.endswith("\ufffd"):
                style = _COLOURS[step % len(_COLOURS)] if step else ""
                self.console.print(Text(text[self.shown :], style), end="")
                self.shown = len(text)

    def finish(self) -> None:
        """Write what was held back, and end the line."""
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        self.console.print(Text(text[self.shown :]))


def speed_line(done: list[Completion], plan: str) -> str:
    """Tokens, tokens per step and speed of one batch of completions."""
    tokens, seconds = sum(len(c.token_ids) for c in done), done[0].prefill_seconds + done[0].seconds
    return f"[{plan}: {tokens} tokens, {tokens_per_step(done):.2f} per step, {tokens / seconds:.0f} tokens/s]"


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
        f"passes saved: {1 - after / max(before, 1):.0%}",
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
