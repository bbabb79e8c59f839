"""The base model's files in an exported folder: byte for byte, or in another dtype, a shard at a time."""

import codecs
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mtp_jax.files import read_json, starts_with_mark, write_json
from mtp_jax.model.base import Base
from mtp_jax.model.folder import INDEX, SINGLE, read_slice
from mtp_jax.model.folder_writer import write_tensors

# A model's files beside its weights. Its card is not among them: an export has its own.
_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def copy_companions(folder: Path, out: Path) -> None:
    """Copy config, generation config, tokenizer, chat templates and licence, byte for byte but for byte order marks."""
    for pattern in _COMPANIONS:
        for file in sorted(folder.glob(pattern)):
            target = out / file.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            if file.suffix == ".json" and starts_with_mark(file):
                target.write_bytes(file.read_bytes().removeprefix(codecs.BOM_UTF8))
            else:
                shutil.copyfile(file, target)


def copy_weights(base: Base, out: Path) -> None:
    """Copy a model's weight files and their index, byte for byte; several files without an index get one."""
    folder, stored = base.folder, base.tensors.stored
    files = sorted({tensor.file for tensor in stored.values()})
    whole = len(files) == 1 and not (folder / INDEX).is_file()
    for file in files:
        shutil.copyfile(file, out / (SINGLE if whole else file.name))
    if (folder / INDEX).is_file():
        shutil.copyfile(folder / INDEX, out / INDEX)
    elif not whole:
        weight_map = {key: stored[key].file.name for key in sorted(stored)}
        total = sum(tensor.dtype.itemsize * int(np.prod(tensor.shape)) for tensor in stored.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(out / INDEX, index)


def convert_weights(base: Base, out: Path, dtype: np.dtype) -> None:
    """Write a model's weights in another dtype, which `config.json` in `out` then states."""

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for key, tensor in base.tensors.stored.items():
            yield key, read_slice(tensor, key, (slice(None),) * len(tensor.shape)).astype(dtype)

    write_tensors(out, tensors())
    config = {key: value for key, value in read_json(out / "config.json").items() if key != "torch_dtype"}
    config["dtype"] = dtype.name
    write_json(out / "config.json", config)
