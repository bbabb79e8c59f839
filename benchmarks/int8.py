"""Plain decoding of a model as it is stored and as int8: tokens per second, decoders in turns, and bytes of weights.

    python benchmarks/int8.py --model runs/SmolLM2-135M-Instruct

A step reads every weight once but for the table of embeddings, of which it takes rows; where that is the base head too,
it is read as the head. An int8 model has a head of its own.
"""

import argparse
import statistics
import time
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

import mtp_jax
from mtp_jax.errors import run_command

PROMPT = "Explain in one paragraph why the sky is blue, and why it is red in the evening."
WEIGHTS = ("stored", "int8")


def bytes_read(variables: Any) -> int:
    """Of the weights that a step reads whole, as the decoder's forward pass holds them."""
    if "head" in variables:  # the engine for CPUs: rows are read of both tables, the head is panels
        read = {name: value for name, value in variables.items() if name not in ("embed", "unembed")}
    else:
        params = variables["params"]
        read = {
            **variables,
            "params": {name: x for name, x in params.items() if name != "embed" or "unembed" not in params},
        }
    return sum(leaf.nbytes for leaf in jax.tree.leaves(read))


def main() -> None:
    """Decode in turns, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--new-tokens", type=int, default=96, metavar="N")
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    a = parser.parse_args()
    generators = {weights: mtp_jax.load(a.model, dtype=a.dtype, weights=weights) for weights in WEIGHTS}
    speeds: dict[str, list[float]] = {weights: [] for weights in WEIGHTS}
    for number in range(a.rounds + 1):
        for weights, generator in generators.items():
            generator.stops = ()
            prompts = [generator.tokenizer(PROMPT)["input_ids"]]
            begun = time.perf_counter()
            generator.complete(prompts, a.new_tokens, 1)
            if number:  # the first round compiles
                speeds[weights].append(a.new_tokens / (time.perf_counter() - begun))
    read = {weights: bytes_read(generator.variables) for weights, generator in generators.items()}
    ratios = [new / old for new, old in zip(speeds["int8"], speeds["stored"], strict=True)]
    table = Table("weights", "a step reads", "tokens/s (lowest, highest)")
    for weights, found in speeds.items():
        spread = f"{statistics.median(found):.1f} ({min(found):.1f}, {max(found):.1f})"
        table.add_row(weights, f"{read[weights] / 1e6:.1f} MB", spread)
    Console().print(table)
    print(
        f"int8 reads {read['int8'] / read['stored']:.2f}x of the bytes and decodes at {statistics.median(ratios):.2f}x,"
    )
    print(f"by round {', '.join(f'{ratio:.2f}' for ratio in ratios)}; by {type(generators['int8'].forward).__name__}")


if __name__ == "__main__":
    run_command(main)
