"""What a base's `generation_config.json` asks for: changes to the logits that depend on the tokens before a row.

Each row of a step is judged in its own context, the drafts before it included, so that drafts stay lossless.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mtp_jax.decoding.options import Sampling
from mtp_jax.errors import UserError

# Settings that change which token is next and are not computed, with the values that change nothing.
_OTHERS = {
    **dict.fromkeys(("num_beams", "num_return_sequences", "encoder_repetition_penalty", "guidance_scale"), 1),
    **dict.fromkeys(("penalty_alpha", "encoder_no_repeat_ngram_size"), 0),
    **dict.fromkeys(("bad_words_ids", "sequence_bias", "constraints", "force_words_ids", "stop_strings", "max_time")),
    **dict.fromkeys(("begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "dola_layers")),
    **dict.fromkeys(("exponential_decay_length_penalty", "watermarking_config", "token_healing")),
}
_OTHERS_WHERE_SAMPLED = {"min_p": 0, "top_h": None, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0}
# transformers' defaults where it samples.
_SAMPLED = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}


@dataclass(frozen=True)
class Processors:
    """Changes to the logits, each as transformers computes it. Hashable: programs are compiled for it."""

    repetition_penalty: float = 1.0  # logits of tokens that occurred: divided by it above 0, multiplied below
    no_repeat_ngram_size: int = 0  # no run of so many tokens occurs twice
    min_new_tokens: int = 0  # no stop id before so many new tokens
    min_length: int = 0  # nor before so many tokens, prompt included
    suppress_tokens: tuple[int, ...] = ()  # never chosen

    def __call__(
        self,
        scores: Float[Array, "B R V"],
        tokens: Int[Array, "B S"],
        length: Int[Array, " B"],
        drafts: Int[Array, "B d"],
        prompt_length: Int[Array, " B"],
        stops: Int[Array, " stops"],
    ) -> Float[Array, "B R V"]:
        """Processed logits; row r stands behind the first `length` tokens and r drafts."""
        B, R, V = scores.shape
        d, S, slots = drafts.shape[1], tokens.shape[1], jnp.arange(tokens.shape[1])
        ends = length[:, None] + jnp.arange(R)  # tokens before each row
        if self.repetition_penalty != 1.0:
            seen = jnp.zeros((B, 1, V), bool)
            seen = seen.at[jnp.arange(B)[:, None], 0, jnp.where(slots < length[:, None], tokens, V)].set(True)
            drafted = jax.lax.cummax((drafts[..., None] == jnp.arange(V)).astype(jnp.int8), axis=1) > 0
            seen = jnp.concatenate([seen, seen | drafted], axis=1)[:, :R]
            # Not a division by one number: compilers multiply by its reciprocal, which has another last bit.
            penalty = jnp.where(seen, self.repetition_penalty, 1.0)
            scores = jnp.where(scores < 0, scores * penalty, scores / penalty)
        if n := self.no_repeat_ngram_size:
            # Slot s begins a run of n tokens before the row, whose first n - 1 are the last ones before the row.
            write = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new.astype(row.dtype), (at,)))
            context = write(jnp.pad(tokens, ((0, 0), (0, d))), drafts, length)
            again = slots + n <= ends[..., None]
            for k in range(n - 1):
                last = jnp.take_along_axis(context, jnp.maximum(ends - n + 1 + k, 0), axis=1)
                again &= jnp.roll(context, -k, axis=1)[:, None, :S] == last[..., None]
            banned = jnp.where(again, jnp.roll(context, 1 - n, axis=1)[:, None, :S], V)
            at = jnp.arange(B)[:, None, None], jnp.arange(R)[None, :, None], banned
            scores = scores.at[at].set(-jnp.inf)
        if self.min_new_tokens or self.min_length:
            early = ends < jnp.maximum(prompt_length + self.min_new_tokens, self.min_length)[:, None]
            scores = jnp.where(early[..., None] & jnp.zeros(V, bool).at[stops].set(True), -jnp.inf, scores)
        if self.suppress_tokens:
            scores = scores.at[..., jnp.asarray(self.suppress_tokens)].set(-jnp.inf)
        return scores


class Settings(NamedTuple):
    """What a `generation_config.json` asks for."""

    processors: Processors | None  # None where the logits stay as they are
    sampling: Sampling | None  # how the base samples by default; None where it is greedy
    ignored: tuple[str, ...]  # settings that change which token is next and are not computed
    ignored_sampling: tuple[str, ...]  # and those that do so only where tokens are sampled


NO_SETTINGS = Settings(None, None, (), ())


def read_settings(config: dict[str, Any], V: int, where: str) -> Settings:
    """The settings of a generation config, absent values being transformers' defaults.

    Raises:
        UserError: values that make no setting.
    """
    given = {name: value for name, value in config.items() if value is not None and value is not False}

    def ignored(others: dict[str, Any]) -> tuple[str, ...]:
        return tuple(f"{name}={given[name]!r}" for name in others if name in given and given[name] != others[name])

    try:
        processors = Processors(
            float(given.get("repetition_penalty", 1.0)),
            int(given.get("no_repeat_ngram_size", 0)),
            int(given.get("min_new_tokens", 0)),
            int(given.get("min_length", 0)),
            tuple(sorted({int(token) for token in given.get("suppress_tokens", ())})),
        )
        temperature, top_k, top_p = (float({**_SAMPLED, **given}[name]) for name in _SAMPLED)
        sampling = Sampling(temperature, int(top_k) or None, top_p) if given.get("do_sample") else None
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{where}: holds a setting of the wrong kind ({error}).") from error
    except UserError as error:
        raise UserError(*(f"{where}: {fault}" for fault in error.faults)) from error
    if not processors.repetition_penalty > 0:
        raise UserError(f"{where}: repetition_penalty {processors.repetition_penalty} should be above 0.")
    if beyond := [token for token in processors.suppress_tokens if not 0 <= token < V]:
        raise UserError(f"{where}: suppress_tokens holds {beyond[0]}, but the model's vocabulary ends at {V - 1}.")
    kept = None if processors == Processors() else processors
    return Settings(kept, sampling, ignored(_OTHERS), ignored(_OTHERS_WHERE_SAMPLED))
