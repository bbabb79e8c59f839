"""Generate text with a model: prompts in, completions out, batches and compilation taken care of."""

import contextlib
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from mtp_jax import sharding
from mtp_jax.decoding.forward import Forward, Variables
from mtp_jax.decoding.loop import DecodeState, Decoding, Limits
from mtp_jax.decoding.options import Options, Sampling
from mtp_jax.decoding.processors import NO_SETTINGS, Settings
from mtp_jax.decoding.sampling import SamplingKind, Tempering
from mtp_jax.encoding import check_characters, check_ids, encode_prompt, render_chat
from mtp_jax.errors import UserError
from mtp_jax.mtp.estimate import mean_tokens
from mtp_jax.text import added_text

_SMALLEST_BUCKET = 32
_STEPS_BETWEEN_LOOKS = 4
_ALL_STEPS = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Completion:
    """What a prompt was continued with."""

    token_ids: list[int]  # new ones, a stop id included
    emitted_by: list[int]  # the decoding step that gave each of them; 0 is prefill
    steps: int  # decoding steps; prefill, which gives the first token, is none
    accepted: list[int]  # how many steps emitted 0, 1, ... drafts
    prefill_seconds: float  # of the whole batch this prompt was in, compilation excluded
    seconds: float  # of its decoding steps
    prompt_ids: Sequence[int] = ()
    finish_reason: str = ""  # "stop", "length" (as many tokens as asked for) or "context" (which is full)

    @property
    def tokens_per_step(self) -> float:
        """See `tokens_per_step`."""
        return tokens_per_step([self])


def tokens_per_step(completions: Sequence[Completion]) -> float:
    """New tokens a decoding step gives in the mean, those of prefill left out (docs/how-it-works.md, section 7.1)."""
    return mean_tokens((len(done.token_ids) - 1, done.steps) for done in completions)


class Programs(NamedTuple):
    """What is compiled for one shape of batch."""

    prefill: Any
    advance: Any


class Generator:
    """A model ready to decode, with or without an adapter; `mtp_jax.load` makes one. Weights are held once.

    >>> generator = mtp_jax.load("bundled:stdlib-5m", adapter="bundled:stdlib-5m", plan=quadratic(2))
    >>> completion = generator(["def main():"], max_new_tokens=64)[0]
    >>> print(generator.text(completion), completion.tokens_per_step)
    """

    def __init__(
        self,
        forward: Forward,
        variables: Variables,
        tokenizer: Any,
        stops: tuple[int, ...],
        options: Options,
        mesh: jax.sharding.Mesh | None = None,
        identity: str = "",
        settings: Settings = NO_SETTINGS,
    ):
        """
        Args:
            variables: what `forward.prepare` gave.
            stops: token ids that end a text.
            mesh: over which the variables are spread.
            identity: of model and adapter, for choices that are kept on disk.
            settings: what the base's `generation_config.json` asks for; its processors are computed.
        Raises:
            UserError: a plan that the adapter has too few masks for.
        """
        self.forward, self.variables, self.tokenizer, self.stops = forward, variables, tokenizer, stops
        self.options, self.mesh, self.identity, self.settings = options, mesh, identity, settings
        self.g, self.dtype, self.shape = forward.model.g, jnp.dtype(forward.model.dtype), forward.shape
        self.compiled: dict[Any, Programs] = {}
        self._check_plan()

    def _check_plan(self) -> None:
        masks, plan = self.shape.masks if self.shape else 0, self.options.plan
        if plan.block > masks:
            what = f"the adapter has {masks}" if self.shape else "there is no adapter"
            raise UserError(f"plan {plan}: takes {plan.block} mask{'s' * (plan.block > 1)}, but {what}.")

    def using(self, **changes: Any) -> "Generator":
        """A generator with other options (`Options.using`) that shares weights and compiled programs with this one."""
        other = copy.copy(self)
        other.options = self.options.using(**changes)
        other._check_plan()
        return other

    def encode(self, prompt: str | list[Any] | dict[str, Any], name: str = "prompt") -> list[int]:
        """Token ids of a text, or of a chat up to where the assistant answers.

        Args:
            prompt: a text, messages, or a mapping of `messages` and `tools`.
            name: of the prompt, for messages about it.

        Raises:
            UserError: an empty prompt, messages for a tokenizer without chat template, or that the template refuses, or
                a token unknown to the model.
        """
        if isinstance(prompt, str):
            if not prompt:
                raise UserError(f"{name}: is empty; give at least one character.")
            check_characters(prompt, name)
            ids = encode_prompt(self.tokenizer, prompt)
        else:
            if self.tokenizer.chat_template is None:
                raise UserError(f"{name}: holds chat messages, but this model's tokenizer has no chat template.")
            try:
                chat = prompt if isinstance(prompt, dict) else {"messages": prompt}
                text = render_chat(self.tokenizer, **chat, prompt=True)
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
            check_characters(text, name)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UserError(f"{name}: the tokenizer makes no token of it.")
        check_ids(ids, self.tokenizer, name)
        if len(ids) >= self.g.max_positions:
            raise UserError(
                f"{name}: {len(ids)} tokens leave no room in the model's context of {self.g.max_positions}; shorten it."
            )
        return list(ids)

    def text(self, completion: Completion) -> str:
        """What the new tokens add to the prompt's text, special tokens left out."""
        return added_text(self.tokenizer, completion.prompt_ids, completion.token_ids, skip_special_tokens=True)

    def __call__(
        self,
        prompts: list[str],
        max_new_tokens: int,
        batch_size: int | None = None,
        sampling: Sampling | None = None,
    ) -> list[Completion]:
        """Continue texts, `batch_size` at a time (all at once by default), greedily unless `sampling` is given."""
        encoded = [self.encode(prompt) for prompt in prompts]
        return self.complete(encoded, max_new_tokens, batch_size or len(prompts), sampling)

    def complete(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        batch_size: int,
        sampling: Sampling | None = None,
        number: int = 0,
        watch: Callable[[list[int], list[int]], None] | None = None,
    ) -> list[Completion]:
        """Continue token ids, in order, `batch_size` prompts at a time.

        Args:
            number: of the first prompt, where they are part of a longer list: a prompt's draws depend on its number.
            watch: with batches of one: called with new tokens, and the steps that emitted them, as they come.
        """
        done: list[Completion] = []
        for at in range(0, len(prompts), batch_size):
            done += self._batch(prompts[at : at + batch_size], number + at, max_new_tokens, batch_size, sampling, watch)
        return done

    def _batch(
        self,
        prompts: list[list[int]],
        number: int,
        max_new_tokens: int,
        batch_size: int,
        sampling: Sampling | None,
        watch: Callable[[list[int], list[int]], None] | None,
    ) -> list[Completion]:
        lengths = np.array([len(ids) for ids in prompts] + [1] * (batch_size - len(prompts)), np.int32)
        width = _bucket(int(lengths.max()), self.g.max_positions)
        ids = np.zeros((batch_size, width), np.int32)
        for into, prompt in zip(ids, prompts, strict=False):
            into[: len(prompt)] = prompt
        limit = np.minimum(lengths + max_new_tokens, self.g.max_positions)
        limit[len(prompts) :] = 0  # sequences that only fill the batch
        slots = width + _bucket(max_new_tokens, self.g.max_positions)
        limits = Limits(jnp.asarray(limit), jnp.asarray(self.stops, jnp.int32), jnp.asarray(lengths))
        how, keys = None, _keys(0, number, batch_size)
        if sampling is not None:
            top_k = jnp.int32(min(sampling.top_k or self.g.V, self.g.V))
            how = Tempering(jnp.float32(sampling.temperature), top_k, jnp.float32(sampling.top_p))
            keys = _keys(sampling.seed, number, batch_size)
        with self._scope():
            programs = self.compile(ids, lengths, limits, slots, how, keys, sampling.kind if sampling else None)
            begin = time.perf_counter()
            state = jax.block_until_ready(programs.prefill(self.variables, ids, lengths, limits, how, keys))
            prefilled = time.perf_counter()
            shown, going = int(lengths[0]), True
            while going:
                steps = jnp.int32(_ALL_STEPS if watch is None else _STEPS_BETWEEN_LOOKS)
                state = programs.advance(self.variables, state, limits, steps, how)
                tokens, by, length, done, taken, accepted = jax.device_get(
                    (state.tokens, state.emitted_by, state.length, state.done, state.steps, state.accepted)
                )
                going = not done.all()
                if watch is not None:
                    watch(tokens[0, shown : length[0]].tolist(), by[0, shown : length[0]].tolist())
                    shown = int(length[0])
        seconds = time.perf_counter() - prefilled
        return [
            Completion(
                tokens[i, lengths[i] : length[i]].tolist(),
                by[i, lengths[i] : length[i]].tolist(),
                int(taken[i]),
                accepted[i].tolist(),
                prefilled - begin,
                seconds,
                prompts[i],
                self._why_finished(int(tokens[i, length[i] - 1]), int(length[i] - lengths[i]), max_new_tokens),
            )
            for i in range(len(prompts))
        ]

    def _why_finished(self, last: int, new: int, max_new_tokens: int) -> str:
        return "stop" if new and last in self.stops else "length" if new == max_new_tokens else "context"

    def _scope(self) -> Any:
        stack = contextlib.ExitStack()
        if self.mesh is not None:
            stack.enter_context(sharding.on(self.mesh))
        # GPUs and TPUs round float32 products unless asked not to; output would then not be exact.
        stack.enter_context(jax.default_matmul_precision("highest" if self.dtype == jnp.float32 else None))
        return stack

    def compile(
        self,
        prompts: Int[np.ndarray, "B P"],
        lengths: Int[np.ndarray, " B"],
        limits: Limits,
        slots: int,
        how: Tempering | None,
        keys: Key[Array, " B"],
        sampling: SamplingKind | None = None,
    ) -> Programs:
        """The compiled programs for arguments such as these; prompts that share a bucket of lengths share them."""
        decoding = Decoding(self.forward, self.options, sampling, self.settings.processors)
        key = (decoding, prompts.shape, slots)
        if key not in self.compiled:
            room = slots + self.options.plan.drafts + 1  # a step writes all its rows, also behind the last token

            def prefill(variables: Any, prompts: Any, lengths: Any, limits: Limits, how: Any, keys: Any) -> DecodeState:
                return decoding.prefill(variables, prompts, lengths, limits, room, self.dtype, how, keys)

            lowered = jax.jit(prefill).lower(self.variables, prompts, lengths, limits, how, keys)
            first = lowered.compile()
            state = jax.tree.map(
                lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
                lowered.out_info,
                first.output_shardings,
            )
            advance = jax.jit(decoding.advance, donate_argnums=1, out_shardings=first.output_shardings)
            steps = jnp.int32(_ALL_STEPS)
            self.compiled[key] = Programs(first, advance.lower(self.variables, state, limits, steps, how).compile())
        return self.compiled[key]


def _keys(seed: int, number: int, batch: int) -> jax.Array:
    """A key for each prompt; prompts are numbered over all batches."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), number + jnp.arange(batch))


def _bucket(length: int, most: int) -> int:
    """The next power of two, and no more than the context."""
    size = _SMALLEST_BUCKET
    while size < length:
        size *= 2
    return max(min(size, most), length)
