"""What training an adapter does to the base model: next-token loss and greedy answers before and after.

    python benchmarks/gate.py --model MODEL --adapters runs/gated runs/ungated --suites math.jsonl code.jsonl

Loss is of real rows beside the adapter, on the held-out text of `mtp_jax.evaluate`, in nats per token: once with the
adapter as it began, without effect, and once as it was trained. With the gate both must be the same to the last bit.
Standard LoRA (`lora.gated: false`) moves real rows; its greedy answers are those of the base with the matrices merged.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from mtp_jax import sharding
from mtp_jax.api import generator as generator_of
from mtp_jax.config import Mesh
from mtp_jax.data.held_out import held_out_batches
from mtp_jax.decoding.forward import XlaForward
from mtp_jax.decoding.generator import Generator
from mtp_jax.decoding.options import Options
from mtp_jax.errors import run_command
from mtp_jax.evaluating.suites import find_suites
from mtp_jax.model.base import Base, open_base
from mtp_jax.model.decoder import Decoder
from mtp_jax.model.weights import Params, unstack_layers
from mtp_jax.mtp.adapter_folder import Adapter, open_adapter
from mtp_jax.mtp.blocks import Anchors
from mtp_jax.mtp.losses import LossTerms, MultiTokenLoss
from mtp_jax.training import report

FLOAT32 = jnp.dtype("float32")


def losses(base: Base, adapter: Adapter, batches: list[Any]) -> tuple[float, float]:
    """Next-token loss of real rows with the adapter without effect, and as it is."""
    objective = MultiTokenLoss(Decoder(base.g), adapter.shape, LossTerms(), 2048)
    run = jax.jit(lambda adapter, params, batch: objective.real(adapter, {"params": params}, batch)[1]["real"])
    params = base.load(FLOAT32)
    idle = jax.tree.map(jnp.zeros_like, adapter.arrays)
    tokens = sum(int(batch["supervised"].sum()) for batch in batches)
    with jax.default_matmul_precision("highest"):
        before, after = (sum(float(run(of, params, batch)) for batch in batches) for of in (idle, adapter.arrays))
    return before / tokens, after / tokens


def merged(params: Params, adapter: Adapter) -> Params:
    """The base's weights with W + (alpha/R) A B for every target."""
    shape, pairs = adapter.shape, adapter.arrays["lora"]["layers"]
    layers = dict(params["layers"])
    for name in shape.targets:
        change = jnp.einsum("lir,lro->lio", pairs[name]["a"], pairs[name]["b"]) * (shape.alpha / shape.rank)
        layers[name] = layers[name] | {"kernel": layers[name]["kernel"] + change}
    return params | {"layers": layers}


def answers(base: Base, params: Params, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Greedy answers of plain decoding with these weights."""
    forward = XlaForward(Decoder(base.g, FLOAT32, scanned=False))
    variables = forward.prepare(unstack_layers(params), None)
    generator = Generator(forward, variables, base.tokenizer, base.stops, Options())
    return [completion.token_ids for completion in generator.complete(prompts, new, 8)]


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapters", nargs="+", required=True)
    parser.add_argument("--suites", nargs="+", required=True, help="as --suite of mtp_jax.evaluate")
    parser.add_argument("--text", help="held-out text, instead of python-stdlib")
    parser.add_argument("--count", type=int, default=16, help="questions of each suite")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--batches", type=int, default=8)
    a = parser.parse_args()
    base = open_base(a.model)
    of = report.Sequences(report.sequence_length(base, None, 256), 4, a.batches)
    held = report.find_held_out(base, a.text, None, None)
    asked = find_suites(a.suites, a.count)
    table = Table("adapter", "gate", "loss before", "loss after", "change", "greedy answers that stay the same")
    with sharding.on(sharding.make_mesh(Mesh())):
        batches = list(
            held_out_batches(held.documents, base.tokenizer, of.batch_size, of.length, of.batches, Anchors(8, seed=0))
        )
        encode = generator_of(base, Options(), FLOAT32).encode
        prompts = [encode(question.prompt) for suite in asked for question in suite.questions]
        plain = answers(base, base.load(FLOAT32), prompts, a.new_tokens)
        for name in a.adapters:
            adapter = open_adapter(name, base)
            before, after = losses(base, adapter, batches)
            params = base.load(FLOAT32)
            now = answers(base, params if adapter.shape.gated else merged(params, adapter), prompts, a.new_tokens)
            same = sum(x == y for x, y in zip(now, plain, strict=True))
            gate = "yes" if adapter.shape.gated else "no"
            table.add_row(
                name, gate, f"{before:.6f}", f"{after:.6f}", f"{after - before:+.6f}", f"{same} of {len(now)}"
            )
    Console(width=130).print(table)


if __name__ == "__main__":
    run_command(main)
