"""Generate text with a model: prompts in, completions out, batches and compilation taken care of."""

import contextlib
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax import sharding
from mtp_jax.decoding.fusion import fuse, in_cpp
from mtp_jax.decoding.loop import DecodeState, Decoding, Limits
from mtp_jax.decoding.plan import BlockPlan, plain
from mtp_jax.decoding.sampling import SamplingKind, Tempering
from mtp_jax.errors import UserError
from mtp_jax.model.decoder import Decoder
from mtp_jax.model.folder import find_folder, load_params, load_tokenizer, read_geometry, stop_ids
from mtp_jax.model.geometry import Geometry
from mtp_jax.model.products import narrow, pack
from mtp_jax.model.weights import Params, unstack_layers
from mtp_jax.mtp.adapter import AdapterShape, with_adapter
from mtp_jax.mtp.adapter_folder import TENSORS, find_adapter, fingerprint, load_adapter

_SMALLEST_BUCKET = 32
_STEPS_BETWEEN_LOOKS = 4
_ALL_STEPS = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Sampling:
    """Draw tokens instead of taking the likeliest ones. A row's draws depend on seed and row, not on its batch."""

    temperature: float = 1.0
    top_k: int | None = None  # of the likeliest tokens; None for all
    top_p: float = 1.0  # the smallest set of likeliest tokens with so much probability
    seed: int = 0
    sampled_drafts: bool = True  # drafts are drawn from the sampler head too, and not its likeliest tokens

    def __post_init__(self) -> None:
        faults = []
        if not self.temperature > 0:
            faults.append(f"temperature {self.temperature}: should be above 0; leave it out for greedy decoding.")
        if self.top_k is not None and self.top_k < 1:
            faults.append(f"top-k {self.top_k}: should be at least 1.")
        if not 0 < self.top_p <= 1:
            faults.append(f"top-p {self.top_p}: should be above 0 and at most 1.")
        if not 0 <= self.seed < 2**31:
            faults.append(f"seed {self.seed}: should be from 0 to 2^31 - 1.")
        if faults:
            raise UserError(*faults)

    @property
    def kind(self) -> SamplingKind:
        """What of it is compiled in."""
        return SamplingKind(self.top_k is not None or self.top_p < 1, self.sampled_drafts)


@dataclass(frozen=True)
class Completion:
    """What a prompt was continued with."""

    token_ids: list[int]  # new ones, a stop id included
    emitted_by: list[int]  # the decoding step that gave each of them; 0 is prefill
    steps: int  # decoding steps; prefill, which gives the first token, is none
    accepted: list[int]  # how many steps emitted 0, 1, ... drafts
    prefill_seconds: float  # of the whole batch this prompt was in, compilation excluded
    seconds: float  # of its decoding steps

    @property
    def tokens_per_step(self) -> float:
        """(new tokens - 1) / steps, prefill giving the first token and being no step."""
        return (len(self.token_ids) - 1) / max(self.steps, 1)


class Programs(NamedTuple):
    """What is compiled for one shape of batch."""

    prefill: Any
    advance: Any


class Generator:
    """A model ready to decode, with or without an adapter. Weights are held once, unstacked.

    >>> generator = Generator.load("bundled:stdlib-5m", adapter="bundled:stdlib-5m", plan=quadratic(2))
    >>> completion = generator(["def main():"], max_new_tokens=64)[0]
    >>> print(generator.text(completion), completion.tokens_per_step)
    """

    def __init__(
        self,
        g: Geometry,
        variables: Any,
        tokenizer: Any,
        stops: tuple[int, ...],
        dtype: jnp.dtype,
        shape: AdapterShape | None = None,
        plan: BlockPlan | None = None,
        mesh: jax.sharding.Mesh | None = None,
        identity: str = "",
    ):
        """`variables` are what `decoding_variables` gives, in `dtype`."""
        self.g, self.variables, self.tokenizer, self.stops = g, variables, tokenizer, stops
        self.dtype, self.shape, self.mesh, self.identity = jnp.dtype(dtype), shape, mesh, identity
        self.model = Decoder(g, self.dtype, scanned=False)
        self.plan = plan or plain()
        self.shortlist: int | None = 256
        self.one_head = False
        self.compiled: dict[Any, Programs] = {}

    @property
    def plan(self) -> BlockPlan:
        """The block plan that completions are decoded with."""
        return self._plan

    @plan.setter
    def plan(self, plan: BlockPlan) -> None:
        there = self.shape.masks if self.shape else 0
        if plan.block > there:
            what = f"the adapter has {there}" if self.shape else "there is no adapter"
            raise UserError(f"plan {plan}: takes {plan.block} mask{'s' * (plan.block > 1)}, but {what}.")
        self._plan = plan

    @classmethod
    def load(
        cls,
        model: str,
        dtype: str | None = None,
        adapter: str | None = None,
        plan: BlockPlan | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ) -> "Generator":
        """From a Hugging Face folder, a hub name or bundled:NAME, computing in `dtype`.

        By default float32 on CPU and bfloat16 on accelerators, plain decoding, and everything on one device. With a
        mesh (`training.sharding.make_mesh`) weights are spread over its fsdp and tensor axes.

        Raises:
            UserError: a model or adapter that does not do, an adapter without gate, which changes the base's output, or
                a plan that the adapter has too few masks for.
        """
        folder: Path = find_folder(model)
        g = read_geometry(folder)
        tokenizer = load_tokenizer(folder, g)
        shape, trained, identity = None, None, fingerprint(folder)
        if adapter is not None:
            found = find_adapter(adapter)
            shape, trained = load_adapter(found, g, folder)
            identity += hashlib.sha256((found / TENSORS).read_bytes()).hexdigest()
            if not shape.gated:
                raise UserError(
                    f"{adapter}: was trained without gate (lora.gated: false) and cannot decode losslessly."
                )
        kept = jnp.dtype(dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
        placed = None if mesh is None else lambda weight: sharding.weight_sharding(mesh, weight)
        if trained is not None and mesh is not None:  # small beside the base
            trained = jax.device_put(trained, sharding.replicated(mesh))
        params = load_params(folder, g, kept, placed)
        variables = decoding_variables(g, params, trained, shape, kept, kernels=mesh is None)
        return cls(g, variables, tokenizer, stop_ids(folder), kept, shape, plan, mesh, identity)

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
        for row, prompt in zip(ids, prompts, strict=False):
            row[: len(prompt)] = prompt
        limit = np.minimum(lengths + max_new_tokens, self.g.max_positions)
        limit[len(prompts) :] = 0  # rows that only fill the batch
        slots = width + _bucket(max_new_tokens, self.g.max_positions)
        limits = Limits(jnp.asarray(limit), jnp.asarray(self.stops, jnp.int32))
        how, keys = None, _keys(0, number, batch_size)
        if sampling is not None:
            top_k = jnp.int32(sampling.top_k or self.g.V)
            how = Tempering(jnp.float32(sampling.temperature), top_k, jnp.float32(sampling.top_p))
            keys = _keys(sampling.seed, number, batch_size)
        with self._scope():
            programs = self._compile(batch_size, width, slots, sampling.kind if sampling else None)
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
            )
            for i in range(len(prompts))
        ]

    def _scope(self) -> Any:
        stack = contextlib.ExitStack()
        if self.mesh is not None:
            stack.enter_context(sharding.on(self.mesh))
        # GPUs and TPUs round float32 products unless asked not to; then output would not be exact.
        stack.enter_context(jax.default_matmul_precision("highest" if self.dtype == jnp.float32 else None))
        return stack

    def decoding(self, sampling: SamplingKind | None = None) -> Decoding:
        """The static description of the loop that completions are decoded with."""
        form = self.shape.sampler if self.shape else "none"
        return Decoding(self.model, self.plan, form, self.shortlist, self.one_head, sampling)

    def _compile(self, batch: int, width: int, slots: int, sampling: SamplingKind | None) -> Programs:
        """The compiled programs for a batch shape; prompt lengths within a bucket share one."""
        decoding = self.decoding(sampling)
        key = (decoding, batch, width, slots)
        if key not in self.compiled:
            slots += self.plan.drafts + 1  # a step writes all its rows, also behind the last token

            def prefill(variables: Any, prompts: Any, lengths: Any, limits: Limits, how: Any, keys: Any) -> DecodeState:
                return decoding.prefill(variables, prompts, lengths, limits, slots, self.dtype, how, keys)

            rows = jax.ShapeDtypeStruct((batch,), jnp.int32)
            limits = Limits(rows, jax.ShapeDtypeStruct((len(self.stops),), jnp.int32))
            prompts = jax.ShapeDtypeStruct((batch, width), jnp.int32)
            number, count = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
            how = None if sampling is None else Tempering(number, count, number)
            keys = jax.eval_shape(lambda: _keys(0, 0, batch))
            lowered = jax.jit(prefill).lower(self.variables, prompts, rows, limits, how, keys)
            first = lowered.compile()
            state = jax.tree.map(
                lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
                lowered.out_info,
                first.output_shardings,
            )
            advance = jax.jit(decoding.advance, donate_argnums=1, out_shardings=first.output_shardings)
            self.compiled[key] = Programs(first, advance.lower(self.variables, state, limits, count, how).compile())
        return self.compiled[key]


def decoding_variables(
    g: Geometry, params: Params, adapter: Params | None, shape: AdapterShape | None, dtype: jnp.dtype, kernels: bool
) -> dict[str, Any]:
    """What a decoding loop reads: `params` unstacked, `fused` (`decoding.fusion`) and with an adapter `mtp`.

    Stacked `params` are consumed.
    """
    return variables_of(g, unstack_layers(params), adapter, shape, dtype, kernels)


def variables_of(
    g: Geometry, params: Params, adapter: Params | None, shape: AdapterShape | None, dtype: jnp.dtype, kernels: bool
) -> dict[str, Any]:
    """`decoding_variables` of `params` that are unstacked already; without `kernels` a pure function."""
    lora = None if shape is None or adapter is None else with_adapter({}, adapter, shape)["lora"]
    params, fused = fuse(g, params, lora, dtype, kernels)
    variables = {"params": params, "fused": fused}
    panels = in_cpp(dtype, kernels)
    if panels:  # a copy: the shortlist and the embedding read whole rows of the table
        variables["head"] = pack(params["embed" if g.tied else "unembed"]["embedding"].T)
        params |= {name: jax.tree.map(narrow, params[name]) for name in ("embed", "unembed") if name in params}
    if adapter is not None:
        # Norms stay as they are: they are computed in float32.
        cast = lambda path, x: jnp.asarray(x, None if "norm" in str(path) else dtype)  # noqa: E731
        variables["mtp"] = jax.tree.map_with_path(cast, adapter["mtp"])
        if "sampler" in variables["mtp"]:
            sampler = variables["mtp"]["sampler"]
            first, second = sampler["linear_0"]["kernel"], sampler["linear_1"]["kernel"]
            halves = first[: g.D], first[g.D :]  # the one that reads the latents is multiplied beforehand
            if panels:
                halves, second = tuple(map(pack, halves)), pack(second)
            linear = {
                "linear_0": sampler["linear_0"] | {"kernel": halves},
                "linear_1": sampler["linear_1"] | {"kernel": second},
            }
            variables["mtp"] |= {"sampler": sampler | linear}
    return variables


def _keys(seed: int, number: int, batch: int) -> jax.Array:
    """A key for each row; rows are numbered over all batches."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), number + jnp.arange(batch))


def _bucket(length: int, most: int) -> int:
    """The next power of two, and no more than the context."""
    size = _SMALLEST_BUCKET
    while size < length:
        size *= 2
    return max(min(size, most), length)
