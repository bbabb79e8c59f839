"""An exported folder: a Hugging Face model, the adapter beside it, and the code that uses it."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from mtp_jax import storage
from mtp_jax.errors import FULL_DISK, UserError
from mtp_jax.exporting.base_files import convert_weights, copy_companions, copy_weights
from mtp_jax.exporting.card import model_card
from mtp_jax.exporting.engines import write_engine
from mtp_jax.exporting.peft import CONFIG as PEFT_CONFIG
from mtp_jax.exporting.peft import FOLDER as PEFT_FOLDER
from mtp_jax.exporting.peft import write_peft
from mtp_jax.exporting.source import Source, pointer_of
from mtp_jax.files import cache_folder, expanded, read_json, scratch_folder, whole_or_absent
from mtp_jax.mtp.adapter_folder import CONFIG, ENGINE_CONFIG, write_adapter_files

_CODE = "custom_generate"


def check_target(name: str, overwrite: bool) -> None:
    """Raise UserError where `name` is not a folder that may be written."""
    out: Any = name if storage.is_bucket(name) else expanded(name)
    if storage.is_bucket(name):
        full = bool(storage.listing(name))
    elif out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder.")
    else:
        full = out.is_dir() and any(out.iterdir())
    if full and not overwrite:
        raise UserError(
            f"--out {out}: exists and is not empty; name another folder, or give --overwrite to replace it."
        )


def check_apart(name: str, made_from: str, source: Source) -> None:
    """Raise UserError where writing `name` would replace what is read, given as `made_from`."""
    if storage.is_bucket(name):
        if f"{made_from.rstrip('/')}/".startswith(f"{name.rstrip('/')}/"):
            raise UserError(f"--out {name}: holds {made_from}, which the export is made from; name another folder.")
        return
    out = expanded(name)
    read = [source.base.folder, *([source.adapter.folder] if source.adapter else [])]
    for folder in read:
        if out.resolve() in (folder.resolve(), *folder.resolve().parents):
            raise UserError(f"--out {out}: holds {folder}, which the export is made from; name another folder.")


@contextlib.contextmanager
def target(name: str) -> Iterator[Path]:
    """Within: a folder to write into; where `name` is in a bucket, it is uploaded there on the way out.

    Raises:
        UserError: a bucket that cannot be written.
    """
    if not storage.is_bucket(name):
        yield expanded(name)
        return
    kept = cache_folder(storage.CACHE) or scratch_folder()
    with tempfile.TemporaryDirectory(dir=kept) as scratch:
        yield (out := Path(scratch, name.rstrip("/").rsplit("/", 1)[-1]))
        last = next(name for name in (CONFIG, ENGINE_CONFIG, PEFT_CONFIG, "config.json") if (out / name).is_file())
        storage.replace(out, name.rstrip("/"), last)


def write_export(
    source: Source,
    out: Path,
    base: str = "copy",
    peft: bool = False,
    dtype: np.dtype | None = None,
    measured: dict[str, Any] | None = None,
    repo: str | None = None,
    engine: str | None = None,
) -> None:
    """Write the folder; it is whole or absent, and replaces an older one.

    Args:
        engine: write what this one loads, see `exporting.engines`, in place of a folder for transformers.
        base: "copy" the base's files, or only write a "reference" to it.
        peft: also write the LoRA alone in PEFT's format.
        dtype: of the adapter, or of a whole model; as stored by default. A copied base is never changed.
        measured: what `measure` returns; by default what the adapter's config holds.
        repo: the hub repository that it will be uploaded to.
    """
    try:
        with whole_or_absent(out) as part:
            if engine is None:
                _write(source, part, base, peft, dtype, measured, repo)
            else:
                assert source.adapter is not None
                figures = source.adapter.config.get("measured")
                write_engine(source, part, engine, dtype or source.adapter.dtype, figures)
    except OSError as error:
        if error.errno in FULL_DISK:
            raise
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error}).") from error


def _write(
    source: Source,
    part: Path,
    base: str,
    peft: bool,
    dtype: np.dtype | None,
    measured: dict[str, Any] | None,
    repo: str | None,
) -> None:
    trained, config = source.adapter, None
    if base == "copy":
        copy_companions(source.base.folder, part)
        if trained is not None or dtype is None or dtype == source.base.tensors.dtype:
            copy_weights(source.base, part)
        else:
            convert_weights(source.base, part, dtype)
    if trained is not None:
        kept, summary = dtype or trained.dtype, trained.config.get("training") or {}
        figures = measured or trained.config.get("measured")
        write_adapter_files(
            part, source.base.g, trained.shape, trained.arrays, pointer_of(source), summary, kept, figures
        )
        code = resources.files("mtp_jax.exporting") / _CODE
        (part / _CODE).mkdir()
        for name in ("generate.py", "requirements.txt"):
            with resources.as_file(code / name) as file:
                shutil.copyfile(file, part / _CODE / name)
        if peft:
            write_peft(source, part / PEFT_FOLDER, kept)
        config = read_json(part / CONFIG)
    (part / "README.md").write_text(model_card(source, base, config, repo, peft), encoding="utf-8")
