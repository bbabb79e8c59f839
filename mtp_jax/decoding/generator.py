"""Generate text with a model: prompts in, completions out, batches and compilation taken care of."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.decoding.loop import DecodeState, Limits, decode
from mtp_jax.errors import UserError
from mtp_jax.model.decoder import Decoder
from mtp_jax.model.folder import find_folder, load_params, load_tokenizer, read_geometry, stop_ids
from mtp_jax.model.geometry import Geometry
from mtp_jax.model.weights import Params, unstack_layers
from mtp_jax.mtp.adapter_folder import find_adapter, load_adapter

_SMALLEST_BUCKET = 32


@dataclass(frozen=True)
class Completion:
    """What a prompt was continued with."""

    token_ids: list[int]  # new ones, a stop id included
    steps: int  # decoding steps; prefill, which gives the first token, is none
    seconds: float  # of the whole batch this prompt was in, compilation excluded


class Generator:
    """A model ready to decode. Weights are held once, unstacked.

    >>> generator = Generator.load("bundled:stdlib-5m")
    >>> completion = generator(["def main():"], max_new_tokens=64)[0]
    >>> print(generator.text(completion))
    """

    def __init__(self, g: Geometry, params: Params, tokenizer: Any, stops: tuple[int, ...], dtype: jnp.dtype):
        """`params` are stacked weights in `dtype`, and are consumed."""
        self.g, self.tokenizer, self.stops, self.dtype = g, tokenizer, stops, jnp.dtype(dtype)
        self.variables = {"params": unstack_layers(params)}
        self.model = Decoder(g, self.dtype, scanned=False)
        self.compiled: dict[tuple[int, ...], Any] = {}

    @classmethod
    def load(cls, model: str, dtype: str | None = None, adapter: str | None = None) -> "Generator":
        """From a Hugging Face folder, a hub name or bundled:NAME, computing in `dtype`.

        By default float32 on CPU and bfloat16 on accelerators. An adapter must belong to the model; plain decoding
        needs nothing of it.

        Raises:
            UserError: a model or adapter that does not do, or an adapter without gate, which changes the base's output.
        """
        folder: Path = find_folder(model)
        g = read_geometry(folder)
        tokenizer = load_tokenizer(folder, g)
        if adapter is not None and not load_adapter(find_adapter(adapter), g, folder)[0].gated:
            raise UserError(f"{adapter}: was trained without gate (lora.gated: false) and cannot decode losslessly.")
        kept = jnp.dtype(dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
        return cls(g, load_params(folder, g, kept), tokenizer, stop_ids(folder), kept)

    def encode(self, prompt: str | list[dict[str, str]], name: str = "prompt") -> list[int]:
        """Token ids of a text, or of a chat's messages up to where the assistant answers.

        Raises:
            UserError: an empty prompt, or messages for a tokenizer without chat template.
        """
        if isinstance(prompt, str):
            if not prompt:
                raise UserError(f"{name}: is empty; give at least one character.")
            ids = self.tokenizer(prompt)["input_ids"]
        else:
            if self.tokenizer.chat_template is None:
                raise UserError(f"{name}: holds chat messages, but this model's tokenizer has no chat template.")
            ids = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        if not ids:
            raise UserError(f"{name}: the tokenizer makes no token of it.")
        if len(ids) >= self.g.max_positions:
            raise UserError(
                f"{name}: {len(ids)} tokens leave no room in the model's context of {self.g.max_positions}; shorten it."
            )
        return list(ids)

    def text(self, completion: Completion) -> str:
        """The new tokens as text, special tokens left out."""
        return self.tokenizer.decode(completion.token_ids, skip_special_tokens=True)

    def __call__(self, prompts: list[str], max_new_tokens: int, batch_size: int | None = None) -> list[Completion]:
        """Continue texts, `batch_size` at a time (all at once by default)."""
        return self.complete([self.encode(prompt) for prompt in prompts], max_new_tokens, batch_size or len(prompts))

    def complete(self, prompts: list[list[int]], max_new_tokens: int, batch_size: int) -> list[Completion]:
        """Continue token ids greedily, in order, `batch_size` prompts at a time."""
        done: list[Completion] = []
        for at in range(0, len(prompts), batch_size):
            done += self._batch(prompts[at : at + batch_size], max_new_tokens, batch_size)
        return done

    def _batch(self, prompts: list[list[int]], max_new_tokens: int, batch_size: int) -> list[Completion]:
        lengths = np.array([len(ids) for ids in prompts] + [1] * (batch_size - len(prompts)), np.int32)
        width = _bucket(int(lengths.max()), self.g.max_positions)
        ids = np.zeros((batch_size, width), np.int32)
        for row, prompt in zip(ids, prompts, strict=False):
            row[: len(prompt)] = prompt
        limit = np.minimum(lengths + max_new_tokens, self.g.max_positions)
        limit[len(prompts) :] = 0  # rows that only fill the batch
        slots = width + _bucket(max_new_tokens, self.g.max_positions)
        run = self._compile(batch_size, width, slots)
        limits = Limits(jnp.asarray(limit), jnp.asarray(self.stops, jnp.int32))
        begin = time.perf_counter()
        tokens, length, steps = jax.device_get(run(self.variables, ids, lengths, limits))
        seconds = time.perf_counter() - begin
        return [
            Completion(tokens[i, lengths[i] : length[i]].tolist(), int(steps[i]), seconds) for i in range(len(prompts))
        ]

    def _compile(self, batch: int, width: int, slots: int) -> Any:
        """The compiled loop for a batch shape; prompt lengths within a bucket share one."""
        shape = (batch, width, slots)
        if shape not in self.compiled:

            def run(variables: Any, prompts: Any, lengths: Any, limits: Limits) -> Any:
                state: DecodeState = decode(self.model, variables, prompts, lengths, limits, slots, self.dtype)
                return state.tokens, state.length, state.steps

            rows = jax.ShapeDtypeStruct((batch,), jnp.int32)
            limits = Limits(rows, jax.ShapeDtypeStruct((len(self.stops),), jnp.int32))
            prompts = jax.ShapeDtypeStruct((batch, width), jnp.int32)
            # GPUs and TPUs round float32 products unless asked not to; then output would not be exact.
            precision = "highest" if self.dtype == jnp.float32 else None
            with jax.default_matmul_precision(precision):
                self.compiled[shape] = jax.jit(run).lower(self.variables, prompts, rows, limits).compile()
        return self.compiled[shape]


def _bucket(length: int, most: int) -> int:
    """The next power of two, and no more than the context."""
    size = _SMALLEST_BUCKET
    while size < length:
        size *= 2
    return max(min(size, most), length)
