"""Tokens per step of an adapter by domain, by decoding: what a model card says."""

from pathlib import Path
from typing import Any

from mtp_jax.data.prompts import read_prompts
from mtp_jax.decoding.generator import Generator
from mtp_jax.decoding.plan import parse_plan
from mtp_jax.errors import UserError

PLANS = ("linear:4", "quadratic:1", "quadratic:2", "quadratic:4", "quadratic:8")
PROMPTS, NEW_TOKENS = 16, 128


def measure(model: Path, adapter: Path, files: list[str]) -> dict[str, Any]:
    """Tokens per step of greedy decoding, for each file of prompts and each plan that the adapter has masks for.

    Raises:
        UserError: files of one name, prompts that cannot be read.
    """
    generator = Generator.load(str(model), "float32", str(adapter))
    assert generator.shape is not None
    plans = [plan for plan in map(parse_plan, PLANS) if plan.block <= generator.shape.masks]
    domains: dict[str, dict[str, float]] = {}
    counts = {}
    for file in files:
        if (domain := Path(file).stem) in domains:
            raise UserError(f"--prompts {file}: another file is named {domain} too; a file's name is its domain's.")
        prompts = [generator.encode(prompt, file) for prompt in read_prompts(file)[:PROMPTS]]
        counts[domain] = len(prompts)
        domains[domain] = {}
        for plan in plans:
            generator.plan = plan
            done = generator.complete(prompts, NEW_TOKENS, 1)
            tokens = sum(len(completion.token_ids) - 1 for completion in done)
            domains[domain][str(plan)] = round(tokens / max(sum(completion.steps for completion in done), 1), 4)
    return {"tokens_per_step": domains, "prompts": counts, "new_tokens": NEW_TOKENS, "dtype": "float32", "batch": 1}
