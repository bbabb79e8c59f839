"""What a run leaves: records, checkpoints, a model; and how it ends when something is wrong with it."""

import json
import shutil
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import listing, read_lines

from mtp_jax.config_file import validate
from mtp_jax.errors import UserError
from mtp_jax.runs import checkpoints
from mtp_jax.runs.checkpoints import Checkpoints
from mtp_jax.runs.claim import claim
from mtp_jax.runs.folder import RunFolder
from mtp_jax.training import program, tasks
from mtp_jax.training.step import WEIGHTS_FINITE, TrainState


def test_the_records_of_a_run(finished):
    metrics = read_lines(finished / "metrics.jsonl")
    names = {"step", "loss", "accuracy", "gradient_norm", "learning_rate"}
    assert all(line.keys() == names for line in metrics if "loss" in line)
    losses = [line["held_out_loss"] for line in metrics if "held_out_loss" in line]
    assert losses == sorted(losses, reverse=True) and losses[0] - losses[-1] > 0.1
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["12", "9"]


def test_a_finished_run_is_not_trained_again(finished, tree, write_config, command, monkeypatch):
    shutil.copytree(finished, tree["output_dir"])
    monkeypatch.setattr(program, "make_train_step", lambda *_: pytest.fail)
    ended = command("train", "--config", write_config(tree))
    assert ended.code == 0 and ended.out == f"model: {tree['output_dir']}/model\n"
    before, after = listing(finished), listing(tree["output_dir"])
    del before["config.yaml"], after["config.yaml"]  # it says where it lies
    assert after == before


def test_evaluate_gives_the_figures_of_the_run(finished, corpus, command):
    ended = command(
        *("evaluate", "--model", finished / "model", "--text", corpus, "--held-out", "0.2"),
        *("--sequence-length", "32", "--batch-size", "4", "--json"),
    )
    assert ended.code == 0, ended
    figures, last = json.loads(ended.out), read_lines(finished / "metrics.jsonl")[-1]
    assert figures["tokens"] == last["held_out_tokens"] > 100
    assert figures["accuracy"] == pytest.approx(last["held_out_accuracy"], rel=1e-6)
    assert figures["loss"] == pytest.approx(last["held_out_loss"], rel=1e-6)


def test_metrics_do_not_depend_on_what_is_logged_or_saved(finished, tree, write_config, command):
    tree |= {"logging": {"every": 5}, "checkpoints": {"every": 7, "keep": 1}}
    assert command("train", "--config", write_config(tree)).code == 0
    every = [line for line in read_lines(finished / "metrics.jsonl") if line["step"] in (5, 10, 12)]
    ours = read_lines(Path(tree["output_dir"]) / "metrics.jsonl")
    assert [line for line in ours if "loss" in line] == [line for line in every if "loss" in line]


# ---- losses that are not finite


def stored_states(folder):
    for path in sorted((folder / "checkpoints").iterdir()):
        yield ocp.StandardCheckpointer().restore((path / "state").absolute())


def test_a_run_that_diverges_stops_and_saves_nothing_of_it(tree, write_config, command, corpus):
    tree["train"] |= {"learning_rate": 1e38, "warmup_steps": 11, "clip_norm": None}
    tree["checkpoints"] = {"every": 1, "keep": 20}
    config, folder = write_config(tree), Path(tree["output_dir"])
    first, second = command("train", "--config", config), command("train", "--config", config)
    for ended in (first, second):  # the second resumes from the checkpoints of the first
        assert ended.code == 2 and len(ended.errors) == 1, ended
        assert "Traceback" not in ended.err
    step = len(read_lines(folder / "metrics.jsonl")) + 1
    assert f"step {step} is not finite" in first.errors[0] and f"batch {step} holds doc" in first.errors[0]
    assert first.errors == second.errors and "resuming" in second.err
    assert all(f"doc{i:02}" in " ".join(p.name for p in corpus.iterdir()) for i in range(24))
    states = list(stored_states(folder))
    assert len(states) == step - 1 >= 1
    assert all(np.isfinite(leaf).all() for state in states for leaf in jax.tree.leaves(state))
    assert not (folder / "model").exists()


def test_weights_that_overflow_are_not_saved(tree, write_config, command, monkeypatch):
    make = program.make_train_step

    def overflow_at_step_3(*arguments):
        step = make(*arguments)

        def poisoned(state, frozen, batch):
            after, metrics = step(state, frozen, batch)
            return after, metrics | {WEIGHTS_FINITE: (state.step != 2).astype(float)}

        return poisoned

    monkeypatch.setattr(program, "make_train_step", overflow_at_step_3)
    ended = command("train", "--config", write_config(tree))
    assert ended.code == 2 and "step 3 is not finite" in ended.errors[0] and "weights" in ended.errors[0]
    assert list((Path(tree["output_dir"]) / "checkpoints").iterdir()) == []


def test_a_held_out_loss_that_is_not_finite_stops_the_run(tree, write_config, command, monkeypatch):
    figures = {"loss": float("nan"), "accuracy": 0.0, "tokens": 5}
    monkeypatch.setattr(tasks, "NextTokenEvaluation", lambda *_: lambda *_: figures)
    ended = command("train", "--config", write_config(tree))
    assert ended.code == 2 and "held-out loss at step 4 is not finite" in ended.errors[0]
    assert "NaN" not in (Path(tree["output_dir"]) / "metrics.jsonl").read_text()


# ---- checkpoints that fail in the background


def failing_save(monkeypatch, error):
    def fail(checkpointer):
        raise error

    monkeypatch.setattr(checkpoints, "_commit", fail)


class Nothing:
    """An iterator of batches with nothing to remember."""

    def get_state(self):
        return {}

    def set_state(self, state):
        assert not state


def something():
    return TrainState(jnp.int32(1), {"w": jnp.zeros(3)}, {})


def test_a_failed_save_is_raised_at_the_end(tmp_path, monkeypatch):
    config = validate_checkpoints()
    with monkeypatch.context() as patched, pytest.raises(OSError, match="gone"):
        failing_save(patched, OSError("gone"))
        with Checkpoints(RunFolder(str(tmp_path)), config) as folder:
            folder.save(something(), Nothing())
    assert not (tmp_path / "checkpoints" / "1" / "manifest.json").exists()


def test_a_failed_save_is_reported_beside_the_fault_that_ended_the_run(tmp_path, monkeypatch):
    config = validate_checkpoints()
    with monkeypatch.context() as patched, pytest.raises(UserError) as caught:
        failing_save(patched, OSError("gone"))
        with Checkpoints(RunFolder(str(tmp_path)), config) as folder:
            folder.save(something(), Nothing())
            raise UserError("the loss is not finite.")
    assert len(caught.value.faults) == 2 and "gone" in caught.value.faults[1]


def validate_checkpoints():
    from mtp_jax.config import Checkpoints as Section

    return Section()


# ---- one run at a time


def test_a_second_run_on_the_same_folder_is_refused(tree, write_config, command):
    config, folder = write_config(tree), Path(tree["output_dir"])
    with claim(RunFolder(str(folder)), validate(tree, "tree")):
        before = listing(folder)
        ended = command("train", "--config", config)
        assert ended.code == 2 and len(ended.errors) == 1
        assert ended.errors[0] == f"output_dir: {folder} is in use by another run that has not ended."
        assert listing(folder) == before
    with claim(RunFolder(str(folder)), validate(tree, "tree")):
        pass


def test_a_second_process_on_the_same_folder_is_refused(tree, write_config, command, start, finish):
    import time

    tree["train"]["steps"] = 100_000
    config, folder = write_config(tree), Path(tree["output_dir"])
    process = start("train", "--config", config)
    while process.poll() is None and not (folder / "config.yaml").exists():
        time.sleep(0.05)
    ended = command("train", "--config", config)
    assert process.poll() is None
    process.kill()
    finish(process)
    assert ended.code == 2 and len(ended.errors) == 1 and "is in use by another run" in ended.errors[0]
    with claim(RunFolder(str(folder)), validate(tree, "tree")):
        pass


# ---- trackers


def events(file):
    """(tag, step, value) of each number in a TensorBoard file."""
    from tensorboardX.proto.event_pb2 import Event

    data, at, found = file.read_bytes(), 0, []
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event = Event.FromString(data[at + 12 : at + 12 + length])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        at += length + 16
    return found


def test_tensorboard_shows_the_metrics(tree, write_config, command):
    tree["logging"] = {"tensorboard": True}
    assert command("train", "--config", write_config(tree)).code == 0
    folder = Path(tree["output_dir"])
    (file,) = (folder / "tensorboard").iterdir()
    shown = {(tag, step): value for tag, step, value in events(file)}
    expected = {
        (name, line["step"]): value
        for line in read_lines(folder / "metrics.jsonl")
        for name, value in line.items()
        if name != "step"
    }
    assert shown.keys() == expected.keys()
    assert all(np.isclose(shown[key], value, rtol=1e-6) for key, value in expected.items())
