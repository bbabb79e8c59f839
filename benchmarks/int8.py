"""A model as it is stored, as int8, and with int8 activations where the processor has the products.

Tokens per second of plain decoding, in turns, bytes of weights, and the loss of the next token on a text.

    python benchmarks/int8.py --model runs/SmolLM2-135M-Instruct --text FILE

A step reads every weight once but for the table of embeddings, of which it takes rows; where that is the base head too,
it is read as the head. An int8 model has a head of its own.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

import mtp_jax
from mtp_jax.errors import UserError, run_command
from mtp_jax.model.attention import empty_cache

PROMPT = "Explain in one paragraph why the sky is blue, and why it is red in the evening."
FORMS = {"stored": {}, "int8": {"weights": "int8"}, "int8, activations too": {"weights": "int8", "activations": "int8"}}


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


def loss(generator: mtp_jax.Generator, text: str, length: int = 512, most: int = 8) -> float:
    """Of the next token, in nats, over the first `most` pieces of `length` tokens."""
    forward, ids = generator.forward, generator.tokenizer(text)["input_ids"]
    pieces = [ids[at : at + length] for at in range(0, min(len(ids) // length, most) * length, length)]
    if not pieces:
        raise UserError(f"--text: has {len(ids)} tokens; {length} are needed.")

    @jax.jit
    def of(variables: Any, tokens: jax.Array) -> jax.Array:
        cache = empty_cache(generator.g, 1, length, generator.dtype, stacked=False)
        latents, _, _ = forward.rows(variables, tokens, jnp.zeros(1, jnp.int32), cache, first=True)
        logits = forward.logits(variables, latents[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return statistics.mean(float(of(generator.variables, jnp.asarray([piece]))) for piece in pieces)


def main() -> None:
    """Decode in turns, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--text", default="README.md", metavar="FILE", help="for the loss (README.md)")
    parser.add_argument("--new-tokens", type=int, default=96, metavar="N")
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    a = parser.parse_args()
    generators = {}
    for form, options in FORMS.items():
        try:
            generators[form] = mtp_jax.load(a.model, dtype=a.dtype, **options)
        except UserError as error:
            print(f"{form}: not here. {error}")
    speeds: dict[str, list[float]] = {form: [] for form in generators}
    for number in range(a.rounds + 1):
        for form, generator in generators.items():
            generator.stops = ()
            prompts = [generator.tokenizer(PROMPT)["input_ids"]]
            begun = time.perf_counter()
            generator.complete(prompts, a.new_tokens, 1)
            if number:  # the first round compiles
                speeds[form].append(a.new_tokens / (time.perf_counter() - begun))
    try:
        text = Path(a.text).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {a.text}: cannot be read as text ({error}).") from error
    table = Table("weights", "a step reads", "tokens/s (lowest, highest)", "against stored (by round)", "loss")
    for form, found in speeds.items():
        spread = f"{statistics.median(found):.1f} ({min(found):.1f}, {max(found):.1f})"
        ratios = [new / old for new, old in zip(found, speeds["stored"], strict=True)]
        against = f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
        size = f"{bytes_read(generators[form].variables) / 1e6:.1f} MB"
        table.add_row(form, size, spread, against, f"{loss(generators[form], text):.4f}")
    Console().print(table)
    print(f"by {type(generators['int8'].forward).__name__}")


if __name__ == "__main__":
    run_command(main)
