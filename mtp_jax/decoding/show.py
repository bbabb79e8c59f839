"""Completions on a terminal: each pass's tokens in a colour of their own."""

from typing import Any

from rich.console import Console
from rich.text import Text

from mtp_jax.decoding.generator import Completion, tokens_per_step

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
