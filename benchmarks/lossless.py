"""Whether decoding with drafts gives the tokens of plain decoding: many prompts, every kind of plan and batch.

    python benchmarks/lossless.py --model MODEL --adapter ADAPTER --prompts *.jsonl --spec-bench question.jsonl
    ... --adapter noise                  an adapter of eight masks, full of noise
    ... --dtype bfloat16                 counts flips, beside those of plain decoding between batch sizes

Plain decoding with batch 1 is the reference. Where an output departs from it, the gap between plain decoding's two
best logits decides: below 1e-4 it is a tie, and listed; anything else is a fault, and the exit code is 1. Prompts are
cut from the left, so that 160 tokens fit behind them. --spec-bench takes Spec-Bench's file of questions.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mtp_jax.api import generator as generator_of
from mtp_jax.data.prompts import read_prompts
from mtp_jax.decoding.generator import Completion, Generator, tokens_per_step
from mtp_jax.decoding.options import Options
from mtp_jax.decoding.plan import parse_plan
from mtp_jax.errors import run_command
from mtp_jax.evaluating.ties import TIE, Gaps, departure
from mtp_jax.model.base import Base, open_base
from mtp_jax.model.weights import PROJECTIONS
from mtp_jax.mtp.adapter import AdapterShape, init_adapter
from mtp_jax.mtp.adapter_folder import open_adapter

_PLANS = ["none", "linear:1", "linear:4", "linear:8", "quadratic:1", "quadratic:2", "quadratic:4"]
_PLANS += ["blocks:3,2,1,1", "blocks:2,0,1"]
_CATEGORIES = ("translation", "qa", "math_reasoning", "summarization")
_ROOM = 160


def equipped(base: Base, adapter: str, dtype: str) -> Generator:
    """A generator with an adapter from a folder, or one of noise."""
    options, kept = Options(), jnp.dtype(dtype)
    if adapter != "noise":
        found = open_adapter(adapter, base)
        return generator_of(base, options, kept, (found.shape, found.arrays))
    shape = AdapterShape(8, 8, 16.0, PROJECTIONS, "residual")
    fresh = init_adapter(base.g, shape, base.load(kept)["embed"]["embedding"], jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(fresh))))
    noisy = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), fresh)
    return generator_of(base, options, kept, (shape, noisy))


def encoded(generator: Generator, files: list[str], spec_bench: str | None) -> list[list[int]]:
    """Token ids of all prompts; chats as text where the tokenizer has no template."""
    prompts: list[Any] = [prompt for file in files for prompt in read_prompts(file)]
    if spec_bench:
        questions = [json.loads(line) for line in Path(spec_bench).read_text(encoding="utf-8").splitlines()]
        for category in _CATEGORIES:
            texts = [q["turns"][0] for q in questions if q["category"] == category]
            prompts += [[{"role": "user", "content": text}] for text in texts[:20]]
    most = generator.g.max_positions - _ROOM
    out = []
    for prompt in prompts:
        if not isinstance(prompt, str) and generator.tokenizer.chat_template is None:
            prompt = "\n".join(message["content"] for message in prompt)
        if isinstance(prompt, str):
            ids = generator.tokenizer(prompt)["input_ids"]
        else:
            ids = generator.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
        out.append(list(ids[-most:]))
    return out


def main() -> None:
    """Parse, decode, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", required=True, help="a folder, bundled:NAME, or noise")
    parser.add_argument("--prompts", nargs="*", default=[], metavar="FILE.jsonl")
    parser.add_argument("--spec-bench", metavar="question.jsonl", help="20 prompts each of " + ", ".join(_CATEGORIES))
    parser.add_argument("--every", type=int, default=1, help="take every so many prompts")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--plans", nargs="+", default=_PLANS)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    a = parser.parse_args()
    base = open_base(a.model)
    generator = equipped(base, a.adapter, a.dtype)
    prompts = encoded(generator, a.prompts, a.spec_bench)[:: a.every]
    gap = Gaps(base)

    def run(plan: str, size: int) -> list[Completion]:
        planned = generator.using(plan=parse_plan(plan))
        by_length = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]) // 128, i))  # fewer shapes, still ragged
        done: dict[int, Completion] = {}
        for at in track(range(0, len(prompts), size), f"{plan} x{size}", console=Console(stderr=True), transient=True):
            part = by_length[at : at + size]
            done |= zip(part, planned.complete([prompts[i] for i in part], a.new_tokens, size), strict=True)
        return [done[i] for i in range(len(prompts))]

    reference = [completion.token_ids for completion in run("none", 1)]
    table = Table(
        "plan", "batch", "identical", "ties" if a.dtype == "float32" else "flips", "faults", "tokens per step"
    )
    ties, faults = [], 0
    for size, plan in itertools.product(a.batch_sizes, a.plans):
        done = run(plan, size)
        left = [i for i, c in enumerate(done) if c.token_ids != reference[i]]
        wrong = 0
        for i in left:
            first = departure(done[i].token_ids, reference[i])
            size_of_gap = gap(prompts[i] + reference[i][:first])
            ties.append(f"{plan}, batch {size}, prompt {i}, new token {first}: gap {size_of_gap:.1e}")
            wrong += a.dtype == "float32" and size_of_gap >= TIE
        faults += wrong
        counts = (f"{len(done) - len(left)} of {len(done)}", str(len(left) - wrong), str(wrong))
        table.add_row(plan, str(size), *counts, f"{tokens_per_step(done):.2f}")
    console = Console(width=120)
    console.print(f"{a.model}, adapter {a.adapter}, {a.dtype}, {len(prompts)} prompts, {a.new_tokens} new tokens")
    console.print(table)
    if a.dtype == "float32":
        for line in ties:
            console.print(line)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    run_command(main)
