"""What each objective brings to a run: what is trained, what is frozen, how it is judged, what it writes."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import Config
from mtp_jax.data.batches import Batch
from mtp_jax.data.documents import Document
from mtp_jax.data.held_out import held_out_prompts
from mtp_jax.decoding.loop import Decoding, Limits
from mtp_jax.decoding.plan import BlockPlan
from mtp_jax.errors import UserError
from mtp_jax.model.folder import find_folder, read_geometry, read_json, stop_ids
from mtp_jax.model.folder_writer import parameter_count, write_folder
from mtp_jax.model.weights import Params
from mtp_jax.mtp.adapter import init_adapter
from mtp_jax.mtp.adapter_folder import CONFIG, find_adapter, fingerprint, load_adapter, write_adapter
from mtp_jax.mtp.estimate import Continuations, Estimator, table
from mtp_jax.mtp.losses import MultiTokenLoss
from mtp_jax.sharding import put, replicated
from mtp_jax.training.base import Base, load_base
from mtp_jax.training.evaluation import make_evaluate
from mtp_jax.training.next_token import NextToken
from mtp_jax.training.program import Program, adapter_shape


class Task(Protocol):
    """An objective with everything a run needs around it."""

    frozen: Params | None
    last: str  # a file of the result's folder, without which it is not whole

    def start(self) -> Params:
        """Fresh values of what is trained."""

    def evaluate(self, trained: Params, batches: Iterable[Batch]) -> dict[str, Any]:
        """Held-out figures."""

    def write(self, run_dir: Path, trained: Params, figures: dict[str, Any]) -> Path:
        """Write the result; returns its folder. All processes call it, for each holds a part; the first one writes."""


def make_task(config: Config, base: Base, program: Program, place: Callable[[Batch], Any]) -> Task:
    """The task of a config's objective; a frozen base is loaded."""
    return (NextTokenTask if config.objective == "next_token" else MultiTokenTask)(config, base, program, place)


class NextTokenTask:
    """Trains all base weights, in float32, and writes a Hugging Face folder."""

    frozen, last = None, "config.json"

    def __init__(self, config: Config, base: Base, program: Program, place: Callable[[Batch], Any]):
        assert isinstance(program.objective, NextToken)
        self.config, self.base, self.mesh = config, base, program.mesh
        self.held_out = make_evaluate(program.objective, place, replicated(program.mesh))

    def start(self) -> Params:
        """The base's weights, or new ones."""
        return load_base(self.base, self.mesh, self.config.seed, jnp.float32)

    def evaluate(self, trained: Params, batches: Iterable[Batch]) -> dict[str, Any]:
        """Loss and next-token accuracy."""
        return self.held_out(trained, batches)

    def write(self, run_dir: Path, trained: Params, figures: dict[str, Any]) -> Path:
        """`model/`, an ordinary Hugging Face folder."""
        del figures
        out, dtype = run_dir / "model", jnp.dtype(self.config.model.save_dtype)
        generation = None
        if self.base.folder is not None and (self.base.folder / "generation_config.json").is_file():
            generation = read_json(self.base.folder / "generation_config.json")
        base = self.base
        write_folder(out, trained, base.g, base.config, base.tokenizer, dtype, generation=generation)
        return out


class MultiTokenTask:
    """Trains gated LoRA, masks and sampler beside the frozen base, and writes an adapter folder."""

    last = CONFIG

    def __init__(self, config: Config, base: Base, program: Program, place: Callable[[Batch], Any]):
        assert base.folder is not None and isinstance(program.objective, MultiTokenLoss)
        self.config, self.base, self.program, self.place = config, base, program, place
        self.objective, self.shape = program.objective, program.objective.shape
        self.frozen = {"params": load_base(base, program.mesh, config.seed, jnp.dtype(config.model.compute_dtype))}
        everywhere = replicated(program.mesh)  # every process reads all figures
        self.sums = jax.jit(self._sums, out_shardings=everywhere)
        estimator = Estimator(self.objective.model, self.shape)
        self.accepted = jax.jit(estimator.accepted, out_shardings=everywhere)
        self.continuations: Continuations | None = None

    def start(self) -> Params:
        """A fresh adapter, or the one of `model.adapter`."""
        placed = self.program.placed.trained
        if self.config.model.adapter is not None:
            _, adapter = load_adapter(find_adapter(self.config.model.adapter), self.base.g, self.base.folder)
            adapter["mtp"]["masks"] = adapter["mtp"]["masks"][: self.shape.masks]
            return jax.tree.map(put, adapter, placed)
        draw = jax.jit(lambda table, key: init_adapter(self.base.g, self.shape, table, key), out_shardings=placed)
        return draw(self.frozen["params"]["embed"]["embedding"], jax.random.key(self.config.seed))

    def _sums(self, trained: Params, frozen: Params, batch: Any) -> tuple[Any, Any]:
        step = jnp.int32(self.config.train.steps)  # past any warm-up
        return self.objective.sums(trained, frozen, batch, step), self.objective.totals(batch)

    def evaluate(self, trained: Params, batches: Iterable[Batch]) -> dict[str, Any]:
        """Every loss term, teacher-forced agreement by offset, and estimated tokens per step by number of masks."""
        total = None
        for batch in batches:
            part = jax.device_get(self.sums(trained, self.frozen, self.place(batch)))
            part = jax.tree.map(lambda x: np.asarray(x, np.float64), part)
            total = part if total is None else jax.tree.map(np.add, total, part)
        assert total is not None
        figures = {name: plain(value) for name, value in self.objective.values(*total)[1].items()}
        if self.continuations is not None:
            accepted = jax.device_get(self.accepted(trained, self.frozen, self.continuations))
            figures["tokens_per_step"] = table(accepted, self.continuations, self.shape.masks)
        return figures

    def choose_prompts(self, documents: list[Document]) -> None:
        """Fix the held-out prompts that tokens per step are estimated on, continued greedily by the base model."""
        e = self.config.evaluation
        limit = min(e.prompt_tokens + e.new_tokens, self.base.g.max_positions)
        length = max(1, min(e.prompt_tokens, limit - 2))
        prompts = held_out_prompts(documents, self.base.tokenizer, e.prompts, length)
        if not prompts:
            return
        assert self.base.folder is not None
        stops = stop_ids(self.base.folder)
        model = self.objective.model

        @partial(jax.jit, out_shardings=replicated(self.program.mesh))
        def run(variables: Any, prompts: Any) -> Any:
            lengths = jnp.full(len(prompts), length, jnp.int32)
            limits = Limits(lengths + limit - length, jnp.asarray(stops, jnp.int32))
            state = Decoding(model, BlockPlan((0,))).decode(variables, prompts, lengths, limits, limit + 1, model.dtype)
            return Continuations(state.tokens, lengths, state.length)

        self.continuations = run(self.frozen, np.asarray(prompts, np.int32))

    def write(self, run_dir: Path, trained: Params, figures: dict[str, Any]) -> Path:
        """`adapter/`, which every command accepts as an adapter."""
        out = run_dir / "adapter"
        assert self.base.folder is not None and self.config.model.path is not None
        base = {"name": self.config.model.path, "fingerprint": fingerprint(self.base.folder)}
        train = self.config.train
        summary = {
            "steps": train.steps,
            "batch_size": train.batch_size,
            "sequence_length": train.sequence_length,
            "target": self.config.mtp.target,  # type: ignore[union-attr]
            "trained_parameters": parameter_count(trained),
            "base_parameters": parameter_count(self.frozen),
            "held_out": figures,
        }
        write_adapter(out, self.base.g, self.shape, trained, base, summary, jnp.dtype(self.config.model.save_dtype))
        return out


def check_adapter(config: Config) -> None:
    """Read the adapter that a run starts from and write nothing.

    Raises:
        UserError: no adapter there, one of another base, or one that the config's settings do not continue.
    """
    if config.model.adapter is None:
        return
    assert config.model.path is not None
    folder = find_folder(config.model.path)
    found, _ = load_adapter(find_adapter(config.model.adapter), read_geometry(folder), folder)
    wanted = adapter_shape(config)
    faults = []
    if wanted.masks > found.masks:
        faults.append(f"mtp.masks={wanted.masks} is more than the {found.masks} that model.adapter has.")
    for name in ("rank", "alpha", "targets", "sampler", "gated"):
        here, there = getattr(wanted, name), getattr(found, name)
        if here != there and not (name == "targets" and set(here) == set(there)):
            key = f"{'mtp' if name == 'sampler' else 'lora'}.{name}"
            faults.append(f"{key}={here!r} differs from {there!r}, which model.adapter was trained with.")
    if faults:
        raise UserError(*faults)


def plain(value: Any) -> Any:
    """A number, or a list of numbers, for a line of JSON."""
    return np.asarray(value).tolist()
