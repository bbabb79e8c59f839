"""What SGLang's and vLLM's loaders ask of an adapter's folder, written out from their sources (docs/serving.md).

Module names and shapes come from transformers' own model of the base, not from this package.
"""

import json
import re

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

_STACKED = {"sglang": (("q_proj", "v_proj"), ("k_proj", "q_proj"), ("v_proj", "q_proj"), ("up_proj", "gate_proj"))}
_VLLM_MOST = 512  # of --max-lora-rank


def broken(folder, base, engine):
    """Every rule that the folder breaks, in words."""
    config = json.loads((folder / "adapter_config.json").read_text())
    linears, faults = linears_of(base), []
    for key in ("peft_type", "target_modules", "r", "lora_alpha"):
        if key not in config:
            faults.append(f"{key} is missing")
    if faults:
        return faults
    rank = config["r"]
    if str(config["peft_type"]).lower() != "lora":
        faults.append("peft_type")
    if not isinstance(config["target_modules"], list):
        faults.append("target_modules is no list")
    if config.get("use_dora"):
        faults.append("use_dora")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        faults.append("one rank for all modules")
    if engine == "sglang" and config.get("use_rslora"):
        faults.append("use_rslora is not read, so the scale is wrong")
    if engine == "vllm":
        if config.get("modules_to_save"):
            faults.append("modules_to_save")
        if config.get("bias", "none") != "none":
            faults.append("bias")
        if rank > _VLLM_MOST:
            faults.append("rank above --max-lora-rank")
        if sliding(base):
            faults.append("sliding windows")

    weights = {file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".pt")}
    if weights != {"adapter_model.safetensors"}:
        faults.append("weight files: " + ", ".join(sorted(weights)))
        if "adapter_model.safetensors" not in weights:
            return faults
    added = folder / "added_tokens.json"
    vocabulary = AutoConfig.from_pretrained(base).vocab_size
    if added.exists() and max(json.loads(added.read_text()).values()) >= vocabulary:
        faults.append("added tokens")
    return faults + broken_tensors(folder, config, linears, engine)


def broken_tensors(folder, config, linears, engine):
    rank, faults, found = config["r"], [], {}
    with safe_open(folder / "adapter_model.safetensors", "pt") as tensors:
        held = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    for name, tensor in held.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        module = match and match[1]
        if module not in linears or module.split(".")[-1] not in config["target_modules"]:
            faults.append(f"matches no module: {name}")
            continue
        rows, columns = linears[module]
        want = (rank, columns) if match[2] == "A" else (rows, rank)
        if tuple(tensor.shape) != want:
            faults.append(f"shape of {name}")
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            faults.append(f"numbers of {name}")
        found.setdefault(module, set()).add(match[2])
    faults += [f"half a pair: {module}" for module, kinds in found.items() if kinds != {"A", "B"}]
    layers = {re.match(r".*\.layers\.(\d+)\.", module)[1] for module in linears if ".layers." in module}
    for target in config["target_modules"]:
        have = {re.match(r".*\.layers\.(\d+)\.", module)[1] for module in found if module.endswith("." + target)}
        if have != layers:
            faults.append(f"{target} is not in every layer")
    for one, other in _STACKED.get(engine, ()):
        if one in config["target_modules"] and other not in config["target_modules"]:
            faults.append(f"{one} needs {other}")
    return faults


def linears_of(base):
    """Every linear module of a base and its shape, [out, in]."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    return {name: tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


def sliding(base):
    """Whether any layer has a window."""
    config = AutoConfig.from_pretrained(base)
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return "sliding_attention" in kinds
    return getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
