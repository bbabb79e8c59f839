"""What this device does with the method: correctness, time of steps, forced decoding, training; one command.

    python benchmarks/accelerator.py --out runs/accelerator
    python benchmarks/accelerator.py --out runs/accelerator --parts steps train --minutes 20 --geometry 1b
    python benchmarks/accelerator.py --out runs/accelerator --parts adapter --adapter CONFIG.yaml --suites FILE.jsonl
    python benchmarks/accelerator.py --out /tmp/rehearsal --tiny      every part on a CPU, in two minutes

Weights are random, in the geometries of Llama 3.2 1B and Llama 3.1 8B, and nothing is downloaded. Each part runs in a
process of its own and keeps its figures case by case in DIR/PART.json, so that a failure costs one case. Run again, the
command measures only what is missing or failed. DIR/report.md and report.png are made from these files. The parts:

    correct   two streams against the CPU, lossless decoding, chi-square of sampling, bfloat16 flips
    steps     the time of a decoding step against its rows, batch and context, beside the bandwidth bound
    decode    tokens per second of the real loop with forced acceptance: the paper's curve for GSM8k
    train     the training step: tokens, mask rows and share of peak arithmetic
    adapter   with --adapter alone: training for some minutes, then tokens per step and speed by suite
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PARTS = ("correct", "steps", "decode", "train", "adapter")
# Shares of the minutes; what a part leaves goes to those behind it.
_SHARES = {"correct": 2.0, "steps": 3.0, "decode": 2.0, "train": 3.0, "adapter": 4.0}
_GRACE = 120  # seconds that a case may take beyond its part's time before the part is stopped


def main() -> None:
    """Run the parts, then write the report."""
    from mtp_jax.errors import UserError

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--parts", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all parts together (10)")
    parser.add_argument("--geometry", help="1b, 8b or a config.json: for steps, decode and train")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--adapter", metavar="CONFIG.yaml", help="a training config, for the part of that name")
    parser.add_argument("--suites", nargs="*", default=[], help="what its adapter is evaluated on")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="traces of steps, decode and train, for Perfetto")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: every part on small shapes")
    parser.add_argument("--worker", choices=PARTS, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if not a.minutes > 0:
        raise UserError(f"--minutes {a.minutes}: should be more than 0.")
    if a.adapter is None and "adapter" in (a.parts or ()):
        raise UserError("--parts adapter: give a training config with --adapter.")
    if a.out.exists() and not a.out.is_dir():
        raise UserError(f"--out {a.out}: is a file; name a folder.")
    if a.adapter:
        from mtp_jax.config_file import load_config

        load_config(a.adapter, [])
    if a.geometry:
        from on_device.geometries import geometry

        geometry(a.geometry)
    if a.worker:
        if a.profile:
            from mtp_jax.runs.profile import check_profiler

            check_profiler()
        work(a)
        return
    a.out.mkdir(parents=True, exist_ok=True)
    parts = a.parts or [part for part in PARTS if part != "adapter" or a.adapter]
    failed = False
    end = time.monotonic() + 60 * a.minutes
    for i, part in enumerate(parts):
        share = _SHARES[part] / sum(_SHARES[left] for left in parts[i:])
        seconds = max(end - time.monotonic(), 0) * share
        failed |= not run_part(part, seconds)
    from on_device.report import write_report

    print(write_report(a.out))
    sys.exit(1 if failed else 0)


def run_part(part: str, seconds: float) -> bool:
    """One part in a process of its own, on the arguments of this one; whether every case of it went well."""
    print(f"{part}: {seconds / 60:.1f} min", flush=True)
    words = [sys.executable, __file__, *sys.argv[1:], "--worker", part, "--minutes", str(max(seconds, 1) / 60)]
    both = {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "")}
    if both["JAX_PLATFORMS"] in ("cuda", "gpu", "tpu"):  # the CPU is what `correct` compares with
        both["JAX_PLATFORMS"] += ",cpu"
    try:
        done = subprocess.run(words, env=os.environ | both, timeout=seconds + _GRACE)
    except subprocess.TimeoutExpired:
        print(f"{part}: stopped, as a case took too long; run again with more --minutes", file=sys.stderr, flush=True)
        return False
    return done.returncode == 0


def work(a: argparse.Namespace) -> None:
    """Measure what is missing of one part until its time is over; exit code 1 where a case failed."""
    import importlib

    import jax
    from on_device import Setting

    from mtp_jax.errors import UserError
    from mtp_jax.files import read_json, write_whole

    end = time.monotonic() + 60 * a.minutes
    decoding = a.geometry or ("tiny" if a.tiny else "8b")
    training = (a.geometry,) if a.geometry else ("tiny",) if a.tiny else ("1b", "8b")
    rank = 8 if a.tiny else a.rank
    wanted = {"decoding": decoding, "training": list(training), "rank": rank, "dtype": a.dtype, "tiny": a.tiny}
    device = jax.devices()[0]
    about = {"part": a.worker, "setting": wanted, "device": device.device_kind, "devices": jax.device_count()}
    file = a.out / f"{a.worker}.json"
    found: dict[str, Any] = about | {"versions": {"jax": jax.__version__}, "cases": {}}
    if file.is_file():
        found = read_json(file)
        if any(found.get(key) != value for key, value in about.items()):
            raise UserError(f"{file}: holds figures of another device or setting; name another --out.")
    of_adapter = a.adapter, tuple(a.suites), a.out.resolve()
    setting = Setting(a.tiny, decoding, training, rank, a.dtype, a.minutes, *of_adapter, a.profile)
    failed = False
    for name, measure in importlib.import_module(f"on_device.{a.worker}").cases(setting):
        if "error" not in found["cases"].get(name, {"error": ""}):
            if a.profile:
                print(f"{a.worker}: {name}: measured before, so there is no trace; name another --out", flush=True)
            continue
        if time.monotonic() > end:
            print(f"{a.worker}: no time for {name}; run again for the rest", flush=True)
            break
        begin = time.monotonic()
        try:
            figures = measure()
        except Exception as error:
            figures = {"error": f"{type(error).__name__}: {error}"[:2000]}
        failed |= "error" in figures or figures.get("right") is False
        found["cases"][name] = figures
        write_whole(file, (json.dumps(found, indent=1) + "\n").encode())
        said = figures.get("error", "right" if figures.get("right") else "measured").splitlines()[0][:200]
        print(f"{a.worker}: {name}: {said} ({time.monotonic() - begin:.0f} s)", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    from mtp_jax.errors import run_command

    run_command(main)
