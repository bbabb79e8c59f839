"""What each objective brings to a run: what is trained, what is frozen, how it is evaluated, what it writes."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import Config
from mtp_jax.data.batches import Batch
from mtp_jax.data.documents import Document
from mtp_jax.files import read_json
from mtp_jax.model.base import Base
from mtp_jax.model.folder_writer import parameter_count, write_folder
from mtp_jax.model.weights import Params
from mtp_jax.mtp.adapter import init_adapter
from mtp_jax.mtp.adapter_folder import CONFIG, Adapter, write_adapter
from mtp_jax.mtp.losses import MultiTokenLoss
from mtp_jax.sharding import put, replicated, weight_sharding
from mtp_jax.training.evaluation import AdapterEvaluation, NextTokenEvaluation
from mtp_jax.training.objectives import NextToken
from mtp_jax.training.program import Program
from mtp_jax.training.start import NewBase


@runtime_checkable
class Task(Protocol):
    """An objective with everything a run needs around it."""

    @property
    def frozen(self) -> Params | None:
        """What is trained beside and does not change."""

    @property
    def last(self) -> str:
        """A file of the result's folder, written last: without it the folder is incomplete."""

    def start(self) -> Params:
        """Initial values of what is trained."""

    def evaluate(self, trained: Params, batches: Iterable[Batch]) -> dict[str, Any]:
        """Held-out figures."""

    def write(self, run_dir: Path, trained: Params, figures: dict[str, Any], mask_rows: int | None) -> Path:
        """Write the result; returns its folder. All processes call it, as each holds a part; the first one writes.

        Args:
            figures: held-out ones, for the summary of an adapter.
            mask_rows: that an adapter was trained on; None where they were not counted.
        """


def make_task(
    config: Config,
    base: Base | NewBase,
    adapter: Adapter | None,
    vocabulary: np.ndarray | None,
    program: Program,
    held_out: Sequence[Document],
) -> Task:
    """The task of a config's objective; a frozen base is loaded.

    Args:
        adapter: what multi_token starts from in place of a fresh adapter.
        vocabulary: the draft vocabulary, for multi_token; None for all tokens.
        held_out: documents to estimate tokens per step on, for multi_token.
    """
    if config.objective == "next_token":
        return NextTokenTask(config, base, program)
    assert isinstance(base, Base)
    return MultiTokenTask(config, base, adapter, vocabulary, program, held_out)


class NextTokenTask:
    """Trains all base weights, in float32, and writes a Hugging Face folder."""

    frozen, last = None, "config.json"

    def __init__(self, config: Config, base: Base | NewBase, program: Program):
        assert isinstance(program.objective, NextToken)
        self.config, self.base, self.mesh = config, base, program.mesh
        self.evaluation = NextTokenEvaluation(program.objective, program.place, replicated(program.mesh))

    def start(self) -> Params:
        """The base's weights, or new ones."""
        return self.base.load(jnp.dtype("float32"), partial(weight_sharding, self.mesh))

    def evaluate(self, trained: Params, batches: Iterable[Batch]) -> dict[str, Any]:
        """Loss and next-token accuracy."""
        return self.evaluation(trained, batches)

    def write(self, run_dir: Path, trained: Params, figures: dict[str, Any], mask_rows: int | None) -> Path:
        """`model/`, an ordinary Hugging Face folder."""
        del figures, mask_rows
        base, out, dtype = self.base, run_dir / "model", jnp.dtype(self.config.model.save_dtype)
        generation = None
        if isinstance(base, Base) and (file := base.folder / "generation_config.json").is_file():
            generation = read_json(file)
        write_folder(out, trained, base.g, base.config, base.tokenizer, dtype, generation=generation)
        return out


class MultiTokenTask:
    """Trains gated LoRA, mask embeddings and sampler head beside the frozen base, and writes an adapter folder."""

    last = CONFIG

    def __init__(
        self,
        config: Config,
        base: Base,
        adapter: Adapter | None,
        vocabulary: np.ndarray | None,
        program: Program,
        held_out: Sequence[Document],
    ):
        assert isinstance(program.objective, MultiTokenLoss)
        self.config, self.base, self.adapter, self.vocabulary, self.program = config, base, adapter, vocabulary, program
        self.objective, mesh = program.objective, program.mesh
        dtype = jnp.dtype(config.model.compute_dtype)
        self.frozen: Params = {"params": base.load(dtype, partial(weight_sharding, mesh))}
        if vocabulary is not None:
            self.frozen["vocabulary"] = put(vocabulary, replicated(mesh))
        documents = [] if config.evaluation.every is None else held_out
        step = config.train.steps  # past any warm-up and growth
        self.evaluation = AdapterEvaluation(
            base, self.frozen, self.objective, mesh, program.place, config.evaluation, documents, step
        )

    def start(self) -> Params:
        """A fresh adapter, or the one of `model.adapter` with as many masks as the config wants."""
        placed, shape = self.program.placed.trained, self.objective.shape
        if self.adapter is not None:
            found = {name: self.adapter.arrays[name] for name in placed}
            if shape.noise is None:
                found["mtp"] = found["mtp"] | {"masks": found["mtp"]["masks"][: shape.masks]}
            return jax.tree.map(put, found, placed)
        draw = jax.jit(lambda table, key: init_adapter(self.base.g, shape, table, key), out_shardings=placed)
        return draw(self.frozen["params"]["embed"]["embedding"], jax.random.key(self.config.seed))

    def evaluate(self, trained: Params, batches: Iterable[Batch]) -> dict[str, Any]:
        """Loss terms, agreement by offset, and estimated tokens per step."""
        return self.evaluation(trained, batches)

    def write(self, run_dir: Path, trained: Params, figures: dict[str, Any], mask_rows: int | None) -> Path:
        """`adapter/`, which every command accepts as an adapter."""
        out, train = run_dir / "adapter", self.config.train
        base = {"name": self.base.name, "fingerprint": self.base.fingerprint, "values": self.base.values}
        base |= {} if self.base.weights == "stored" else {"weights": self.base.weights}
        summary = {
            "steps": train.steps,
            "batch_size": train.batch_size,
            "sequence_length": train.sequence_length,
            "mask_rows": mask_rows,
            "target": self.objective.terms.target,
            "trained_parameters": parameter_count(trained),
            "base_parameters": parameter_count(self.frozen["params"]),
            "held_out": figures,
        }
        dtype = jnp.dtype(self.config.model.save_dtype)
        whole = trained if self.vocabulary is None else trained | {"vocabulary": self.vocabulary}
        write_adapter(out, self.base.g, self.objective.shape, whole, base, summary, dtype)
        return out
