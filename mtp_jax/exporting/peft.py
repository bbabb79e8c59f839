"""The LoRA part of an adapter in PEFT's format, for tools that read nothing else."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from mtp_jax.exporting.source import Source
from mtp_jax.model.weights import leaf_at, weight_table

FOLDER = "peft"
WARNING = (
    "PEFT has no gate: it applies this LoRA to every token, though it was trained for mask tokens alone. A model with "
    "it is NOT the base model, and merging it into the base damages the base. Use it to inspect or convert the "
    "matrices; for generation, use the adapter one folder up."
)


def write_peft(source: Source, folder: Path, dtype: np.dtype) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, both with the warning."""
    assert source.adapter is not None
    shape, lora = source.adapter.shape, source.adapter.arrays["lora"]
    tensors, modules = {}, []
    for weight in weight_table(source.base.g):
        if weight.path[0] != "layers" or weight.path[1] not in shape.targets or weight.path[2] != "kernel":
            continue
        modules.append(weight.key.split(".")[-2])
        pair = leaf_at(lora, weight.path[:2])
        for i in range(source.base.g.L):
            module = "base_model.model." + weight.key.format(layer=i).removesuffix(".weight")
            for name, kind in (("lora_A", "a"), ("lora_B", "b")):
                tensors[f"{module}.{name}.weight"] = np.ascontiguousarray(np.asarray(pair[kind][i]).T.astype(dtype))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source.hub_name,
        "revision": source.revision,
        "r": shape.rank,
        "lora_alpha": shape.alpha,
        "lora_dropout": 0.0,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    folder.mkdir()
    # One entry: the order of several would vary, and with it the file's bytes.
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"warning": WARNING})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(f"# LoRA without its gate\n\n**Warning.** {WARNING}\n", encoding="utf-8")
