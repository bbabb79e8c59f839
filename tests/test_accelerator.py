"""benchmarks/accelerator.py: its rehearsal measures every part, and a failure costs one case."""

import importlib.util
import json
import os
import subprocess
import sys
import types
from argparse import Namespace
from pathlib import Path

import pytest

from mtp_jax.errors import UserError

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
TOOL = BENCHMARKS / "accelerator.py"


@pytest.fixture
def subject(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("accelerator", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*words):
    return subprocess.run([sys.executable, TOOL, *words], capture_output=True, text=True, env=os.environ.copy())


def test_the_rehearsal_measures_every_part_once(tmp_path):
    words = ("--out", tmp_path, "--tiny", "--minutes", "30", "--profile", tmp_path / "traces", "--dtype", "float32")
    done = run(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = {
        part: json.loads((tmp_path / f"{part}.json").read_text()) for part in ("correct", "steps", "decode", "train")
    }
    assert all(case for part in parts.values() for case in part["cases"].values())
    assert not any("error" in case for part in parts.values() for case in part["cases"].values())
    checks = parts["correct"]["cases"]
    assert sum(case.get("right", False) for case in checks.values()) == len(checks) - 1  # flips are only counted
    lossless = [case for name, case in checks.items() if name.startswith("lossless")]
    assert len(lossless) == 6 and max(case["tokens_per_step"] for case in lossless) > 1.5
    assert checks["sampled: chi-square"]["p_value_of_another_temperature"] < 1e-6
    for case in parts["decode"]["cases"].values():
        assert case["plans"]["none"]["tokens_per_step"] == 1 and case["plans"]["quadratic:2"]["tokens_per_step"] > 1.5
    report = (tmp_path / "report.md").read_text()
    assert "(report.png)" in report and (tmp_path / "report.png").is_file()
    table = report[report.index("## Decoding with forced acceptance") : report.index("## Training steps")]
    assert all(f"{name} (forced)" in table for name in ("tokens per step", "tokens/s", "against none"))
    traced = {file.relative_to(tmp_path / "traces").parts[0] for file in tmp_path.glob("traces/**/*.xplane.pb")}
    assert traced == {"steps", "decode", "train"}
    # Again: only what is missing.
    del parts["decode"]["cases"]["batch 2"]
    (tmp_path / "decode.json").write_text(json.dumps(parts["decode"]))
    again = run(*words)
    assert again.returncode == 0 and again.stdout.count(" s)") == 1 and "decode: batch 2: measured" in again.stdout
    other = run(*words[:-1], "bfloat16", "--parts", "steps")
    assert other.returncode == 1 and "of another device or setting; name another --out" in other.stderr


def test_a_failure_costs_one_case(subject, tmp_path, monkeypatch, capsys):
    asked, broken = [], [True]

    def cases(setting):
        def measure(name):
            asked.append(name)
            if name == "bad" and broken:
                raise MemoryError("no room")
            return {"seconds": 1.0}

        for name in ("good", "bad", "last"):
            yield name, lambda name=name: measure(name)

    monkeypatch.setitem(sys.modules, "on_device.steps", types.SimpleNamespace(cases=cases))
    words = {"minutes": 1.0, "geometry": None, "tiny": True, "rank": 8, "dtype": "float32", "adapter": None}
    a = Namespace(out=tmp_path, worker="steps", suites=[], profile=None, **words)
    with pytest.raises(SystemExit, match="1"):
        subject.work(a)
    found = json.loads((tmp_path / "steps.json").read_text())["cases"]
    assert found == {"good": {"seconds": 1.0}, "bad": {"error": "MemoryError: no room"}, "last": {"seconds": 1.0}}
    broken.clear()
    with pytest.raises(SystemExit, match="0"):
        subject.work(a)
    assert asked == ["good", "bad", "last", "bad"]
    asked.clear()
    a.out, a.minutes = tmp_path / "late", -1.0
    a.out.mkdir()
    with pytest.raises(SystemExit, match="0"):
        subject.work(a)
    assert not asked and "no time for good; run again for the rest" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--minutes", "0"], "--minutes 0.0: should be more than 0."),
        (["--parts", "adapter"], "--parts adapter: give a training config with --adapter."),
        (["--geometry", "70x"], "--geometry 70x: should be 1b, 8b or a config.json."),
        (["--out", __file__], f"--out {__file__}: is a file; name a folder."),
        (["--adapter", "none.yaml"], "none.yaml: the config cannot be read (No such file or directory)."),
    ],
)
def test_bad_input(subject, tmp_path, monkeypatch, words, said):
    monkeypatch.setattr(sys, "argv", ["accelerator.py", "--out", str(tmp_path / "out"), *words])
    with pytest.raises(UserError) as error:
        subject.main()
    assert error.value.faults == (said,) and not (tmp_path / "out").exists()
