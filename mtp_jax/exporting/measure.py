"""Tokens per step of an adapter by domain, measured by decoding, for the model card."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from mtp_jax.api import generator as generator_of
from mtp_jax.data.prompts import read_prompts
from mtp_jax.decoding.generator import tokens_per_step
from mtp_jax.decoding.options import Options
from mtp_jax.decoding.plan import parse_plan
from mtp_jax.errors import UserError
from mtp_jax.exporting.source import Source

PLANS = ("linear:4", "quadratic:1", "quadratic:2", "quadratic:4", "quadratic:8")
PROMPTS, NEW_TOKENS = 16, 128
_DTYPE = "float32"


def measure(source: Source, files: list[str]) -> dict[str, Any]:
    """Tokens per step of greedy decoding, for each file of prompts and each plan that the adapter has masks for.

    Raises:
        UserError: files of the same name, prompts that cannot be read.
    """
    assert source.adapter is not None
    prompts: dict[str, tuple[str, list[Any]]] = {}
    for file in files:
        if (domain := Path(file).stem) in prompts:
            raise UserError(f"--prompts {file}: another file is named {domain} too; a file's name is its domain's.")
        prompts[domain] = file, read_prompts(file)[:PROMPTS]
    shape = source.adapter.shape
    generator = generator_of(source.base, Options(), jnp.dtype(_DTYPE), (shape, source.adapter.arrays))
    plans = [plan for plan in map(parse_plan, PLANS) if plan.block <= shape.masks]
    domains: dict[str, dict[str, float]] = {}
    for domain, (file, texts) in prompts.items():
        encoded = [generator.encode(text, file) for text in texts]
        domains[domain] = {
            str(plan): round(tokens_per_step(generator.using(plan=plan).complete(encoded, NEW_TOKENS, 1)), 4)
            for plan in plans
        }
    counts = {domain: len(texts) for domain, (_, texts) in prompts.items()}
    return {"tokens_per_step": domains, "prompts": counts, "new_tokens": NEW_TOKENS, "dtype": _DTYPE, "batch": 1}
