"""Recipes at equal budgets: train each variant of a study, decode held-out prompts with it, and put them into a table.

    python benchmarks/study.py --model MODEL --suites math.jsonl code.jsonl --out runs/study
    ... --only paper tuned           some variants
    ... --table                      only the table of what is there

Every variant is a run of its own, `OUT/NAME`; what is finished is not done again, and a run that was cut off goes on.
The study names a config, keys that all variants change, and the variants; in values `{out}` is the folder of --out.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from mtp_jax.errors import UserError, run_command

RESULTS = "results.json"


def keys_of(study: dict[str, Any], name: str) -> dict[str, Any]:
    """What a variant changes, with what it takes from others.

    Raises:
        UserError: no variant of that name.
    """
    if name not in study["variants"]:
        raise UserError(f"there is no variant {name!r}; there are {', '.join(study['variants'])}.")
    variant = study["variants"][name]
    before = keys_of(study, variant["from"]) if "from" in variant else dict(study["keys"])
    return before | variant.get("keys", {})


def overrides(keys: dict[str, Any], model: str, folder: Path, out: Path) -> list[str]:
    """Arguments for `mtp_jax.train`."""
    values = {"model.path": model, "output_dir": str(folder)} | keys
    return [f"{key}={json.dumps(value).replace('{out}', str(out))}" for key, value in values.items()]


def run(*words: str) -> None:
    """Run a command of mtp_jax; its faults are told by itself."""
    done = subprocess.run([sys.executable, "-m", *words])
    if done.returncode:
        sys.exit(done.returncode)


def train(study: dict[str, Any], name: str, model: str, out: Path) -> None:
    """Continuations where the variant has them, and the adapter."""
    keys = keys_of(study, name)
    changes = overrides(keys, model, out / name, out)
    if keys.get("data.continuations"):
        run("mtp_jax.regenerate", "--config", study["config"], *changes)
    if not (out / name / "adapter" / "mtp_config.json").is_file():
        run("mtp_jax.train", "--config", study["config"], *changes)


def evaluate(study: dict[str, Any], name: str, a: argparse.Namespace) -> None:
    """Decode the suites, where the adapter can decode losslessly."""
    folder = a.out / name / "evaluated"
    if (folder / RESULTS).is_file() or keys_of(study, name).get("lora.gated") is False:
        return
    plans = study["variants"][name].get("plans", study["plans"])
    words = ["--model", a.model, "--adapter", str(a.out / name), "--suite", *a.suites, "--plans", plans]
    words += ["--weights", keys_of(study, name).get("model.weights", "stored")]
    sizes = [
        "--count",
        str(a.count),
        "--new-tokens",
        str(a.new_tokens),
        "--batch-sizes",
        "8",
        "--rounds",
        "1",
        "--estimate",
    ]
    run("mtp_jax.evaluate", *words, *sizes, "--out", str(folder))


def summary(folder: Path) -> dict[str, Any]:
    """What a finished variant reached: tokens per step by suite and plan, mask rows, losses of real rows."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timing = json.loads((folder / "timing.jsonl").read_text().splitlines()[-1])
    held = [line for line in lines if "held_out_loss" in line][-1]
    found: dict[str, Any] = {
        "mask_rows": timing.get("mask_rows"),
        "real_loss": held["held_out_real_loss"],
        "real_accuracy": held["held_out_real_accuracy"],
    }
    if (folder / "evaluated" / RESULTS).is_file():
        rows = json.loads((folder / "evaluated" / RESULTS).read_text())["rows"]
        found["rows"] = {(row["suite"], row["decoder"]): row for row in rows}
        found["faults"] = sum(len(row["identical"]["faults"]) for row in rows)
    return found


def table(study: dict[str, Any], out: Path, console: Console) -> None:
    """Tokens per step of every finished variant, by suite; real rows' loss shows whether the base has changed."""
    plan = study["plans"]
    found = {name: summary(out / name) for name in study["variants"] if (out / name / "adapter").is_dir()}
    suites = list(dict.fromkeys(suite for of in found.values() for suite, _ in of.get("rows", {})))
    shown = Table(
        "variant", "mask rows", *suites, "mean", "real rows' loss", "faults", title=f"tokens per step, {plan}"
    )
    for name, of in found.items():
        cells, means = [], []
        for suite in suites:
            row = of.get("rows", {}).get((suite, plan))
            value = row and row["tokens_per_step"]
            means += [value["mean"]] if value else []
            cells.append(f"{value['mean']:.2f} [{value['low']:.2f}, {value['high']:.2f}]" if value else "")
        mean = f"{np.mean(means):.3f}" if means else ""
        rest = (mean, f"{of['real_loss']:.4f}", str(of.get("faults", "")))
        shown.add_row(name, f"{of['mask_rows']:,}" if of["mask_rows"] else "", *cells, *rest)
    console.print(shown)


def main() -> None:
    """Train, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="benchmarks/study.yaml")
    parser.add_argument("--model", required=True)
    parser.add_argument("--suites", nargs="+", default=[], metavar="S", help="as --suite of mtp_jax.evaluate")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--count", type=int, default=16, help="questions of each suite")
    parser.add_argument("--new-tokens", type=int, default=96)
    a = parser.parse_args()
    study = yaml.safe_load(Path(a.study).read_text(encoding="utf-8"))
    if not a.table and not a.suites:
        raise UserError("give --suites, or --table for what is there already.")
    names = a.only or list(study["variants"])
    for name in names:
        keys_of(study, name)
    for name in names if not a.table else ():
        train(study, name, a.model, a.out)
        evaluate(study, name, a)
    table(study, a.out, Console(width=160))


if __name__ == "__main__":
    run_command(main)
