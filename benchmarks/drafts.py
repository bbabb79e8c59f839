"""Tokens per step by decoding and by the estimate of training, with a shortlist and with the whole vocabulary.

    python benchmarks/drafts.py --model MODEL --adapter ADAPTER --prompts math.jsonl code.jsonl --count 16
    python benchmarks/drafts.py --time --vocabulary 131072 --width 4096 --masks 8

The second form measures, with random weights, what choosing the drafts of one block takes; nothing is decoded.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from mtp_jax.api import generator as generator_of
from mtp_jax.cpu import fastest_forward
from mtp_jax.data.prompts import read_prompts
from mtp_jax.decoding.drafting import choose_drafts
from mtp_jax.decoding.generator import Completion, tokens_per_step
from mtp_jax.decoding.options import Options
from mtp_jax.decoding.plan import linear, plain, quadratic
from mtp_jax.errors import run_command
from mtp_jax.evaluating.measure import estimated
from mtp_jax.model.base import open_base
from mtp_jax.model.decoder import Decoder
from mtp_jax.model.geometry import Geometry
from mtp_jax.model.weights import init_params, unstack_layers
from mtp_jax.mtp.adapter import AdapterShape, init_adapter
from mtp_jax.mtp.adapter_folder import open_adapter

_BATCH = 8


def compare(a: argparse.Namespace) -> None:
    """Decode and estimate, print."""
    base = open_base(a.model)
    adapter = open_adapter(a.adapter, base)
    generator = generator_of(base, Options(), jnp.dtype("float32"), (adapter.shape, adapter.arrays))
    plans = [f(m) for m in (1, 2, 4, 8) if m <= adapter.shape.masks for f in (linear, quadratic)]
    table = Table("domain", "plan", "shortlist of 256", "whole vocabulary", "estimate", "identical")
    for file in a.prompts:
        prompts = [generator.encode(prompt, file) for prompt in read_prompts(file)[: a.count]]

        def run(plan: Any, shortlist: int | None, prompts: Any = prompts) -> list[Completion]:
            return generator.using(plan=plan, shortlist=shortlist).complete(prompts, a.new_tokens, _BATCH)

        texts = [c.token_ids for c in run(plain(), None)]
        estimates = estimated(base, adapter, prompts, texts)
        for plan in plans:
            short, whole = run(plan, 256), run(plan, None)
            ours, most = tokens_per_step(short), tokens_per_step(whole)
            same = sum(c.token_ids == d.token_ids == p for c, d, p in zip(short, whole, texts, strict=True))
            estimate = "" if plan.floating else f"{estimates[plan.drafts]:.3f}"
            row = (f"{ours:.3f} ({ours / most - 1:+.1%})", f"{most:.3f}", estimate)
            table.add_row(Path(file).stem, str(plan), *row, f"{same} of {len(texts)}")
    console = Console(width=110)
    console.print(f"{a.model}, {a.count} prompts a domain, {a.new_tokens} new tokens, batch {_BATCH}")
    console.print(table)


def timed(a: argparse.Namespace) -> None:
    """Time the choice of one block's drafts, print."""
    V, D, M = a.vocabulary, a.width, a.masks
    dtype = jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
    narrow = {"intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 8}
    sizes = {"vocab_size": V, "hidden_size": D, "max_position_embeddings": 64, "tie_word_embeddings": True}
    g = Geometry.from_config({"model_type": "llama", **sizes, **narrow})
    shape = AdapterShape(M, 1, 2.0, ("q",), "residual")
    forward = fastest_forward(Decoder(g, dtype, scanned=False), shape)
    params = jax.tree.map(lambda x: x.astype(dtype), init_params(g, jax.random.key(0), jnp.bfloat16))
    adapter = init_adapter(g, shape, params["embed"]["embedding"][:256], jax.random.key(1))
    adapter = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), adapter)
    variables = forward.prepare(unstack_layers(params), adapter)
    latents, behind = jax.random.normal(jax.random.key(2), (1, M, D), dtype), jnp.zeros(1, jnp.int32)

    def drafts(variables: Any, shortlist: int | None) -> Any:
        return choose_drafts(forward, variables, latents, None, behind, shortlist, None)[0]

    run = jax.jit(drafts, static_argnums=1)
    console = Console(width=110)
    how = f"{dtype}, bfloat16 weights, {type(forward).__name__}"
    console.print(f"{jax.devices()[0].device_kind}, V={V}, D={D}, M={M}, {how}: drafts of one block, batch 1")
    for shortlist in (256, None):
        seconds = []
        for _ in range(8):
            begin = time.perf_counter()
            jax.block_until_ready(run(variables, shortlist))
            seconds.append(time.perf_counter() - begin)
        name = "whole vocabulary" if shortlist is None else f"shortlist of {shortlist}"
        console.print(f"{name}: {1e3 * statistics.median(seconds[1:]):.2f} ms")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--adapter")
    parser.add_argument("--prompts", nargs="+", default=[], metavar="FILE.jsonl", help="one file per domain")
    parser.add_argument("--count", type=int, default=16, help="prompts of each file")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--time", action="store_true", help="time the choice of one block's drafts instead")
    parser.add_argument("--vocabulary", type=int, default=131_072)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--masks", type=int, default=8)
    a = parser.parse_args()
    if a.time:
        timed(a)
    elif a.model and a.adapter and a.prompts:
        compare(a)
    else:
        parser.error("needs --model, --adapter and --prompts, or --time")


if __name__ == "__main__":
    run_command(main)
