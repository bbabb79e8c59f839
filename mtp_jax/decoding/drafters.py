"""Drafts without masks, to compare masks with: the base's own guesses, or a second model.

A drafter takes the place of the masks, and the loop verifies its drafts as it verifies theirs. No draft is drawn: where
tokens are sampled, the distribution that it came from is one point.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mtp_jax.decoding.forward import Forward, Variables
from mtp_jax.decoding.sampling import likeliest
from mtp_jax.errors import UserError
from mtp_jax.model.attention import empty_cache
from mtp_jax.model.decoder import Cache

# Changes logits [B, V] that stand behind the first `length` [B] of `tokens` [B, S], as those of real rows are changed.
Process = Callable[[Array, Array, Array], Array]


@runtime_checkable
class Drafter(Protocol):
    """Finds the drafts of a step from what is known after the step before. Hashable, so that it can be static."""

    @property
    def drafts(self) -> int:
        """How many a step verifies, d."""

    def prefill(
        self, variables: Variables, prompts: Int[Array, "B P"], lengths: Int[Array, " B"], slots: int, chunk: int
    ) -> Any:
        """A state of its own for right-padded prompts of these lengths, read `chunk` rows at a time; None for none.

        Args:
            slots: places for tokens; more than d beyond the longest text.
        """

    def draft(
        self,
        variables: Variables,
        state: Any,
        tokens: Int[Array, "B S"],
        length: Int[Array, " B"],
        scores: Float[Array, "B R V"],
        accepted: Int[Array, " B"],
        process: Process | None,
    ) -> tuple[Int[Array, "B d"], Int[Array, " B"], Any]:
        """Drafts behind the newest token, how many of them are valid, and the state.

        Args:
            tokens: prompt and emitted tokens, `length` of them; what is beyond has no meaning.
            scores: the base's logits at the rows of this step; row `accepted` gave the newest token.
        """


@dataclass(frozen=True)
class Jacobi:
    """Jacobi decoding: the base's own choices behind wrong drafts are the next drafts.

    The last choice is repeated where there are fewer than d, as after prefill, where it is the only one.
    """

    drafts: int

    def __str__(self) -> str:
        return f"jacobi:{self.drafts}"

    def prefill(
        self, variables: Variables, prompts: Int[Array, "B P"], lengths: Int[Array, " B"], slots: int, chunk: int
    ) -> None:
        """It has no state."""

    def draft(
        self,
        variables: Variables,
        state: None,
        tokens: Int[Array, "B S"],
        length: Int[Array, " B"],
        scores: Float[Array, "B R V"],
        accepted: Int[Array, " B"],
        process: Process | None,
    ) -> tuple[Int[Array, "B d"], Int[Array, " B"], None]:
        """The likeliest tokens at the rows behind `accepted`, also where tokens are sampled; all are valid."""
        choices = likeliest(scores)
        rows = jnp.minimum(accepted[:, None] + 1 + jnp.arange(self.drafts), choices.shape[1] - 1)
        return jnp.take_along_axis(choices, rows, axis=1), jnp.full_like(length, self.drafts), None


@dataclass(frozen=True)
class DraftModel:
    """A smaller model of the same tokenizer continues the text greedily; its weights are `variables["draft"]`.

    The base may have more ids, which no text holds; a forward pass reads them as its last one.
    """

    drafts: int
    forward: Forward

    def __str__(self) -> str:
        return f"draft:{self.drafts}"

    def prefill(
        self, variables: Variables, prompts: Int[Array, "B P"], lengths: Int[Array, " B"], slots: int, chunk: int
    ) -> Cache:
        """The model's cache with the prompts."""
        model = self.forward.model
        cache: Any = empty_cache(model.g, len(prompts), slots, model.dtype, stacked=model.scanned)
        for start in range(0, prompts.shape[1], chunk):
            rows, at = prompts[:, start : start + chunk], jnp.full(len(prompts), start)
            _, _, cache = self.forward.rows(variables["draft"], rows, at, cache, None, start == 0, lengths)
        return cache

    def draft(
        self,
        variables: Variables,
        state: Cache,
        tokens: Int[Array, "B S"],
        length: Int[Array, " B"],
        scores: Float[Array, "B R V"],
        accepted: Int[Array, " B"],
        process: Process | None,
    ) -> tuple[Int[Array, "B d"], Int[Array, " B"], Cache]:
        """d tokens, one after another; all are valid.

        All but the two newest tokens are in the cache: the last draft never went through the model, and the base's own
        token stands behind it. What the cache holds of rejected drafts is overwritten before it is seen.
        """
        weights, V = variables["draft"], scores.shape[-1]

        def extended(tokens: Array, cache: Any, end: Array, rows: int) -> tuple[Array, Any]:
            """The text with the token behind the first `end`, the last `rows` of which are not in the cache yet."""
            start = end - rows
            newest = jnp.take_along_axis(tokens, start[:, None] + jnp.arange(rows), axis=1)
            latents, _, cache = self.forward.rows(weights, newest, start, cache)
            logits = self.forward.logits(weights, latents[:, -1])[:, :V]  # the base may know fewer tokens
            if process is not None:
                logits = process(logits, tokens, end)
            return tokens.at[jnp.arange(len(tokens)), end].set(likeliest(logits)), cache

        end = jnp.maximum(length, 2)  # it is less in rows that only fill a batch
        text, cache = extended(tokens, state, end, 2)

        def another(j: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
            return extended(*carry, end + j, 1)

        text, cache = jax.lax.fori_loop(1, self.drafts, another, (text, cache))
        drafts = jnp.take_along_axis(text, end[:, None] + jnp.arange(self.drafts), axis=1)
        return drafts, jnp.full_like(length, self.drafts), cache


def parse_drafter(text: str, model: Forward | None = None) -> Drafter:
    """A drafter from its name: jacobi:d or draft:d, with d drafts in each step.

    Args:
        model: the draft model's forward, which draft:d takes (`mtp_jax.api.with_draft_model`).

    Raises:
        UserError: an unknown name, no drafts, or no draft model.
    """
    kind, _, count = text.partition(":")
    if kind not in ("jacobi", "draft") or not (count.isascii() and count.isdigit()):
        raise UserError(f"{text}: unknown way to draft; give jacobi:d or draft:d, with d drafts in each step.")
    if (d := int(count)) < 1:
        raise UserError(f"{text}: should have at least 1 draft.")
    if kind == "jacobi":
        return Jacobi(d)
    if model is None:
        raise UserError(f"{text}: there is no draft model; give one.")
    return DraftModel(d, model)
