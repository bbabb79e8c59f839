"""A base model that is opened and validated once: whatever a command needs of it is read from here."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from mtp_jax.encoding import load_tokenizer
from mtp_jax.errors import UserError
from mtp_jax.files import read_json
from mtp_jax.locate import find_folder
from mtp_jax.model.folder import (
    Tensors,
    load_params,
    open_tensors,
    read_geometry,
    read_slice,
)
from mtp_jax.model.geometry import Geometry, text_config
from mtp_jax.model.weights import Params, Weight, weight_table

_SAMPLE_BYTES = 64 << 10


@dataclass(frozen=True)
class Base:
    """A Hugging Face model folder. Tokenizer and fingerprint are read when they are first asked for, and once."""

    name: str  # as the user gave it
    folder: Path
    g: Geometry
    config: dict[str, Any]  # its config.json, or of several modalities that of the text part
    tensors: Tensors

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer; raises UserError where there is none or it does not fit the model."""
        return load_tokenizer(self.folder, self.g.V)

    @cached_property
    def stops(self) -> tuple[int, ...]:
        """Token ids that end a text; raises UserError where they are none."""
        found = self.generation.get("eos_token_id")
        found = self.config.get("eos_token_id") if found is None else found
        stops = () if found is None else tuple(found) if isinstance(found, list) else (found,)
        if not all(isinstance(stop, int) and -(2**31) <= stop < 2**31 for stop in stops):
            raise UserError(f"{self.folder}: eos_token_id {found!r} should be a token id or a list of token ids.")
        return stops

    @cached_property
    def generation(self) -> dict[str, Any]:
        """Its `generation_config.json`; without one `config.json`, where transformers then looks for such settings."""
        file = self.folder / "generation_config.json"
        return read_json(file) if file.is_file() else self.config

    @property
    def weights(self) -> str:
        """How projections and head are held: "stored" as they are, or "int8"."""
        return "int8" if self.g.int8 else "stored"

    @cached_property
    def fingerprint(self) -> str:
        """A digest of names, shapes and dtypes of all tensors, of the first and last rows of each, and of int8.

        It does not depend on how the tensors are spread over files, and reads a bounded part of each.
        """
        return self._digest({key: key for key in self.tensors.stored})

    @cached_property
    def values(self) -> str:
        """The fingerprint of the weights rounded to bfloat16, by which a model saved in another dtype is the same.

        Saving in float16 may keep it or not: it rounds otherwise.
        """
        keys = [key for weight in weight_table(self.g) for key in weight.stored_keys()]
        return self._digest({key: self.tensors.renamed.get(key, key) for key in keys}, np.dtype(ml_dtypes.bfloat16))

    def _digest(self, names: dict[str, str], dtype: np.dtype | None = None) -> str:
        digest = hashlib.sha256(b"int8\n" if self.g.int8 else b"")
        for key, name in sorted(names.items()):
            tensor = self.tensors.stored[name]
            kept = dtype or tensor.dtype
            row_bytes = kept.itemsize * math.prod(tensor.shape[1:])
            count = min(tensor.shape[0], max(1, _SAMPLE_BYTES // max(1, row_bytes)))
            digest.update(f"{key} {tensor.shape} {kept.name}\n".encode())
            for rows in (slice(0, count), slice(tensor.shape[0] - count, tensor.shape[0])):
                digest.update(np.ascontiguousarray(read_slice(tensor, name, (rows,)).astype(kept)).tobytes())
        return digest.hexdigest()

    def load(
        self, dtype: DTypeLike | None = None, shardings: Callable[[Weight], jax.sharding.Sharding] | None = None
    ) -> Params:
        """The weights, see `load_params`."""
        return load_params(self.tensors, self.g, dtype, shardings)


def open_base(name: str, revision: str | None = None, weights: str = "stored") -> Base:
    """Open a Hugging Face folder, a hub name or bundled:NAME, and check that its tensors are those its config needs.

    Args:
        weights: "stored", or "int8" to quantise projections and head while they are loaded: then this is another
            model, whose own output it is that decoding gives.
    Raises:
        UserError: nothing of that name, weights held otherwise, an unsupported architecture, missing, unexpected or
            misshapen tensors.
    """
    if weights not in ("stored", "int8"):
        raise UserError(f'weights={weights!r}: should be "stored" or "int8".')
    folder = find_folder(name, revision)
    g = replace(read_geometry(folder), int8=weights == "int8")
    return Base(name, folder, g, text_config(read_json(folder / "config.json")), open_tensors(folder, g))
