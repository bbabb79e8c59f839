"""The models whose shapes are measured; their weights are random."""

import json
from pathlib import Path
from typing import Any

from mtp_jax.errors import UserError
from mtp_jax.files import read_json
from mtp_jax.model.geometry import Geometry

_FOLDER = Path(__file__).resolve().parents[2] / "configs" / "geometries"
_FILES = {"1b": _FOLDER / "llama_3p2_1b.json", "8b": _FOLDER / "llama_3p1_8b.json"}
TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 16384,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
}


def config_of(name: str) -> dict[str, Any]:
    """The config.json of "tiny", "1b", "8b" or a file.

    Raises:
        UserError: none of these.
    """
    if name == "tiny":
        return TINY
    file = _FILES.get(name, Path(name))
    if not file.is_file():
        raise UserError(f"--geometry {name}: should be {', '.join(_FILES)} or a config.json.")
    return read_json(file)


def geometry(name: str) -> Geometry:
    """The geometry of such a name."""
    return Geometry.from_config(config_of(name), name)


def file_of(name: str, out: Path) -> Path:
    """A file that `model.geometry` of a training config can name."""
    if name in _FILES or name != "tiny":
        return _FILES.get(name, Path(name))
    file = out / "tiny.json"
    file.write_text(json.dumps(TINY))
    return file
