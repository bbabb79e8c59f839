"""`python -m mtp_jax.evaluate --model M [--adapter A] [--suite S ... --out DIR]`: how good it is.

With --suite it decodes benchmark prompts with several plans and other ways to draft, compares tokens per step, speed,
identical output and scores, and writes a report to --out. Without, it gives figures on held-out text: of a base model
loss and next-token accuracy, of an adapter its losses, how often its drafts agree with the base model, and estimated
tokens per step.
"""

import argparse
import json
from pathlib import Path

from mtp_jax.errors import UserError, run_command

_PLANS = "none,quadratic:1,quadratic:2,quadratic:4,auto"


def main() -> None:
    """Parse, evaluate, print."""
    parser = argparse.ArgumentParser(
        prog="python -m mtp_jax.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a Hugging Face folder, a hub name, or bundled:NAME")
    parser.add_argument("--adapter", help="evaluate this adapter: a run's folder, an adapter folder, bundled:NAME")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--weights", choices=["stored", "int8"], default="stored", help="int8: the quantised base")
    parser.add_argument(
        "--activations", choices=["float", "int8"], default="float", help="int8: of an int8 base, on a CPU"
    )

    suites = parser.add_argument_group("on suites")
    suites.add_argument(
        "--suite", nargs="+", metavar="S", help="gsm8k, humaneval, mt_bench, ... from the hub, NAME=FILE, or a FILE"
    )
    suites.add_argument("--out", metavar="DIR", help="a new folder for the report")
    suites.add_argument(
        "--plans",
        metavar="P,...",
        help="none, linear:M, quadratic:1..8, blocks:..., auto, lookup:K, quadratic:M+lookup:K, jacobi:K, draft:K, "
        f"transformers, transformers lookup ({_PLANS}; of a model without adapter none)",
    )
    suites.add_argument("--draft-model", metavar="M", help="a smaller model with the same tokenizer, for draft:K")
    suites.add_argument("--count", type=int, default=40, metavar="N", help="questions of each suite (40); 0 for all")
    suites.add_argument("--new-tokens", type=int, default=256, metavar="N", help="of an answer, at most (256)")
    suites.add_argument("--batch-sizes", default="1", metavar="B,...", help="prompts decoded together (1)")
    suites.add_argument("--rounds", type=int, default=3, metavar="N", help="times that all decoders take turns (3)")
    suites.add_argument("--seed", type=int, default=0, help="which questions are drawn")
    suites.add_argument("--shortlist", type=int, default=256, metavar="C", help="candidates of a draft; 0 for all")
    suites.add_argument("--estimate", action="store_true", help="also tokens per step as training estimates them")
    suites.add_argument(
        "--run-code", action="store_true", help="score HumanEval and MBPP by running the programs that the model writes"
    )

    text = parser.add_argument_group("on held-out text")
    text.add_argument(
        "--text", metavar="PATH", help="a text file, folder or glob, used whole; instead of python-stdlib"
    )
    text.add_argument("--separator", help="splits the files of --text into documents")
    text.add_argument("--held-out", type=float, metavar="SHARE", help="share held out by name (python-stdlib: 0.05)")
    text.add_argument("--sequence-length", type=int, metavar="T", help="the model's context, at most 512, by default")
    text.add_argument("--batch-size", type=int, default=4, metavar="B")
    text.add_argument("--batches", type=int, metavar="N", help="at most N; all by default")
    text.add_argument(
        "--prompts", type=int, default=16, metavar="N", help="with --adapter: to estimate tokens per step on"
    )
    text.add_argument("--plot", metavar="FILE.png", help="with --adapter: draw the figures")
    text.add_argument("--json", action="store_true", help="print one JSON object")
    a = parser.parse_args()
    if a.suite is not None:
        _on_suites(a)
    else:
        _on_text(a)


def _on_suites(a: argparse.Namespace) -> None:
    sizes = [int(size) if size.strip().isdigit() else 0 for size in a.batch_sizes.split(",")]
    counts = {"new-tokens": a.new_tokens, "rounds": a.rounds}
    faults = [f"--{name} {value}: should be at least 1." for name, value in counts.items() if value < 1]
    faults += [f"--{name} {value}: should be at least 0." for name, value in (("count", a.count),) if value < 0]
    if a.shortlist < 0:
        faults.append(f"--shortlist {a.shortlist}: should be at least 1, or 0 for the whole vocabulary.")
    if not all(sizes):
        faults.append(f"--batch-sizes {a.batch_sizes}: should be numbers from 1 on, as in 1,8.")
    if a.out is None:
        faults.append("--suite writes a report: give --out too, a new folder.")
    if faults:
        raise UserError(*faults)

    from rich.console import Console
    from rich.markdown import Markdown

    from mtp_jax.evaluating.markdown import markdown
    from mtp_jax.evaluating.run import Wanted, evaluate

    results = evaluate(
        Wanted(
            model=a.model,
            adapter=a.adapter,
            draft_model=a.draft_model,
            suites=a.suite,
            plans=a.plans or (_PLANS if a.adapter else "none"),
            out=a.out,
            count=a.count or None,
            new_tokens=a.new_tokens,
            batch_sizes=sizes,
            rounds=a.rounds,
            seed=a.seed,
            dtype=a.dtype,
            weights=a.weights,
            activations=a.activations,
            shortlist=a.shortlist or None,
            run_code=a.run_code,
            estimate=a.estimate,
        )
    )
    Console().print(Markdown(markdown(results, [])))
    print(f"report: {Path(a.out) / 'report.html'}")


def _on_text(a: argparse.Namespace) -> None:
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
    if a.out is not None or a.plans is not None or a.draft_model is not None:
        faults.append("--out, --plans and --draft-model belong to an evaluation on suites: give --suite too.")
    if faults:
        raise UserError(*faults)

    import jax.numpy as jnp
    from rich.console import Console

    from mtp_jax.model.base import open_base
    from mtp_jax.mtp.adapter_folder import open_adapter
    from mtp_jax.training import report

    base, dtype = open_base(a.model, weights=a.weights), jnp.dtype(a.dtype)
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


if __name__ == "__main__":
    run_command(main)
