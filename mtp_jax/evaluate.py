"""`python -m mtp_jax.evaluate --model DIR|bundled:NAME`: held-out loss and next-token accuracy of a base model."""

import argparse
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from mtp_jax.errors import UserError, run_command

if TYPE_CHECKING:
    from mtp_jax.data.documents import Document

# What a model folder may hold: names and sha256 digests of the documents it was trained on.
TRAINING_FILES = "training_files.json"


def main() -> None:
    """Parse, evaluate, print."""
    parser = argparse.ArgumentParser(prog="python -m mtp_jax.evaluate", description=__doc__)
    parser.add_argument("--model", required=True, help="a Hugging Face folder, a hub name, or bundled:NAME")
    parser.add_argument("--adapter", help="what this adapter foresees: a run's folder, an adapter folder, bundled:NAME")
    parser.add_argument(
        "--text", metavar="PATH", help="a text file, folder or glob, used whole; instead of python-stdlib"
    )
    parser.add_argument("--separator", help="parts the files of --text into documents")
    parser.add_argument("--held-out", type=float, metavar="SHARE", help="share held out by name (python-stdlib: 0.05)")
    parser.add_argument("--sequence-length", type=int, metavar="T", help="the model's context, at most 512, by default")
    parser.add_argument("--batch-size", type=int, default=4, metavar="B")
    parser.add_argument("--batches", type=int, metavar="N", help="no more than so many")
    parser.add_argument(
        "--prompts", type=int, default=16, metavar="N", help="with --adapter: to estimate tokens per step on"
    )
    parser.add_argument("--plot", metavar="FILE.png", help="with --adapter: draw the figures")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    _check(arguments)

    import jax
    import jax.numpy as jnp

    from mtp_jax.config import Source
    from mtp_jax.data.held_out import held_out_batches
    from mtp_jax.data.sources import source_documents, split
    from mtp_jax.model.decoder import Decoder
    from mtp_jax.model.folder import find_folder, load_params, load_tokenizer, read_geometry, read_json
    from mtp_jax.training.evaluation import make_evaluate
    from mtp_jax.training.next_token import NextToken

    folder = find_folder(arguments.model)
    g = read_geometry(folder)
    length = arguments.sequence_length or min(g.max_positions, 512)
    if not 2 <= length <= g.max_positions:
        raise UserError(f"--sequence-length {length}: should be from 2 to the model's context of {g.max_positions}.")
    if arguments.text is None:
        found = source_documents(Source(kind="python-stdlib"))
    else:
        found = source_documents(Source(kind="text", path=arguments.text, separator=arguments.separator), "--text")
    share = arguments.held_out if arguments.held_out is not None else (0.05 if arguments.text is None else 1.0)
    _, held = split(found, share)
    trained = set(read_json(folder / TRAINING_FILES).values()) if (folder / TRAINING_FILES).is_file() else set()
    fresh = [d for d in held if hashlib.sha256(d.text().encode()).hexdigest() not in trained]
    if not fresh:
        raise UserError(f"no held-out document to evaluate on ({len(held)} held out).")

    if arguments.adapter is not None:
        _report(arguments, fresh, length)
        return
    dtype = jnp.dtype(arguments.dtype)
    objective = NextToken(Decoder(g, dtype), loss_chunk=2048)
    batches = held_out_batches(fresh, load_tokenizer(folder, g), arguments.batch_size, length, arguments.batches)
    params = load_params(folder, g, dtype)
    with jax.default_matmul_precision("highest" if dtype == jnp.float32 else None):
        figures = make_evaluate(objective, jax.device_put)(params, batches)
    figures = {"documents": len(fresh), "left_out": len(held) - len(fresh), **figures}
    if arguments.json:
        print(json.dumps(figures))
        return
    print(
        f"{figures['documents']} held-out documents "
        f"({figures['left_out']} more left out: the model was trained on them)"
    )
    print(f"held-out loss {figures['loss']:.4f} nats per token, next-token accuracy {figures['accuracy']:.4f}")
    print(f"over {figures['tokens']} tokens in sequences of {length}")


def _report(a: argparse.Namespace, documents: list["Document"], length: int) -> None:
    from rich.console import Console

    from mtp_jax.training.report import adapter_figures, plot, print_table

    figures = adapter_figures(a.model, a.adapter, documents, length, a.batch_size, a.batches, a.prompts, a.dtype)
    if a.plot:
        plot(figures, Path(a.plot))
    if a.json:
        print(json.dumps(figures))
        return
    print(f"{len(documents)} held-out documents")
    print_table(figures, Console())
    if a.plot:
        print(f"plot: {a.plot}")


def _check(a: argparse.Namespace) -> None:
    faults = [
        f"--{name} {value}: should be at least 1." for name, value in _counts(a) if value is not None and value < 1
    ]
    if a.separator == "":
        faults.append("--separator is empty; leave it out where a file is one document.")
    if a.plot is not None and a.adapter is None:
        faults.append("--plot draws what an adapter foresees: give --adapter too.")
    if a.held_out is not None and not 0 < a.held_out <= 1:
        faults.append(f"--held-out {a.held_out}: should be above 0 and at most 1.")
    if faults:
        raise UserError(*faults)


def _counts(a: argparse.Namespace) -> list[tuple[str, int | None]]:
    return [("batch-size", a.batch_size), ("batches", a.batches), ("prompts", a.prompts)]


if __name__ == "__main__":
    run_command(main)
