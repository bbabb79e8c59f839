"""Decoding as one jitted `lax.while_loop` over a documented state of static shape."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from mtp_jax.model.attention import empty_cache
from mtp_jax.model.decoder import Cache, Decoder

# Prompts are prefilled this many rows at a time, which bounds the memory of attention scores.
PREFILL_CHUNK = 512


class DecodeState(NamedTuple):
    """What the loop carries. A sequence's newest token is in `tokens` but not yet in the cache."""

    tokens: Int[Array, "B S"]  # prompt, then emitted tokens; what lies beyond `length` means nothing
    length: Int[Array, " B"]  # verified tokens of each sequence, prompt included
    done: Bool[Array, " B"]  # a stop id was emitted or the limit reached; the sequence changes no more
    steps: Int[Array, " B"]  # decoding steps each sequence took part in; prefill is none
    cache: Cache  # slot s holds position s; slots from length - 1 on are overwritten before they are seen


class Limits(NamedTuple):
    """When sequences end."""

    length: Int[Array, " B"]  # tokens, prompt included
    stop_ids: Int[Array, " stops"]


def decode(
    model: Decoder,
    variables: Any,
    prompts: Int[Array, "B P"],
    prompt_length: Int[Array, " B"],
    limits: Limits,
    slots: int,
    cache_dtype: jnp.dtype,
) -> DecodeState:
    """Greedy decoding of right-padded prompts until every sequence is done.

    A sequence whose limit does not exceed its prompt is done from the start (padding of a batch).

    Args:
        slots: cache length S, at least the largest limit and P.
    """
    state, latest = prefill(model, variables, prompts, prompt_length, slots, cache_dtype)
    state = emit(state._replace(done=limits.length <= prompt_length), latest, limits)

    def step(state: DecodeState) -> DecodeState:
        newest = jnp.take_along_axis(state.tokens, state.length[:, None] - 1, axis=1)
        latents, cache = model.apply(variables, newest, state.length[:, None] - 1, cache=state.cache)
        logits = model.apply(variables, latents[:, 0], method="logits")
        state = state._replace(cache=cache, steps=state.steps + ~state.done)
        return emit(state, jnp.argmax(logits, axis=-1), limits)

    return jax.lax.while_loop(lambda state: ~jnp.all(state.done), step, state)


def prefill(
    model: Decoder,
    variables: Any,
    prompts: Int[Array, "B P"],
    prompt_length: Int[Array, " B"],
    slots: int,
    cache_dtype: jnp.dtype,
    chunk: int = PREFILL_CHUNK,
) -> tuple[DecodeState, Int[Array, " B"]]:
    """Fill the cache with the prompts, a chunk of rows at a time; also the base model's first token after each."""
    B, P = prompts.shape
    cache: Any = empty_cache(model.g, B, slots, cache_dtype, stacked=model.scanned)
    last = jnp.zeros((B, model.g.D), model.dtype)
    for start in range(0, P, chunk):
        rows = prompts[:, start : start + chunk]
        positions = jnp.broadcast_to(start + jnp.arange(rows.shape[1]), rows.shape)
        latents, cache = model.apply(variables, rows, positions, cache=cache)
        at = prompt_length - 1 - start
        here = jnp.take_along_axis(latents, jnp.clip(at, 0, rows.shape[1] - 1)[:, None, None], axis=1)[:, 0]
        last = jnp.where(((at >= 0) & (at < rows.shape[1]))[:, None], here, last)
    tokens = jnp.zeros((B, slots), jnp.int32).at[:, :P].set(prompts)
    zeros = jnp.zeros(B, jnp.int32)
    state = DecodeState(tokens, prompt_length, zeros.astype(bool), zeros, cache)
    return state, jnp.argmax(model.apply(variables, last, method="logits"), axis=-1)


def emit(state: DecodeState, token: Int[Array, " B"], limits: Limits) -> DecodeState:
    """Append one token to every sequence that is not done."""
    B, S = state.tokens.shape
    # Beyond the last slot for a sequence that is done: the write is dropped.
    at = jnp.where(state.done, S, state.length)
    tokens = state.tokens.at[jnp.arange(B), at].set(token.astype(jnp.int32), mode="drop")
    length = state.length + ~state.done
    stopped = jnp.any(token[:, None] == limits.stop_ids[None, :], axis=1)
    return state._replace(tokens=tokens, length=length, done=state.done | stopped | (length >= limits.length))
