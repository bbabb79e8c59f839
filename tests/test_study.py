"""benchmarks/study.py: every variant is a valid config of equal cost, and the table holds what the runs hold."""

import importlib.util
import io
import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from mtp_jax.config_file import load_config
from mtp_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location("study", ROOT / "benchmarks" / "study.py")
subject = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(subject)

pytestmark = pytest.mark.quick
STUDY = yaml.safe_load((ROOT / "benchmarks" / "study.yaml").read_text())


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", STUDY["variants"])
def test_every_variant_is_valid_and_costs_the_same(name, tmp_path):
    words = subject.overrides(subject.keys_of(STUDY, name), "MODEL", tmp_path / name, tmp_path)
    config = load_config(STUDY["config"], words)
    t, M, grow = config.train, config.mtp.masks, config.mtp.grow_steps
    masks = sum(M if step >= grow else 2 + step * (M - 2) // grow for step in range(t.steps))
    assert masks * t.batch_size * t.anchors == pytest.approx(122_880, rel=0.003 if grow else 0)
    assert config.output_dir == str(tmp_path / name) and config.model.path == "MODEL"
    if config.data.continuations:
        assert config.data.continuations.path.startswith(str(tmp_path))


def test_variants_are_different():
    found = [json.dumps(subject.keys_of(STUDY, name), sort_keys=True) for name in STUDY["variants"]]
    assert len(set(found)) == len(found)


def test_a_variant_adds_to_what_it_is_from():
    study = {"keys": {"a": 1, "b": 1}, "variants": {"x": {"keys": {"b": 2}}, "y": {"from": "x", "keys": {"c": 3}}}}
    assert subject.keys_of(study, "y") == {"a": 1, "b": 2, "c": 3}
    with pytest.raises(UserError, match="there is no variant 'z'; there are x, y"):
        subject.keys_of(study, "z")


def row(suite, mean, faults):
    step = {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}
    return {"suite": suite, "decoder": "quadratic:8", "tokens_per_step": step, "identical": {"faults": faults}}


def test_the_table_holds_the_figures_of_finished_variants(tmp_path):
    study = {"plans": "quadratic:8", "keys": {}, "variants": {"one": {}, "two": {}, "unfinished": {}}}
    for name, mean in (("one", 1.5), ("two", 2.0)):
        (tmp_path / name / "adapter").mkdir(parents=True)
        (tmp_path / name / "evaluated").mkdir()
        held = {"step": 9, "held_out_loss": 3.0, "held_out_real_loss": 1.25, "held_out_real_accuracy": 0.5}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps({"step": 9}) + "\n" + json.dumps(held) + "\n")
        (tmp_path / name / "timing.jsonl").write_text(json.dumps({"step": 9, "mask_rows": 12345}) + "\n")
        rows = [row("math", mean, []), row("code", mean + 1, ["prompt 1"])]
        (tmp_path / name / "evaluated" / "results.json").write_text(json.dumps({"rows": rows}))
    console = Console(width=160, file=io.StringIO())
    subject.table(study, tmp_path, console)
    text = console.file.getvalue()
    assert "1.50 [1.40, 1.60]" in text and "3.00 [2.90, 3.10]" in text and "unfinished" not in text
    (two,) = [line for line in text.splitlines() if " two " in line]
    assert all(part in two for part in ("12,345", "2.500", "1.2500", " 1 "))
