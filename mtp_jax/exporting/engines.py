"""Folders that inference engines load unchanged (docs/serving.md), and one for PEFT's proposal.

SGLang and vLLM serve a LoRA that acts on rows of random tokens alone, and draft and verify in turns; they know neither
mask embeddings nor a sampler head. PEFT's proposal knows both, in one form.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mtp_jax.errors import UserError
from mtp_jax.exporting.peft import CONFIG, TENSORS, lora_config, lora_tensors
from mtp_jax.exporting.source import Source, pointer_of
from mtp_jax.files import write_json
from mtp_jax.mtp.adapter_folder import ENGINE_CONFIG, described

# What the commands and rules were checked against: read, not run.
CHECKED = {
    "sglang": "SGLang with UNO (pull request 37667, `main` at 84dec470)",
    "vllm": "vLLM's open pull request 55947 (at cf792f8b)",
    "peft-mtp": "PEFT's open pull request 3541, **which is not merged and may change**",
}
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of --max-lora-rank
_LEARN_NOISE = (
    "train with mtp.rows: noise and mtp.sampler: none, or serve it with transformers (export without --engine)"
)
_EMBEDDING = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
# Places of the sampler head's layers in the proposal's module, a sequence with activations between.
_SAMPLER = {"linear_0": 0, "norm_0": 2, "linear_1": 3, "norm_1": 5}


def check_engine(source: Source, engine: str) -> None:
    """Raise UserError, one line for each reason, for an adapter that an engine cannot serve."""
    faults = [f"--engine {engine}: {reason}." for reason in _misfits(source, engine)]
    if faults:
        raise UserError(*faults)


def _misfits(source: Source, engine: str) -> Iterator[str]:
    """Why an engine cannot serve an adapter, and what to do instead."""
    if source.adapter is None:
        yield "this run trained a whole model, which any engine serves as it is; export it without --engine"
        return
    shape, g = source.adapter.shape, source.base.g
    if not g.plain:
        yield (
            "engines were checked for layers as of llama, mistral, qwen2 and qwen3, and those of this model "
            f"({g.family}) differ; serve it with transformers (export without --engine)"
        )
    if not shape.gated:
        yield "the adapter was trained without its gate and changes the base's output; train with lora.gated: true"
    if not shape.alpha.is_integer():
        yield f"lora.alpha={shape.alpha:g} should be a whole number there; train with one"
    if engine == "peft-mtp":
        yield from _misfits_of_proposal(source)
        return
    if shape.noise is None:
        yield f"mask rows with learned embeddings are unknown there; {_LEARN_NOISE}"
    if shape.sampler != "none":
        yield f"a sampler head ({shape.sampler}) is unknown there; {_LEARN_NOISE}"
    targets = set(shape.targets)
    if engine == "sglang":
        if targets & {"q", "k", "v"} and not {"q", "v"} <= targets:
            yield "it stacks q, k and v, which needs LoRA on q and v; train with lora.targets that hold both, or none"
        if "up" in targets and "gate" not in targets:
            yield "it stacks gate and up, which needs LoRA on gate; train with lora.targets that hold both, or none"
        if shape.noise is not None and (shape.noise.low > 1 or shape.noise.high != g.V):
            yield (
                f"it draws noise from all {g.V} tokens, and this adapter learned those from {shape.noise.low} to below "
                f"{shape.noise.high}; train without mtp.noise"
            )
        return
    if any(window is not None for window in g.windows):
        yield "sliding windows are refused there; serve it with --engine sglang"
    if shape.rank > max(_VLLM_RANKS):
        yield f"lora.rank={shape.rank} is above its limit of {max(_VLLM_RANKS)}; train with a lower one"
    if shape.noise is not None and shape.noise.low > 1:
        yield f"its noise begins at token 1, and this adapter's at {shape.noise.low}; train with mtp.noise.low: 0 or 1"


def _misfits_of_proposal(source: Source) -> Iterator[str]:
    assert source.adapter is not None
    shape = source.adapter.shape
    if shape.noise is not None:
        yield "mask rows hold learned embeddings there, and this adapter's noise; export with --engine sglang or vllm"
    if shape.sampler != "residual":
        yield f"its sampler head is the residual one, not {shape.sampler}; train with mtp.sampler: residual"
    if shape.vocabulary is not None:
        yield "it drafts from all tokens, this adapter from a draft vocabulary; train with mtp.vocabulary: null"
    names = mask_tokens(shape.masks)
    if known := sorted(set(names) & set(source.base.tokenizer.get_vocab())):
        yield f"the base's tokenizer already has {', '.join(known)}, which are to be the masks"


def mask_tokens(masks: int) -> list[str]:
    """The names of the masks in the proposal's tokenizer."""
    return [f"<mask_{i}>" for i in range(1, masks + 1)]


def write_engine(source: Source, part: Path, engine: str, dtype: np.dtype, measured: dict[str, Any] | None) -> None:
    """Write the files of an engine's folder into an empty one; `check_engine` comes before."""
    assert source.adapter is not None
    shape, config, tensors = source.adapter.shape, lora_config(source), lora_tensors(source, dtype)
    config |= {"use_rslora": False, "use_dora": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}}
    if engine == "peft-mtp":
        mtp = source.adapter.arrays["mtp"]
        ids = _write_tokenizer(source, part)
        # The gate: the LoRA acts from this sequence of tokens on, and masks stand last.
        config |= {"alora_invocation_tokens": ids, "trainable_token_indices": ids}
        config |= {"ensure_weight_tying": source.base.g.tied}
        tensors[_EMBEDDING] = np.asarray(mtp["masks"]).astype(dtype)
        save_file(_sampler(mtp["sampler"], dtype), part / "sampler_model.safetensors", metadata={"format": "pt"})
    else:
        summary = source.adapter.config.get("training") or {}
        write_json(part / ENGINE_CONFIG, described(shape, pointer_of(source), summary, measured), sort_keys=False)
    save_file(tensors, part / TENSORS, metadata={"format": "pt"})
    write_json(part / CONFIG, config, sort_keys=False)
    (part / "README.md").write_text(_card(source, engine), encoding="utf-8")


def _write_tokenizer(source: Source, part: Path) -> list[int]:
    """The base's tokenizer with the masks as special tokens; returns their ids."""
    assert source.adapter is not None
    tokenizer, names = copy.deepcopy(source.base.tokenizer), mask_tokens(source.adapter.shape.masks)
    tokenizer.add_tokens(names, special_tokens=True)
    tokenizer.save_pretrained(part)
    return [int(number) for number in tokenizer.convert_tokens_to_ids(names)]


def _sampler(sampler: dict[str, dict[str, np.ndarray]], dtype: np.dtype) -> dict[str, np.ndarray]:
    """The sampler head as the proposal's module holds it: kernels transposed, a norm's scale as its weight."""
    tensors = {}
    for layer, place in _SAMPLER.items():
        for name, array in sampler[layer].items():
            kind = "bias" if name == "bias" else "weight"
            stored = np.asarray(array).T if name == "kernel" else np.asarray(array)
            tensors[f"sampler.mlp.{place}.{kind}"] = np.ascontiguousarray(stored).astype(dtype)
    return tensors


def serve_command(source: Source, engine: str, folder: str) -> list[str]:
    """The lines of the command that serves a folder."""
    assert source.adapter is not None
    shape, base = source.adapter.shape, source.hub_name or source.name
    if engine == "sglang":
        return [
            "python -m sglang.launch_server",
            f"--model-path {base} --dtype bfloat16 --attention-backend fa3",
            f"--speculative-algorithm UNO --uno-lora-path {folder}",
            f"--speculative-num-draft-tokens {shape.masks + 1} --speculative-eagle-topk 1",
        ]
    assert shape.noise is not None
    rank = next(rank for rank in _VLLM_RANKS if rank >= shape.rank)
    options = [f'"method":"uno","uno_lora_path":"{folder}"', f'"uno_mask_token_id":{shape.noise.high}']
    options += ['"uno_noise_seed":0', f'"num_speculative_tokens":{shape.masks + 1}']
    return [
        f"VLLM_USE_V2_MODEL_RUNNER=1 vllm serve {base} --dtype bfloat16",
        f"--enable-lora --max-lora-rank {rank} --max-loras 2 --async-scheduling",
        """--attention-config '{"backend":"FLASH_ATTN","flash_attn_version":2}'""",
        f"--speculative-config '{{{','.join(options)}}}'",
    ]


def _of_int8(source: Source) -> str:
    if not source.base.g.int8:
        return ""
    return "It was trained on the base held as int8 (`weights: int8` in mtp_jax); serve the base as you like.\n\n"


def _card(source: Source, engine: str) -> str:
    assert source.adapter is not None
    shape, known = source.adapter.shape, source.hub_name or Path(source.name.removeprefix("bundled:")).name
    lora = f"a LoRA of rank {shape.rank} and alpha {shape.alpha:g} on {', '.join(shape.targets)}"
    if engine == "peft-mtp":
        return (
            f"# {known}, several tokens per pass, in the format that PEFT considers\n\n"
            f"{shape.masks} mask embeddings, {lora}, and the residual sampler head, trained with mtp_jax for "
            f"`{source.name}`. The folder follows {CHECKED[engine]}. Nothing was run with it.\n\n"
            "- `adapter_model.safetensors`: the LoRA and the masks' embeddings; `adapter_config.json` names the masks' "
            "ids, behind which alone the LoRA acts\n"
            "- `sampler_model.safetensors`: the sampler head\n"
            f"- the base's tokenizer with `<mask_1>` to `<mask_{shape.masks}>`\n\n"
            f"{_of_int8(source)}"
            "The masks are tokens of the vocabulary there, so bar their ids from the output: the base's own text never "
            "holds them.\n"
        )
    assert shape.noise is not None
    lines = " \\\n    ".join(serve_command(source, engine, "."))
    estimate = ((source.adapter.config.get("training") or {}).get("held_out") or {}).get("tokens_per_pass_of_two")
    figures = ""
    if estimate:
        figures = (
            "Tokens per pass, two passes a cycle, estimated at the end of training: "
            f"{list(estimate.values())[-1]:.2f}, where 1.00 is decoding without drafts.\n\n"
        )
    return (
        f"# {known}, several tokens per cycle in {'SGLang' if engine == 'sglang' else 'vLLM'}\n\n"
        f"Of `{source.name}`, {lora}, trained with mtp_jax for rows of random tokens (ids {shape.noise.low} to "
        f"{shape.noise.high - 1}) behind the newest one. The engine drafts with it in one pass and verifies with the "
        "plain base in the next, so its greedy text is the base's.\n\n"
        f"```sh\n{lines}\n```\n\n"
        f"Checked against the sources of {CHECKED[engine]}, and not run there. At most {shape.masks + 1} draft tokens: "
        "so many were trained.\n\n"
        f"{figures}{_of_int8(source)}"
        "**Do not merge it** or apply it to all rows: the result is not the base model.\n\n"
        f"mtp_jax reads it back: `python -m mtp_jax.generate --model {source.hub_name or 'BASE'} --adapter .`\n"
    )
