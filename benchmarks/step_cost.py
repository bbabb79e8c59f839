"""Time of a decoding step against its number of rows, with random weights of any geometry.

    python benchmarks/step_cost.py --config CONFIG.json
    python benchmarks/step_cost.py --config CONFIG.json --dtype bfloat16 --rank 128 --context 1024

CONFIG.json is a model's `config.json`. The weights are bfloat16 numbers, as in most checkpoints. Each time is compared
with the memory-bandwidth bound: the bytes that a step must read (weights, adapter and cache) at the bandwidth that a
large sum reaches on this machine.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from mtp_jax.cpu import fastest_forward
from mtp_jax.decoding.generator import Generator
from mtp_jax.decoding.loop import Limits
from mtp_jax.decoding.options import Options
from mtp_jax.decoding.plan import BlockPlan, parse_plan
from mtp_jax.errors import run_command
from mtp_jax.model.decoder import Decoder
from mtp_jax.model.geometry import Geometry
from mtp_jax.model.weights import PROJECTIONS, init_params, unstack_layers
from mtp_jax.mtp.adapter import AdapterShape, init_adapter


def bandwidth() -> float:
    """Bytes per second that a large sum reads."""
    x = jnp.ones(1 << 28 if jax.default_backend() != "cpu" else 1 << 26, jnp.float32)
    total = jax.jit(jnp.sum)
    total(x).block_until_ready()
    times = []
    for _ in range(7):
        begin = time.perf_counter()
        total(x).block_until_ready()
        times.append(time.perf_counter() - begin)
    return x.nbytes / min(times)


def make(g: Geometry, masks: int, rank: int, dtype: Any, options: Options) -> Generator:
    """A generator of random weights whose adapter has as many masks."""
    params = jax.jit(lambda key: init_params(g, key, jnp.bfloat16))(jax.random.key(0))
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    shape = AdapterShape(masks, rank, 2.0 * rank, PROJECTIONS, "residual")
    adapter = init_adapter(g, shape, params["embed"]["embedding"][:256].astype(jnp.float32), jax.random.key(1))
    adapter = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), adapter)
    forward = fastest_forward(Decoder(g, dtype, scanned=False), shape)
    return Generator(forward, forward.prepare(unstack_layers(params), adapter), None, (), options)


def step_seconds(generator: Generator, plan: BlockPlan, context: int, batch: int, steps: int, repeats: int) -> float:
    """Median seconds of one step behind `context` tokens."""
    generator = generator.using(plan=plan)
    slots = context + steps * (plan.drafts + 1) * (repeats + 2)
    ids = np.random.default_rng(0).integers(1, generator.g.V, (batch, context)).astype(np.int32)
    limits = Limits(jnp.full(batch, slots, jnp.int32), jnp.zeros(0, jnp.int32))
    lengths = np.full(batch, context, np.int32)
    keys = jax.vmap(jax.random.key)(jnp.arange(batch))
    programs = generator.compile(ids, lengths, limits, slots, None, keys)
    state = programs.prefill(generator.variables, ids, lengths, limits, None, keys)
    times = []
    for _ in range(repeats + 1):
        jax.block_until_ready(state.length)
        begin = time.perf_counter()
        state = programs.advance(generator.variables, state, limits, jnp.int32(steps), None)
        jax.block_until_ready(state.length)
        times.append((time.perf_counter() - begin) / steps)
    return statistics.median(times[1:])


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a config.json; weights are random")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=16, help="steps of one timing")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shortlist", type=int, default=256, metavar="C", help="0 for the whole vocabulary")
    parser.add_argument("--one-head", action="store_true", help="base head over all rows in one product")
    parser.add_argument("--plans", nargs="+", default=["none", "linear:1", "quadratic:1", "quadratic:2", "quadratic:4"])
    a = parser.parse_args()
    g = Geometry.from_config(json.loads(a.config.read_text()))
    plans = [parse_plan(name) for name in a.plans]
    options = Options(shortlist=a.shortlist or None, one_head=a.one_head)
    generator = make(g, max(1, *(plan.block for plan in plans)), a.rank, jnp.dtype(a.dtype), options)
    sizes = [(str(path), leaf.nbytes) for path, leaf in jax.tree.leaves_with_path(generator.variables)]
    adapter = sum(s for path, s in sizes if any(part in path for part in ("'mtp'", "loras", "['a']", "['b']")))
    tables = [size for path, size in sizes if any(part in path for part in ("embed'", "'head'"))]
    read = sum(size for _, size in sizes) - adapter - sum(tables) + tables[0]  # one whole table, that of the head
    cache = 2 * g.L * a.batch_size * g.K * g.H * a.context * jnp.dtype(a.dtype).itemsize
    rate = bandwidth()
    table = Table("plan", "rows", "ms per step", "against plain", "bound, ms", "of the bound")
    plain = None
    for plan in plans:
        seconds = step_seconds(generator, plan, a.context, a.batch_size, a.steps, a.repeats)
        plain = plain or seconds
        bound = (read + cache + (adapter if plan.mask_rows else 0)) / rate
        table.add_row(
            str(plan),
            str(plan.rows),
            f"{1e3 * seconds:.3f}",
            f"{seconds / plain:.2f}x",
            f"{1e3 * bound:.3f}",
            f"{bound / seconds:.0%}",
        )
    console = Console(width=100)
    console.print(f"{jax.devices()[0].device_kind}: reads {rate / 1e9:.0f} GB/s; batch {a.batch_size}, {a.dtype}")
    console.print(table)


if __name__ == "__main__":
    run_command(main)
