"""From the name of a model or an adapter to a folder of this machine: bundled, a path, in a bucket, or on the hub."""

import re
from importlib import resources
from pathlib import Path

from mtp_jax.errors import UserError, reason
from mtp_jax.storage import local

# Files of a model on the hub that are of use: no code, no pickles.
SETTINGS = ("*.json", "*.jinja", "*.model", "*.txt")
FILES = (*SETTINGS, "*.safetensors")


def bundled_models() -> list[str]:
    """Names that `bundled:NAME` accepts."""
    return sorted(path.parent.name for path in _bundled().glob("*/config.json"))


def bundled_adapter(name: str) -> Path:
    """The folder of the adapter `bundled:NAME`, whose model may be bundled beside it or not.

    Raises:
        UserError: no adapter of that name.
    """
    folder = _bundled() / name.removeprefix("bundled:") / "adapter"
    if not folder.is_dir():
        there = sorted(path.parent.name for path in _bundled().glob("*/adapter"))
        raise UserError(f"there is no bundled adapter {name!r}; there is {', '.join(there) or 'none'}.")
    return folder


def _bundled() -> Path:
    return Path(str(resources.files("mtp_jax"))) / "bundled"


def find_folder(name: str, revision: str | None = None, patterns: tuple[str, ...] = FILES) -> Path:
    """The folder of `bundled:NAME`, of a path (also `gs://`), or of a hub name (downloaded when not yet here).

    Args:
        revision: of a hub name; the newest by default.
        patterns: files of a hub name that are needed.
    Raises:
        UserError: nothing of that name, here or on the hub.
    """
    if name.startswith("bundled:"):
        folder = _bundled() / name.removeprefix("bundled:")
        if not (folder / "config.json").is_file():
            raise UserError(f"there is no bundled model {name!r}; there is {', '.join(bundled_models()) or 'none'}.")
        return folder
    if (folder := local(name)).exists():
        if not folder.is_dir():
            raise UserError(f"{name}: a model is a folder with config.json and safetensors, and this is a file.")
        if not (folder / "config.json").is_file():
            raise UserError(f"{name}: config.json is missing, so this is no Hugging Face model folder.")
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise UserError(f"{name}: no such folder; give a model folder, bundled:NAME, or a hub name such as org/model.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"{name}: no such folder here, and the Hugging Face hub did not give it: {reason(error)}"
        ) from error
