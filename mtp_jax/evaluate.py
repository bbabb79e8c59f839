"""`python -m mtp_jax.evaluate --model DIR|bundled:NAME [--adapter DIR]`: held-out figures of a model or an adapter.

Of a base model loss and next-token accuracy; of an adapter its losses, how often its drafts agree with the base model,
and estimated tokens per step.
"""

import argparse
import json
from pathlib import Path

from mtp_jax.errors import UserError, run_command


def main() -> None:
    """Parse, evaluate, print."""
    parser = argparse.ArgumentParser(
        prog="python -m mtp_jax.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a Hugging Face folder, a hub name, or bundled:NAME")
    parser.add_argument("--adapter", help="evaluate this adapter: a run's folder, an adapter folder, bundled:NAME")
    parser.add_argument(
        "--text", metavar="PATH", help="a text file, folder or glob, used whole; instead of python-stdlib"
    )
    parser.add_argument("--separator", help="splits the files of --text into documents")
    parser.add_argument("--held-out", type=float, metavar="SHARE", help="share held out by name (python-stdlib: 0.05)")
    parser.add_argument("--sequence-length", type=int, metavar="T", help="the model's context, at most 512, by default")
    parser.add_argument("--batch-size", type=int, default=4, metavar="B")
    parser.add_argument("--batches", type=int, metavar="N", help="at most N; all by default")
    parser.add_argument(
        "--prompts", type=int, default=16, metavar="N", help="with --adapter: to estimate tokens per step on"
    )
    parser.add_argument("--plot", metavar="FILE.png", help="with --adapter: draw the figures")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    a = parser.parse_args()
    _check(a)

    import jax.numpy as jnp
    from rich.console import Console

    from mtp_jax.model.base import open_base
    from mtp_jax.mtp.adapter_folder import open_adapter
    from mtp_jax.training import report

    base, dtype = open_base(a.model), jnp.dtype(a.dtype)
    adapter = None if a.adapter is None else open_adapter(a.adapter, base)
    of = report.Sequences(report.sequence_length(base, adapter, a.sequence_length), a.batch_size, a.batches)
    held = report.find_held_out(base, a.text, a.separator, a.held_out)
    if adapter is None:
        figures = report.base_figures(base, held, of, dtype)
    else:
        figures = report.adapter_figures(base, adapter, held, of, a.prompts, dtype)
    if a.plot:
        report.plot(figures, Path(a.plot))
    if a.json:
        print(json.dumps(figures))
    elif adapter is None:
        report.print_base(figures, of.length)
    else:
        print(f"{len(held.documents)} held-out documents")
        report.print_table(figures, Console())
        if a.plot:
            print(f"plot: {a.plot}")


def _check(a: argparse.Namespace) -> None:
    """Raise UserError for arguments that cannot be."""
    counts = {"batch-size": a.batch_size, "batches": a.batches, "prompts": a.prompts}
    faults = [
        f"--{name} {value}: should be at least 1." for name, value in counts.items() if value is not None and value < 1
    ]
    if a.separator == "":
        faults.append("--separator is empty; leave it out where a file is one document.")
    if a.plot is not None and a.adapter is None:
        faults.append("--plot draws the figures of an adapter: give --adapter too.")
    if a.held_out is not None and not 0 < a.held_out <= 1:
        faults.append(f"--held-out {a.held_out}: should be above 0 and at most 1.")
    if faults:
        raise UserError(*faults)


if __name__ == "__main__":
    run_command(main)
