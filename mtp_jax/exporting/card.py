"""The model card of an export: what it is, its measured speed, how to use it."""

import contextlib
from pathlib import Path
from typing import Any

import yaml

from mtp_jax.errors import UserError
from mtp_jax.exporting.source import Source

_REPOSITORY = "multi-token prediction ([arXiv 2507.11851](https://arxiv.org/abs/2507.11851))"


def model_card(source: Source, base: str, config: dict[str, Any] | None, repo: str | None, peft: bool) -> str:
    """The text of README.md.

    Args:
        base: "copy" or "reference".
        config: the exported `mtp_config.json`; None for a whole model.
        repo: the hub repository it is uploaded to; otherwise examples name the folder itself, `.`.
    """
    here = repo or "."
    if config is None:
        return _front(source, ["mtp_jax"]) + _whole(source, here)
    known = source.hub_name or Path(source.name.removeprefix("bundled:")).name
    parts = [
        _front(source, ["multi-token-prediction", "speculative-decoding", "custom_generate"]),
        f"# {known}, several tokens per step\n\n"
        f"An adapter for {_base_link(source, known)} that lets it emit several tokens per forward pass: {_REPOSITORY}. "
        "The base model stays as it is, drafts come from mask tokens that alone meet the adapter, and the base model "
        "verifies them. So the output is the base model's own: token for token when greedy in float32, in distribution "
        "when sampled.\n",
        _use(source, base, here),
        _speed(config),
        _contents(source, base, config, peft),
    ]
    return "\n".join(parts)


def _front(source: Source, tags: list[str]) -> str:
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    if source.adapter is not None and source.hub_name:
        front |= {"base_model": source.hub_name, "base_model_relation": "adapter"}
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n"


def _base_link(source: Source, known: str) -> str:
    return f"[{known}](https://huggingface.co/{known})" if source.hub_name else f"`{known}`"


def _use(source: Source, base: str, here: str) -> str:
    lines = ["## Use\n", "With transformers 5 and PyTorch. The code that runs is `custom_generate/generate.py` here.\n"]
    example = _prompt(source, "def main():")
    load = "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
    if base == "copy":
        code = [
            load,
            f'tokenizer = AutoTokenizer.from_pretrained("{here}")',
            f'model = AutoModelForCausalLM.from_pretrained("{here}", trust_remote_code=True)',
            *example,
            "output = model.generate(ids, max_new_tokens=64)",
            "print(tokenizer.decode(output[0]))",
        ]
        lines += ["```python", *code, "```\n"]
        lines += [
            "Without `trust_remote_code` this is the plain base model, for transformers and any other engine. To use "
            "the adapter with a base model that is loaded already:\n"
        ]
        base_name = here
    else:
        base_name = source.hub_name or source.name
    revision = f', revision="{source.revision}"' if base == "reference" and source.revision else ""
    code = [
        load,
        f'tokenizer = AutoTokenizer.from_pretrained("{base_name}"{revision})',
        f'base = AutoModelForCausalLM.from_pretrained("{base_name}"{revision})',
        *example,
        "output = base.generate(",
        f'    ids, max_new_tokens=64, custom_generate="{here}", trust_remote_code=True, adapter="{here}"',
        ")",
        "print(tokenizer.decode(output[0]))",
    ]
    lines += ["```python", *code, "```\n"]
    lines += [
        "`generate` takes `max_new_tokens`, `max_length`, `do_sample`, `temperature`, `top_k`, `top_p`, attention "
        "masks, stop ids and streamers, and refuses what it does not implement. With `return_dict_in_generate=True` "
        "the output also holds `steps` and `accepted`, how many steps emitted 0, 1, ... drafts. `plan` says how a step "
        'drafts: `"quadratic:M"` (M masks behind every verified row), `"linear:M"`, `"none"`. By default it is '
        "quadratic with as many rows as are cheap on the device.\n",
        "With mtp_jax, in JAX:\n",
        f"    python -m mtp_jax.generate --model {base_name if base == 'reference' else here} --adapter {here} "
        + ("--chat\n" if len(example) > 1 else "--prompt 'def main():'\n"),
    ]
    return "\n".join(lines)


def _prompt(source: Source, text: str) -> list[str]:
    """Lines of Python that make the token ids of a prompt: `text`, or a question where there is a chat template."""
    chat = False
    with contextlib.suppress(UserError):  # no tokenizer
        chat = bool(source.base.tokenizer.chat_template)
    if not chat:
        return [f'ids = tokenizer("{text}", return_tensors="pt").input_ids']
    return [
        'messages = [{"role": "user", "content": "What is a tide?"}]',
        "chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, "
        'return_tensors="pt")',
        "ids = chat.input_ids",
    ]


def _speed(config: dict[str, Any]) -> str:
    lines = ["## Tokens per step\n"]
    measured, estimate = config.get("measured"), (config["training"].get("held_out") or {}).get("tokens_per_step")
    if measured:
        domains = measured["tokens_per_step"]
        plans = list(next(iter(domains.values())))
        lines += [f"| domain | prompts | {' | '.join(plans)} |", "|---" * (len(plans) + 2) + "|"]
        for domain, values in domains.items():
            figures = " | ".join(f"{values[plan]:.2f}" for plan in plans)
            lines.append(f"| {domain} | {measured['prompts'][domain]} | {figures} |")
        lines.append(
            f"\nMeasured by decoding greedily with mtp_jax, {measured['dtype']}, batch {measured['batch']}, up to "
            f"{measured['new_tokens']} new tokens a prompt: (new tokens - 1) / decoding steps, 1 without drafts. How "
            "much faster that is depends on what the rows of a step cost on the device.\n"
        )
    if estimate:
        lines += [
            f"| masks | {' | '.join(estimate)} |",
            "|---" * (len(estimate) + 1) + "|",
            f"| held-out documents of training | {' | '.join(f'{value:.2f}' for value in estimate.values())} |",
            "\nEstimated at the end of training, with quadratic decoding, on the base model's own greedy continuations "
            "of held-out prompts.\n",
        ]
    if not measured:
        lines.append("Not measured by domain.\n")
    return "\n".join(lines)


def _contents(source: Source, base: str, config: dict[str, Any], peft: bool) -> str:
    training, pointer = config["training"], config["base"]
    revision = f", revision `{pointer['revision']}`" if pointer.get("revision") else ""
    weights = (
        "the base model's weights, config and tokenizer, bit for bit"
        if base == "copy"
        else f"no base weights: load {_base_link(source, source.hub_name or Path(source.name).name)}{revision}"
    )
    held = ""
    if source.base.g.int8:
        held = (
            ". The adapter was trained on these weights held as int8, with a scale for each output channel (`weights: "
            "int8` here); transformers drafts with it and verifies by the weights as they are"
        )
    rows = "mask embeddings"
    if "noise" in config:
        rows = f"mask rows of random tokens from {config['noise']['low']} to below {config['noise']['high']}"
    lines = [
        "## What is here\n",
        f"- {weights}; its fingerprint is `{pointer['fingerprint'][:16]}`" + held,
        f"- `adapter.safetensors`, `mtp_config.json`: {config['masks']} {rows}, LoRA of rank {config['rank']} "
        f"and alpha {config['alpha']:g} on {', '.join(config['targets'])}, sampler head `{config['sampler']}`"
        + (f", drafts of {config['vocabulary']:,} frequent tokens" if "vocabulary" in config else ""),
        "- `custom_generate/`: `generate` for transformers",
    ]
    if peft:
        lines.append("- `peft/`: the LoRA alone, in PEFT's format, **which has no gate**; see its README")
    known = [name for name in ("steps", "batch_size", "sequence_length", "target") if name in training]
    facts = [f"{name.replace('_', ' ')} {training[name]}" for name in known]
    lines.append(f"\nTrained with mtp_jax: {', '.join(facts)}.\n" if facts else "\nTrained with mtp_jax.\n")
    return "\n".join(lines)


def _whole(source: Source, here: str) -> str:
    prompt = "\n".join(_prompt(source, "The"))
    return (
        f"# {source.name}\n\nA language model of the {source.base.g.family} family, trained with mtp_jax.\n\n"
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{here}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{here}")\n'
        f"{prompt}\n"
        "print(tokenizer.decode(model.generate(ids, max_new_tokens=32)[0]))\n"
        "```\n"
    )
