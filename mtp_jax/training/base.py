"""The base model a run starts from: a checkpoint's folder, or a new one with its tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mtp_jax.config import Config, TokenizerRecipe
from mtp_jax.data.datasets import SourceDocuments
from mtp_jax.data.tokenizer import save_tokenizer, train_tokenizer
from mtp_jax.errors import UserError
from mtp_jax.model.folder import (
    find_folder,
    load_params,
    load_tokenizer,
    match_table,
    read_geometry,
    read_json,
    stored_tensors,
)
from mtp_jax.model.geometry import Geometry
from mtp_jax.model.weights import Params, init_params, weight_table
from mtp_jax.runs import processes
from mtp_jax.runs.folder import RunFolder
from mtp_jax.sharding import table_sharding, weight_sharding
from mtp_jax.storage import local

_TOKENIZER = "tokenizer_config.json"


@dataclass(frozen=True)
class Base:
    """A base model, its weights not yet loaded."""

    g: Geometry
    config: dict[str, Any]  # its config.json
    tokenizer: Any
    folder: Path | None  # where its weights are; None for a new model


def check_base(config: Config) -> Any | None:
    """Read what a base model consists of and write nothing, so that a wrong one leaves no trace.

    Returns:
        The tokenizer; None where it is still to be trained.

    Raises:
        UserError: a folder, config, tokenizer or weights that do not do, or sequences longer than the model's context.
    """
    if config.model.geometry is not None:
        raise UserError("model.geometry stands for a model that is not here, for mtp_jax.preflight alone; unset it.")
    if config.model.path is not None:
        folder = find_folder(config.model.path)
        g = read_geometry(folder)
        match_table(weight_table(g), g, stored_tensors(folder), folder)
        tokenizer = load_tokenizer(folder, g)
    else:
        assert config.model.scratch is not None
        recipe, tokenizer = config.model.scratch.tokenizer, None
        g = Geometry.from_config(config.model.scratch.config, "model.scratch.config")
        if isinstance(recipe, str):
            tokenizer = load_tokenizer(local(recipe), g)
        elif recipe.vocabulary > g.V:
            raise UserError(
                f"model.scratch.tokenizer.vocabulary={recipe.vocabulary} is more than "
                f"model.scratch.config.vocab_size={g.V}."
            )
    if config.train.sequence_length > g.max_positions:
        raise UserError(
            f"train.sequence_length={config.train.sequence_length} is longer than the model's context of "
            f"{g.max_positions} (max_position_embeddings)."
        )
    return tokenizer


def find_base(config: Config, training: list[SourceDocuments], run: RunFolder) -> Base:
    """Read geometry and tokenizer; a new model's tokenizer is trained on the training documents, once per run.

    Raises:
        UserError: a folder, config or tokenizer that does not do.
    """
    if config.model.path is not None:
        folder = find_folder(config.model.path)
        g = read_geometry(folder)
        return Base(g, read_json(folder / "config.json"), load_tokenizer(folder, g), folder)
    assert config.model.scratch is not None
    scratch = config.model.scratch
    g = Geometry.from_config(scratch.config, "model.scratch.config")
    if isinstance(scratch.tokenizer, TokenizerRecipe):
        tokens = run.path / "tokenizer"
        vocabulary = scratch.tokenizer.vocabulary

        def train_once() -> None:
            run.pull(tokens, last=_TOKENIZER)
            if not tokens.is_dir():
                texts = (document.text() for source in training for document in source)
                save_tokenizer(train_tokenizer(texts, vocabulary), tokens)
                run.push_result(tokens, last=_TOKENIZER)

        processes.from_first(train_once)
        run.pull(tokens)
    else:
        tokens = local(scratch.tokenizer)
    return Base(g, scratch.config, load_tokenizer(tokens, g), None)


def load_base(base: Base, mesh: jax.sharding.Mesh, seed: int, dtype: jnp.dtype) -> Params:
    """The base's weights in `dtype`, read from its folder or drawn afresh, each in its final sharding."""
    if base.folder is not None:
        return load_params(base.folder, base.g, dtype, lambda weight: weight_sharding(mesh, weight))
    draw = jax.jit(
        lambda key: init_params(base.g, key, dtype), out_shardings=table_sharding(mesh, weight_table(base.g))
    )
    return draw(jax.random.key(seed))
