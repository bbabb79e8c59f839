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
from pathlib import Path

import jax
import jax.numpy as jnp
from random_model import Behind, Bytes, bandwidth, random_generator
from rich.console import Console
from rich.table import Table

from mtp_jax.decoding.generator import Generator
from mtp_jax.decoding.loop import Decoding
from mtp_jax.decoding.options import Options
from mtp_jax.decoding.plan import BlockPlan, parse_plan
from mtp_jax.errors import run_command
from mtp_jax.model.geometry import Geometry
from mtp_jax.runs.profile import traced


def step_seconds(generator: Generator, plan: BlockPlan, a: argparse.Namespace) -> float:
    """Median seconds of one step behind the context."""
    steps, repeats = a.steps, a.repeats
    decoding = Decoding(generator.forward, generator.options.using(plan=plan))
    behind = Behind(generator, decoding, a.batch_size, a.context, steps * (plan.drafts + 1) * (repeats + 3))
    state, times = behind.fresh(), []
    for _ in range(repeats + 1):
        seconds, state = behind.run(state, steps)
        times.append(seconds / steps)
    if a.profile:
        with traced(a.profile / str(plan).replace(":", "_")):
            behind.run(state, steps)
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
    parser.add_argument("--profile", type=Path, metavar="DIR", help="a trace of each plan's steps, for Perfetto")
    parser.add_argument("--plans", nargs="+", default=["none", "linear:1", "quadratic:1", "quadratic:2", "quadratic:4"])
    a = parser.parse_args()
    g = Geometry.from_config(json.loads(a.config.read_text()))
    plans = [parse_plan(name) for name in a.plans]
    options = Options(shortlist=a.shortlist or None, one_head=a.one_head)
    generator = random_generator(g, max(1, *(plan.block for plan in plans)), a.rank, jnp.dtype(a.dtype), options)
    read = Bytes(generator)
    rate = bandwidth()
    table = Table("plan", "rows", "ms per step", "against plain", "bound, ms", "of the bound")
    plain = None
    for plan in plans:
        seconds = step_seconds(generator, plan, a)
        plain = plain or seconds
        bound = read.of_step(plan.mask_rows, a.batch_size, a.context) / rate
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
