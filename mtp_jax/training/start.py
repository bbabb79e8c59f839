"""What a run starts from: a base model or a new one with its tokenizer; perhaps an adapter; which tokens it drafts."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.typing import DTypeLike
from jaxtyping import Int

from mtp_jax.config import Config, TokenizerRecipe
from mtp_jax.data.datasets import SourceDocuments
from mtp_jax.data.frequency import frequent_tokens
from mtp_jax.data.sources import read_sources, texts_of
from mtp_jax.data.tokenizer import save_tokenizer, train_tokenizer
from mtp_jax.encoding import load_tokenizer
from mtp_jax.errors import UserError
from mtp_jax.files import read_json, write_whole
from mtp_jax.model.base import Base, open_base
from mtp_jax.model.geometry import Geometry
from mtp_jax.model.weights import Params, Weight, init_params, weight_table
from mtp_jax.mtp.adapter_folder import Adapter, open_adapter
from mtp_jax.runs import processes
from mtp_jax.runs.folder import RunFolder
from mtp_jax.storage import local
from mtp_jax.training.objectives import adapter_shape
from mtp_jax.training.program import check_length, check_vocabulary

_TOKENIZER = "tokenizer_config.json"


@dataclass(frozen=True)
class NewBase:
    """A base model to train from scratch: what `mtp_jax.model.base.Base` is for one that has weights."""

    g: Geometry
    config: dict[str, Any]  # its config.json
    seed: int
    tokenizer: Any | None  # None until it has been trained

    def load(self, dtype: DTypeLike, shardings: Callable[[Weight], jax.sharding.Sharding]) -> Params:
        """Fresh weights in `dtype`, each drawn straight into its sharding."""
        placed = unflatten_dict({weight.path: shardings(weight) for weight in weight_table(self.g)})
        draw = jax.jit(lambda key: init_params(self.g, key, dtype), out_shardings=placed)
        return draw(jax.random.key(self.seed))


def starting_base(config: Config) -> Base | NewBase:
    """Open the base model and write nothing, so that a wrong one leaves no trace.

    Raises:
        UserError: an unusable folder, config, tokenizer or tensors, or sequences longer than the model's context.
    """
    if config.model.geometry is not None:
        raise UserError("model.geometry describes a model that is not here, for mtp_jax.preflight alone; unset it.")
    if config.model.path is not None:
        base: Base | NewBase = open_base(config.model.path, weights=config.model.weights)
    else:
        assert config.model.scratch is not None
        scratch, tokenizer = config.model.scratch, None
        g = Geometry.from_config(scratch.config, "model.scratch.config")
        if isinstance(scratch.tokenizer, str):
            tokenizer = load_tokenizer(local(scratch.tokenizer), g.V)
        elif scratch.tokenizer.vocabulary > g.V:
            raise UserError(
                f"model.scratch.tokenizer.vocabulary={scratch.tokenizer.vocabulary} is more than "
                f"model.scratch.config.vocab_size={g.V}."
            )
        base = NewBase(g, scratch.config, config.seed, tokenizer)
    check_length(config, base.g)
    if isinstance(base, Base):
        check_vocabulary(config, base.g.V, base.stops)
    return base


def with_tokenizer(
    base: Base | NewBase, config: Config, training: list[SourceDocuments], run: RunFolder
) -> Base | NewBase:
    """The base; a new model's tokenizer is trained on the training documents, once per run."""
    if isinstance(base, Base) or base.tokenizer is not None:
        return base
    assert config.model.scratch is not None and isinstance(config.model.scratch.tokenizer, TokenizerRecipe)
    folder, vocabulary = run.path / "tokenizer", config.model.scratch.tokenizer.vocabulary

    def train_once() -> None:
        run.pull(folder, last=_TOKENIZER)
        if not folder.is_dir():
            save_tokenizer(train_tokenizer(texts_of(training), vocabulary), folder)
            run.push_result(folder, last=_TOKENIZER)

    processes.from_first(train_once)
    run.pull(folder)
    return replace(base, tokenizer=load_tokenizer(folder, base.g.V))


def starting_adapter(config: Config, base: Base | NewBase) -> Adapter | None:
    """Open the adapter that a run continues from, if any, and write nothing.

    Raises:
        UserError: no adapter there, one of another base, or one that the config's settings do not continue.
    """
    if config.model.adapter is None:
        return None
    assert isinstance(base, Base)
    adapter, wanted = open_adapter(config.model.adapter, base), adapter_shape(config, base.g)
    found, faults = adapter.shape, []
    if wanted.masks > found.masks:
        faults.append(f"mtp.masks={wanted.masks} is more than the {found.masks} that model.adapter has.")
    for name in ("rank", "alpha", "targets", "sampler", "gated", "vocabulary", "noise"):
        here, there = getattr(wanted, name), getattr(found, name)
        if here != there and not (name == "targets" and set(here) == set(there)):
            key = f"{'mtp' if name in ('sampler', 'vocabulary', 'noise') else 'lora'}.{name}"
            faults.append(f"{key}={here!r} differs from {there!r}, which model.adapter was trained with.")
    if faults:
        raise UserError(*faults)
    return adapter


def draft_vocabulary(
    config: Config,
    base: Base | NewBase,
    adapter: Adapter | None,
    training: list[SourceDocuments],
    weights: list[float],
    run: RunFolder,
) -> Int[np.ndarray, " U"] | None:
    """The token ids that are drafted, ascending: those of `model.adapter`, or the most frequent ones; None for all.

    They are counted once per run and kept in its folder, so that a resumed run has them whatever became of the data.
    """
    wanted = None if config.mtp is None else config.mtp.vocabulary
    if wanted is None:
        return None
    if adapter is not None:
        return adapter.arrays["vocabulary"]
    assert isinstance(base, Base)
    opened, file = base, run.path / "vocabulary.json"

    def count_once() -> list[int]:
        run.pull(file)
        if not file.is_file():
            counted, shares = training, weights
            if config.data.continuations is not None:  # few texts: what they continue knows rare tokens better
                written, _ = read_sources(config.data, continuations=False)
                parts = [source.weight for source in config.data.sources]
                counted, shares = [*training, *written], [*weights, *(part / sum(parts) for part in parts)]
            ids = frequent_tokens(counted, shares, opened.tokenizer, wanted, opened.g.V, opened.stops)
            write_whole(file, json.dumps({"ids": ids.tolist()}).encode())
            run.push(file)
        return read_json(file)["ids"]

    return np.asarray(processes.from_first(count_once), np.int32)
