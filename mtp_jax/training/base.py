"""The base model a run starts from: a checkpoint's folder, or a new one with its tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mtp_jax.config import Config, TokenizerRecipe
from mtp_jax.data.sources import Document
from mtp_jax.data.tokenizer import save_tokenizer, train_tokenizer
from mtp_jax.errors import UserError
from mtp_jax.model.decoder import Decoder
from mtp_jax.model.folder import find_folder, load_params, load_tokenizer, read_geometry, read_json
from mtp_jax.model.geometry import Geometry
from mtp_jax.model.weights import Params, init_params
from mtp_jax.training.sharding import params_sharding, weight_sharding


@dataclass(frozen=True)
class Base:
    """A base model, its weights not yet loaded."""

    g: Geometry
    config: dict[str, Any]  # its config.json
    tokenizer: Any
    folder: Path | None  # where its weights are; None for a new model


def find_base(config: Config, training: list[list[Document]], run_dir: Path) -> Base:
    """Read geometry and tokenizer; a new model's tokenizer is trained on the training documents, once per run.

    Raises:
        UserError: a folder, config or tokenizer that does not do, or sequences longer than the model's context.
    """
    if config.model.path is not None:
        folder = find_folder(config.model.path)
        g = read_geometry(folder)
        base = Base(g, read_json(folder / "config.json"), load_tokenizer(folder, g), folder)
    else:
        assert config.model.scratch is not None
        scratch = config.model.scratch
        g = Geometry.from_config(scratch.config, "model.scratch.config")
        if isinstance(scratch.tokenizer, TokenizerRecipe):
            tokens = run_dir / "tokenizer"
            if not tokens.is_dir():
                texts = (document.text() for source in training for document in source)
                save_tokenizer(train_tokenizer(texts, scratch.tokenizer.vocabulary), tokens)
        else:
            tokens = Path(scratch.tokenizer).expanduser()
        base = Base(g, scratch.config, load_tokenizer(tokens, g), None)
    if config.train.sequence_length > g.max_positions:
        raise UserError(
            f"train.sequence_length={config.train.sequence_length} is longer than the model's context of "
            f"{g.max_positions} (max_position_embeddings)."
        )
    return base


def load_base(base: Base, mesh: jax.sharding.Mesh, seed: int, dtype: jnp.dtype) -> Params:
    """The base's weights in `dtype`, read from its folder or drawn afresh, each in its final sharding."""
    if base.folder is not None:
        return load_params(base.folder, base.g, dtype, lambda weight: weight_sharding(mesh, weight))
    draw = jax.jit(lambda key: init_params(base.g, key, dtype), out_shardings=params_sharding(mesh, base.g))
    return draw(jax.random.key(seed))


def make_decoder(base: Base, config: Config) -> Decoder:
    """The model as the config wants it computed."""
    return Decoder(base.g, jnp.dtype(config.model.compute_dtype), config.model.remat)
