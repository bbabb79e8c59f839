"""Tokens per step by decoding and by the estimate of training, with a shortlist and with the whole vocabulary.

    python benchmarks/drafts.py --model ../shared/models/trio-17m --adapter runs/trio-17m/run \\
        --prompts ../shared/data/trio_prompts/math.jsonl ../shared/data/trio_prompts/code.jsonl --count 16
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
import numpy as np
from rich.console import Console
from rich.table import Table

from mtp_jax.data.prompts import read_prompts
from mtp_jax.decoding.drafting import choose_drafts
from mtp_jax.decoding.generator import Completion, Generator
from mtp_jax.decoding.plan import linear, quadratic
from mtp_jax.errors import run_command
from mtp_jax.model.decoder import Decoder
from mtp_jax.model.folder import find_folder, load_params
from mtp_jax.model.products import native, pack, times
from mtp_jax.mtp.adapter_folder import find_adapter, load_adapter
from mtp_jax.mtp.estimate import Continuations, Estimator, tokens_per_step
from mtp_jax.mtp.sampler import init_sampler

_BATCH = 8


def rate(done: list[Completion]) -> float:
    """Tokens per step over all completions."""
    return sum(len(c.token_ids) - 1 for c in done) / max(sum(c.steps for c in done), 1)


def estimated(generator: Generator, model: str, adapter: str, texts: list[tuple[list[int], list[int]]]) -> Any:
    """Accepted prefixes of prompts with their continuations, in batches, and these continuations."""
    folder = find_folder(model)
    shape, trained = load_adapter(find_adapter(adapter), generator.g, folder)
    frozen = {"params": load_params(folder, generator.g, jnp.dtype("float32"))}
    run = jax.jit(Estimator(Decoder(generator.g), shape).accepted)
    found = []
    width = -(-max(len(a + b) for a, b in texts) // 128) * 128
    for at in range(0, len(texts), _BATCH):
        part = (texts[at : at + _BATCH] * _BATCH)[:_BATCH]
        rows = np.asarray([a + b + [0] * (width - len(a + b)) for a, b in part])
        of = Continuations(rows, np.asarray([len(a) for a, _ in part]), np.asarray([len(a + b) for a, b in part]))
        count = len(texts[at : at + _BATCH])
        with jax.default_matmul_precision("highest"):
            accepted = np.asarray(run(trained, frozen, of))
        found.append((accepted[:count], Continuations(*(np.asarray(x)[:count] for x in of))))
    return (
        np.concatenate([accepted for accepted, _ in found]),
        Continuations(*(np.concatenate(parts) for parts in zip(*(of for _, of in found), strict=True))),
    )


def compare(a: argparse.Namespace) -> None:
    """Decode and estimate, print."""
    generator = Generator.load(a.model, "float32", a.adapter)
    assert generator.shape is not None
    plans = [f(m) for m in (1, 2, 4, 8) if m <= generator.shape.masks for f in (linear, quadratic)]
    table = Table("domain", "plan", "shortlist of 256", "whole vocabulary", "estimate", "identical")
    for file in a.prompts:
        prompts = [generator.encode(prompt, file) for prompt in read_prompts(file)[: a.count]]

        def run(plan: Any, shortlist: int | None, prompts: Any = prompts) -> list[Completion]:
            generator.plan, generator.shortlist = plan, shortlist
            return generator.complete(prompts, a.new_tokens, _BATCH)

        plain = [c.token_ids for c in run(type(plans[0])((0,)), None)]
        accepted, of = estimated(generator, a.model, a.adapter, list(zip(prompts, plain, strict=True)))
        for plan in plans:
            short, whole = run(plan, 256), run(plan, None)
            same = sum(c.token_ids == d.token_ids == p for c, d, p in zip(short, whole, plain, strict=True))
            estimate = "" if plan.floating else f"{tokens_per_step(accepted, of, plan.drafts):.3f}"
            row = (f"{rate(short):.3f} ({rate(short) / rate(whole) - 1:+.1%})", f"{rate(whole):.3f}", estimate)
            table.add_row(Path(file).stem, str(plan), *row, f"{same} of {len(plain)}")
    console = Console(width=110)
    console.print(f"{a.model}, {a.count} prompts a domain, {a.new_tokens} new tokens, batch {_BATCH}")
    console.print(table)


def timed(a: argparse.Namespace) -> None:
    """Time the choice of one block's drafts, print."""
    V, D, M = a.vocabulary, a.width, a.masks
    dtype = jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
    in_cpp = native()
    table = jax.random.normal(jax.random.key(0), (V, D), jnp.bfloat16)
    sampler = init_sampler(D, "residual", jnp.float32(1.0), jax.random.key(1))
    sampler = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(dtype), sampler)
    if in_cpp:  # as a Generator has them
        first = sampler["linear_0"]["kernel"]
        sampler["linear_0"]["kernel"] = (pack(first[:D]), pack(first[D:]))
        sampler["linear_1"]["kernel"] = pack(sampler["linear_1"]["kernel"])
    panels = pack(table.T.astype(dtype)) if in_cpp else None
    latents = jax.random.normal(jax.random.key(2), (1, M, D), dtype)
    behind = jnp.zeros(1, jnp.int32)

    def drafts(table: Any, panels: Any, sampler: Any, latents: Any, behind: Any, shortlist: int | None) -> Any:
        def head(x: Any) -> Any:
            if in_cpp:
                return times(x, panels)
            return jnp.einsum("...d,vd->...v", x, table.astype(dtype), preferred_element_type=jnp.float32)

        scores = None if shortlist is None else head(latents)
        chosen = choose_drafts(
            table, head, table, sampler, "residual", latents, scores, behind, shortlist, None, in_cpp
        )
        return chosen[0]

    run = jax.jit(drafts, static_argnums=5)
    console = Console(width=110)
    how = f"{dtype}, bfloat16 weights{', in C++' if in_cpp else ''}"
    console.print(f"{jax.devices()[0].device_kind}, V={V}, D={D}, M={M}, {how}: drafts of one block, batch 1")
    for shortlist in (256, None):
        seconds = []
        for _ in range(8):
            begin = time.perf_counter()
            jax.block_until_ready(run(table, panels, sampler, latents, behind, shortlist))
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
