"""Speed of decoding: plain, linear and quadratic plans, the automatic choice, and transformers, in one run.

    python benchmarks/decode.py --model MODEL --adapter ADAPTER --prompts math.jsonl code.jsonl --count 8
    ... --batch-size 8                                  the same in batches
    ... --float32-weights                               with weights of four bytes, as a float32 checkpoint has them
    ... --transformers                                  also its greedy and prompt-lookup decoding, batch 1 (torch)

All decodings take the same prompts and the same weights, and take turns: each runs once per round. The table shows
medians over rounds, also of the ratios within a round. Seconds are those of decoding steps; prefill is separate.
Output is compared with that of plain decoding.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mtp_jax.api import load
from mtp_jax.cpu import forward, native
from mtp_jax.data.prompts import read_prompts
from mtp_jax.decoding.auto import choose_plan
from mtp_jax.decoding.generator import Completion, Generator, tokens_per_step
from mtp_jax.decoding.plan import BlockPlan, parse_plan
from mtp_jax.errors import run_command
from mtp_jax.locate import find_folder


class Ours:
    """Decoding with a plan."""

    def __init__(
        self, generator: Generator, plan: BlockPlan, name: str, new: int, batch: int, one_head: bool | None = None
    ):
        self.generator = generator.using(plan=plan, one_head=batch == 1 if one_head is None else one_head)
        self.name, self.new, self.batch = name, new, batch

    def __call__(self, prompts: list[list[int]]) -> list[Completion]:
        return self.generator.complete(prompts, self.new, self.batch)


class Transformers:
    """Decoding by transformers, one prompt at a time."""

    def __init__(self, folder: Path, name: str, new: int, stops: tuple[int, ...], context: int, **options: Any):
        import torch
        from transformers import AutoModelForCausalLM

        self.torch, self.name, self.new, self.stops, self.context = torch, name, new, list(stops), context
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.options = options

    def __call__(self, prompts: list[list[int]]) -> list[Completion]:
        done = []
        for ids in prompts:
            begin = time.perf_counter()
            with self.torch.no_grad():
                out = self.model.generate(
                    self.torch.tensor([ids]),
                    attention_mask=self.torch.ones(1, len(ids), dtype=self.torch.long),
                    max_new_tokens=min(self.new, self.context - len(ids)),
                    do_sample=False,
                    eos_token_id=self.stops,
                    pad_token_id=0,
                    **self.options,
                )
            seconds = time.perf_counter() - begin
            tokens = out[0, len(ids) :].tolist()
            done.append(Completion(tokens, [], 0, [], 0.0, seconds))
        return done


def speed(done: list[Completion], batch: int) -> tuple[float, float]:
    """Tokens per second of decoding steps, and seconds of prefill."""
    batches = done[::batch]
    return sum(len(c.token_ids) for c in done) / sum(c.seconds for c in batches), sum(
        c.prefill_seconds for c in batches
    )


def _ratio(own: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(own, other, strict=True))


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--prompts", required=True, nargs="+", metavar="FILE.jsonl", help="one file per domain")
    parser.add_argument("--count", type=int, default=8, help="prompts of each file")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--plans", nargs="+", help="by default none, linear and quadratic for every number of masks")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--float32-weights", action="store_true", help="also where two bytes would hold them (CPU)")
    parser.add_argument("--transformers", action="store_true")
    parser.add_argument("--no-auto", action="store_true")
    a = parser.parse_args()
    if a.float32_weights:
        native.narrow = forward.narrow = lambda x: x
    generator = load(a.model, adapter=a.adapter)
    assert generator.shape is not None
    console, size = Console(width=130), a.batch_size
    domains = {
        Path(file).stem: [generator.encode(p, file) for p in read_prompts(file)[: a.count]] for file in a.prompts
    }
    masks = range(1, generator.shape.masks + 1)
    names = a.plans or ["none", *(f"linear:{m}" for m in masks), *(f"quadratic:{m}" for m in masks)]
    rows: list[Any] = [Ours(generator, parse_plan(name), name, a.new_tokens, size) for name in names]
    if not a.no_auto:
        calibration = [ids for turn in zip(*domains.values(), strict=False) for ids in turn]
        choice = choose_plan(generator, calibration, size, cache=None)
        print(choice, file=sys.stderr)
        rows.append(Ours(generator, choice.plan, f"auto = {choice.plan}", a.new_tokens, size, choice.one_head))
    if a.transformers:
        folder, context = find_folder(a.model), generator.g.max_positions
        rows.append(Transformers(folder, "transformers", a.new_tokens, generator.stops, context))
        lookup = {"prompt_lookup_num_tokens": 10}
        rows.append(Transformers(folder, "transformers, lookup", a.new_tokens, generator.stops, context, **lookup))

    console.print(
        f"{a.model}, {jax.devices()[0].device_kind}, {generator.dtype}, batch {size}, {a.count} prompts a domain"
    )
    for domain, prompts in domains.items():
        for row in rows:
            row(prompts[: max(size, 2)])  # compiles
        found: dict[str, list[list[Completion]]] = {row.name: [] for row in rows}
        for _ in track(range(a.rounds), domain, console=Console(stderr=True), transient=True):
            for row in rows:
                found[row.name].append(row(prompts))
        batch = {row.name: 1 if isinstance(row, Transformers) else size for row in rows}
        speeds = {n: [speed(done, batch[n])[0] for done in runs] for n, runs in found.items()}
        plain = [c.token_ids for c in found[names[0]][0]]
        columns = (
            "tokens per step",
            "tokens/s",
            f"against {names[0]}",
            "against transformers",
            "prefill, s",
            "identical",
        )
        table = Table("decoding", *columns, title=domain)
        for row in rows:
            done = found[row.name][0]
            steps = any(c.steps for c in done)
            own, theirs = speeds[row.name], speeds.get("transformers")
            table.add_row(
                row.name,
                f"{tokens_per_step(done):.2f}" if steps else "",
                f"{statistics.median(own):.0f}",
                f"{_ratio(own, speeds[names[0]]):.2f}x",
                f"{_ratio(own, theirs):.2f}x" if theirs else "",
                f"{speed(done, batch[row.name])[1]:.2f}" if steps else "",
                f"{sum(c.token_ids == p for c, p in zip(done, plain, strict=True))} of {len(done)}",
            )
        console.print(table)


if __name__ == "__main__":
    run_command(main)
