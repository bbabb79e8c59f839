"""The LoRA part of an adapter in PEFT's format, for tools that read nothing else."""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mtp_jax.exporting.source import Source
from mtp_jax.files import write_json
from mtp_jax.mtp.peft import modules_of, to_peft

FOLDER, CONFIG, TENSORS = "peft", "adapter_config.json", "adapter_model.safetensors"
WARNING = (
    "PEFT has no gate: it applies this LoRA to every token, though it was trained for mask tokens alone. A model with "
    "it is NOT the base model, and merging it into the base damages the base. Use it to inspect or convert the "
    "matrices; for generation, use the adapter one folder up."
)


def write_peft(source: Source, folder: Path, dtype: np.dtype) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, both with the warning."""
    assert source.adapter is not None
    folder.mkdir()
    # One entry: the order of several would vary, and with it the file's bytes.
    save_file(lora_tensors(source, dtype), folder / TENSORS, metadata={"warning": WARNING})
    write_json(folder / CONFIG, lora_config(source), sort_keys=False)
    (folder / "README.md").write_text(f"# LoRA without its gate\n\n**Warning.** {WARNING}\n", encoding="utf-8")


def lora_tensors(source: Source, dtype: np.dtype) -> dict[str, np.ndarray]:
    """The matrices by PEFT's names."""
    assert source.adapter is not None
    shape, lora = source.adapter.shape, source.adapter.arrays["lora"]
    return {
        name: matrix.astype(dtype) for name, matrix in to_peft(source.base.g, shape.targets, shape.rank, lora).items()
    }


def lora_config(source: Source) -> dict[str, Any]:
    """What PEFT's `adapter_config.json` says of them."""
    assert source.adapter is not None
    shape = source.adapter.shape
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source.hub_name,
        "revision": source.revision,
        "r": shape.rank,
        "lora_alpha": int(shape.alpha) if shape.alpha.is_integer() else shape.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(modules_of(source.base.g, shape.targets).values()),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
