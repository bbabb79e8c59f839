"""benchmarks/compare_runs.py: what runs differ in and what came of them, from the files that training writes."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from mtp_jax.config_file import dump, validate
from mtp_jax.errors import UserError

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "compare_runs.py"


@pytest.fixture
def compare_runs(monkeypatch):
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location("compare_runs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "compare_runs", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path, make_tree):
    """A function that writes a run of three steps, the second and third evaluated, and gives its folder."""

    def write(name, rank, estimates, agreements, mask_rows=100):
        tree = make_tree(tmp_path / name) | {"objective": "multi_token", "model": {"path": "base"}}
        tree |= {"lora": {"rank": rank}, "mtp": {"masks": 2}}
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(dump(validate(tree, "tree")))
        timing = [{"step": step, "seconds": 2.0 * step} for step in (1, 2, 3)]
        timing = [line | ({"mask_rows": mask_rows * line["step"]} if mask_rows else {}) for line in timing]
        metrics = [{"step": step, "loss": 1.0} for step in (1, 2, 3)]
        for step, estimate, agreement in zip((2, 3), estimates, agreements, strict=True):
            figures = {"loss": 1.0, "tokens_per_step": estimate, "agreement": agreement, "agreement_base": [0, 0]}
            metrics.append({"step": step} | {f"held_out_{name}": value for name, value in figures.items()})
        for file, lines in (("metrics", metrics), ("timing", timing)):
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (tmp_path / name / f"{file}.jsonl").write_text(text + '{"step": 4, "se')  # being written
        return tmp_path / name

    return write


def test_runs_stand_side_by_side(compare_runs, run, monkeypatch, capsys):
    one = run("one", 4, [{"1": 1.5, "2": 2.25}, {"1": 1.4, "2": 2.0}], [[0.75, 0.5], [0.7, 0.4]])
    two = run("two", 8, [{"1": 1.25, "2": 1.5}, {"1": 1.3, "2": 1.6}], [[0.5, 0.25], [0.6, 0.3]], mask_rows=None)
    monkeypatch.setattr(sys, "argv", ["compare_runs", str(one), str(two)])
    compare_runs.main()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert [row for row in rows if row] == [
        ["lora.rank", "4", "8"],
        ["steps", "3", "3"],
        ["mask rows", "300", "-"],
        ["seconds", "12", "12"],
        ["tokens per step, 1 mask", "1.400 (1.500)", "1.300 (1.300)"],
        ["tokens per step, 2 masks", "2.000 (2.250)", "1.600 (1.600)"],
        ["agreement, offset 1", "0.700 (0.750)", "0.600 (0.600)"],
        ["agreement, offset 2", "0.400 (0.500)", "0.300 (0.300)"],
    ]


def test_a_run_of_the_next_token_has_no_drafts_to_tell_of(compare_runs, finished):
    read = compare_runs.Run.read(finished)
    assert (read.steps, read.mask_rows, read.tokens_per_step, read.agreement) == (12, None, {}, [])
    assert set(compare_runs.figures([read])) == {"steps", "mask rows", "seconds"}
    assert compare_runs.differences([read, read]) == {}


def test_a_folder_without_a_run_is_told(compare_runs, tmp_path):
    with pytest.raises(UserError, match=r"config\.yaml: the config cannot be read"):
        compare_runs.Run.read(tmp_path)
