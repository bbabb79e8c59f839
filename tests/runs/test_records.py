"""The best step of a run, by its records, and what is written of it."""

import json
from pathlib import Path

import numpy as np
from conftest import read_lines
from safetensors.numpy import load_file

from mtp_jax.runs.records import Best
from mtp_jax.training import tasks


def line(step, loss, **estimate):
    figures = {"held_out_tokens_per_step": estimate} if estimate else {}
    return {"step": step, "held_out_loss": loss, **figures}


def test_the_smallest_loss_is_best():
    assert Best([{"step": 1, "loss": 0.0}, line(2, 3.0), line(4, 2.0), line(6, 2.5)]).step == 4


def test_tokens_per_step_at_most_masks_come_before_the_loss():
    at = {"1": 1.5, "8": 2.0}, {"1": 1.2, "8": 2.5}, {"1": 1.1, "8": 2.5}
    best = Best([line(2, 1.0, **at[0]), line(4, 3.0, **at[1]), line(6, 2.0, **at[2]), line(8, 2.0, **at[2])])
    assert best.step == 6


def test_the_best_model_is_written_beside_the_last(tree, write_config, command, finished, monkeypatch):
    make = tasks.NextTokenEvaluation

    def worse_later(*arguments):
        evaluate, given = make(*arguments), []

        def figures(*arguments):
            given.append(evaluate(*arguments))
            return given[-1] | {"loss": given[-1]["loss"] + 10 * (len(given) > 2)}

        return figures

    monkeypatch.setattr(tasks, "NextTokenEvaluation", worse_later)
    tree["checkpoints"] = {"every": 5, "keep": 1}
    assert command("train", "--config", write_config(tree)).code == 0
    folder = Path(tree["output_dir"])
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["12", "8"]
    noted = json.loads((folder / "best.json").read_text())
    (at_8,) = [
        entry for entry in read_lines(folder / "metrics.jsonl") if entry["step"] == 8 and "held_out_loss" in entry
    ]
    assert noted == {"step": 8, "by": "held_out_loss", "value": at_8["held_out_loss"]}
    last, best = (load_file(out / "model" / "model.safetensors") for out in (folder, folder / "best"))
    reference = load_file(finished / "model" / "model.safetensors")
    assert all(np.array_equal(last[key], reference[key]) for key in reference)
    assert any(not np.array_equal(best[key], last[key]) for key in last)
    ended = command("train", "--config", write_config({**tree, "output_dir": str(folder) + "-8"}), "train.steps=8")
    assert ended.code == 0
    at_8 = load_file(Path(str(folder) + "-8") / "model" / "model.safetensors")
    assert all(np.array_equal(best[key], at_8[key]) for key in at_8)


def test_a_run_that_ends_best_has_both_under_two_names(finished):
    assert json.loads((finished / "best.json").read_text())["step"] == 12
    last, best = (out / "model" / "model.safetensors" for out in (finished, finished / "best"))
    assert last.samefile(best)
