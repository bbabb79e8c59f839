"""A trace of a few steps changes nothing else, and each step's arithmetic is told."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest

from mtp_jax.config_file import validate
from mtp_jax.errors import UserError
from mtp_jax.runs.profile import Trace, check_profiler
from mtp_jax.training import run as subject
from mtp_jax.training.run import train


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_a_profiled_run_is_the_same_run(tree, finished, tmp_path, start, finish, write_config):
    done = finish(start("train", "--config", write_config(tree), "--profile", tmp_path / "trace"))
    assert done.code == 0, done
    folder = Path(tree["output_dir"])
    assert (folder / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
    assert len(list((tmp_path / "trace").rglob("*.xplane.pb"))) == 1
    assert "TFLOP/s" in done.err


def test_the_trace_holds_three_steps_once_all_is_compiled(monkeypatch):
    calls = []
    monkeypatch.setattr("jax.profiler.start_trace", lambda folder, **_: calls.append(folder))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: calls.append("end"))
    with Trace("here", start=10) as trace:
        for step in range(11, 20):
            trace.before(step)
            calls.append(step)
            trace.after(step, {"loss": np.float32(0)})
    assert calls == [11, 12, "here", 13, 14, 15, "end", 16, 17, 18, 19]
    calls.clear()
    with Trace("here", start=0) as trace:
        for step in (1, 2, 3):
            trace.before(step)
            trace.after(step, {})
    assert calls == ["here", "end"]
    calls.clear()
    with Trace(None, start=0) as trace:
        trace.before(3)
        trace.after(5, {})
    assert not calls


@pytest.mark.parametrize("peak", [None, 2e12])
def test_timing_has_each_steps_arithmetic(tree, monkeypatch, peak):
    monkeypatch.setattr(subject, "peak_flops", lambda device: peak)
    tree["train"] |= {"steps": 2, "warmup_steps": 0}
    tree["evaluation"] = {}
    folder = Path(train(validate(tree, "tree"))).parent
    for line in lines(folder / "timing.jsonl"):
        assert line["model_tflops_per_second"] >= 0
        assert ("share_of_peak" in line) == (peak is not None)
        if peak is not None:
            assert line["share_of_peak"] == pytest.approx(line["model_tflops_per_second"] * 1e12 / peak, abs=1e-4)


@pytest.mark.parametrize(
    ("platforms", "libtpu", "refused"),
    [("", True, True), ("tpu,cpu", True, True), ("cpu", True, False), ("", False, False)],
)
def test_a_profiler_that_would_end_the_process_is_not_begun(monkeypatch, platforms, libtpu, refused):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: libtpu or None)
    with pytest.raises(UserError, match="set JAX_PLATFORMS=cpu") if refused else contextlib.nullcontext():
        check_profiler()
