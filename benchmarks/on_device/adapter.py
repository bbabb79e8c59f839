"""An adapter trained on this device for some minutes, then decoded: the commands that a user would run."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mtp_jax.config_file import load_config
from mtp_jax.errors import UserError
from on_device import Cases, Setting

_TRIAL = 8  # steps whose time says how many there is time for
_PLANS = "none,linear:1,linear:4,quadratic:1..8,auto"


def cases(setting: Setting) -> Cases:
    """Continuations, training and evaluation; nothing without --adapter."""
    if setting.adapter is None:
        return
    config, run = setting.adapter, setting.out / "adapter-run"
    if load_config(config, []).data.continuations is not None:
        yield "regenerate", lambda: _run("regenerate", "--config", config)
    yield "train", lambda: train(config, run, setting)
    if setting.suites:
        yield "evaluate", lambda: evaluate(config, run, setting)


def train(config: str, run: Path, setting: Setting) -> dict[str, Any]:
    """As many steps as there is time for, by the pace of a few."""
    trial = setting.out / "adapter-trial"
    overrides = [f"output_dir={trial}", f"train.steps={_TRIAL}", "train.warmup_steps=0", "mtp.grow_steps=0"]
    _run("train", "--config", config, *overrides, "evaluation.every=null", "logging.every=1")
    pace = [json.loads(line)["seconds"] for line in (trial / "timing.jsonl").read_text().splitlines()]
    seconds = sorted(pace[1:])[len(pace) // 2 - 1]
    wanted = load_config(config, [])
    steps = max(2, int(60 * setting.minutes / seconds))
    assert wanted.mtp is not None
    grow = wanted.mtp.grow_steps * steps // wanted.train.steps
    warmup = wanted.train.warmup_steps * steps // wanted.train.steps
    words = [f"train.steps={steps}", f"train.warmup_steps={warmup}", f"mtp.grow_steps={grow}"]
    done = _run("train", "--config", config, f"output_dir={run}", *words, f"checkpoints.every={max(1, steps // 4)}")
    return done | {"steps": steps, "seconds_per_step_of_whole_blocks": seconds}


def evaluate(config: str, run: Path, setting: Setting) -> dict[str, Any]:
    """Tokens per step and speed by suite."""
    out, model = setting.out / "evaluated", load_config(config, []).model.path
    assert model is not None
    words = ["--model", model, "--adapter", str(run), "--suite", *setting.suites, "--plans", _PLANS, "--out", str(out)]
    done = _run("evaluate", *words, "--count", "2" if setting.tiny else "20", "--rounds", "1", "--new-tokens", "128")
    results = json.loads((out / "results.json").read_text())
    kept = ("suite", "decoder", "plan", "tokens_per_step", "tokens_per_second", "speedup", "identical")
    return done | {"rows": [{name: row.get(name) for name in kept} for row in results["rows"]]}


def _run(command: str, *words: str) -> dict[str, Any]:
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", f"mtp_jax.{command}", *words], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"mtp_jax.{command} ended with {done.returncode}: {done.stderr.strip()[-800:]}")
    return {"command": f"python -m mtp_jax.{command} {' '.join(words)}", "seconds": time.perf_counter() - begin}
