"""Bad input ends with exit code 2 and one line per fault, and leaves nothing behind."""

import os
import shutil
from pathlib import Path

import pytest
from conftest import listing


def refused(ended, *says):
    """Check that a command ended with exactly these faults, and return them."""
    assert ended.code == 2, ended
    assert "Traceback" not in ended.err and ended.out == ""
    assert len(ended.errors) == len(says) == len(ended.err.splitlines()), ended
    assert all(part in fault for part, fault in zip(says, ended.errors, strict=True)), ended


def put(tree, place, value):
    *parents, last = place.split(".")
    for name in parents:
        tree = tree[int(name)] if isinstance(tree, list) else tree.setdefault(name, {})
    tree[int(last) if isinstance(tree, list) else last] = value


@pytest.mark.parametrize(
    ("places", "says"),
    [
        ({"train.stepps": 3}, ["train.stepps is not a key; did you mean 'steps'?"]),
        ({"train.steps": "x", "mesh.data": 0, "data.held_out": 7}, ["held_out", "train.steps", "mesh sizes"]),
        ({"data.sources.0.path": "no/such/place"}, ["data.sources.0.path: no/such/place: no such file"]),
        ({"model": {"path": "no/such/place"}}, ["no/such/place: no such folder"]),
        ({"model": {"path": "bundled:nothing"}}, ["no bundled model 'bundled:nothing'"]),
        ({"model.scratch.tokenizer": "no/such/place"}, ["no/such/place: holds no tokenizer"]),
        ({"model.scratch.tokenizer.vocabulary": 301}, ["vocabulary=301 is more than model.scratch.config.vocab_size"]),
        ({"model.scratch.config.hidden_size": "x"}, ["model.scratch.config: hidden_size is 'x'"]),
        (
            {"model.scratch.config.hidden_size": "x", "model.scratch.config.intermediate_size": 0},
            ["hidden_size", "intermediate_size"],
        ),
        ({"model.scratch.config.model_type": "gpt2"}, ["'gpt2'"]),
        ({"train.sequence_length": 65}, ["train.sequence_length=65 is longer than the model's context of 64"]),
        ({"train.accumulation": 3}, ["train.batch_size=4 does not divide"]),
        ({"mesh.data": 3}, ["mesh: data=3, fsdp=1, tensor=1 does not multiply to the 1 devices"]),
        ({"data.held_out": 1e-9}, ["no document fell to the held-out part"]),
        ({"logging.wandb": "project"}, ["logging.wandb needs a package"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_config_leaves_no_trace(tree, write_config, command, tmp_path, places, says, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find(name, *a))
    for place, value in places.items():
        put(tree, place, value)
    config = write_config(tree)
    before = listing(tmp_path)
    refused(command("train", "--config", config), *says)
    assert listing(tmp_path) == before


def test_a_missing_config_file_is_named(command, tmp_path):
    refused(command("train", "--config", tmp_path / "none.yaml"), "none.yaml: the config cannot be read")


@pytest.mark.parametrize("kind", ["folder without text", "empty file", "empty files"])
def test_data_without_text_is_named(tree, write_config, command, tmp_path, kind):
    path = tmp_path / "data"
    if kind == "empty file":
        path.write_text("")
    else:
        path.mkdir()
        (path / ("a.md" if kind == "folder without text" else "a.txt")).write_text("")
    put(tree, "data.sources.0.path", str(path))
    refused(command("train", "--config", write_config(tree)), "holds no .txt" if "without" in kind else "is empty")
    assert not Path(tree["output_dir"]).exists()


def test_a_corrected_run_may_take_the_same_output_folder(tree, write_config, command):
    put(tree, "model.scratch.config.model_type", "gpt2")
    assert command("train", "--config", write_config(tree)).code == 2
    put(tree, "model.scratch.config.model_type", "llama")
    put(tree, "train.steps", 3)
    ended = command("train", "--config", write_config(tree))
    assert ended.code == 0, ended


# ---- a model to fine-tune


@pytest.fixture
def model(finished, tmp_path):
    """A copy of a model folder, to be damaged."""
    return Path(shutil.copytree(finished / "model", tmp_path / "model"))


def fine_tune(tree, model, write_config, **train):
    tree["model"] = {"path": str(model)}
    tree["train"] |= train
    return write_config(tree)


@pytest.mark.parametrize("size", [0, 5, 100, 0.5, -1])
def test_truncated_weights_are_named(tree, model, write_config, command, tmp_path, size):
    weights = model / "model.safetensors"
    whole = weights.stat().st_size
    os.truncate(weights, whole - 1 if size == -1 else int(size * whole) if isinstance(size, float) else size)
    config = fine_tune(tree, model, write_config)
    before = listing(tmp_path)
    refused(command("train", "--config", config), "model.safetensors: damaged or truncated")
    assert listing(tmp_path) == before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_a_damaged_model_folder_is_named(tree, model, write_config, command, tmp_path, name, how):
    if how == "missing":
        (model / name).unlink()
    else:
        os.truncate(model / name, (model / name).stat().st_size // 2)
    config = fine_tune(tree, model, write_config)
    before = listing(tmp_path)
    ended = command("train", "--config", config)
    refused(ended, str(model))
    assert listing(tmp_path) == before


def test_weights_that_do_not_fit_the_config_are_named(tree, model, write_config, command):
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text.replace('"intermediate_size": 64', '"intermediate_size": 48'))
    refused(command("train", "--config", fine_tune(tree, model, write_config)), "of the wrong shape")
    assert not Path(tree["output_dir"]).exists()


def test_a_sequence_longer_than_the_context_is_named(tree, model, write_config, command):
    config = fine_tune(tree, model, write_config, sequence_length=100)
    refused(command("train", "--config", config), "train.sequence_length=100 is longer")


def test_fine_tuning_begins_where_the_model_is(tree, model, write_config, command, finished):
    from conftest import read_lines

    config = fine_tune(tree, model, write_config, steps=2, warmup_steps=0, learning_rate=1e-9)
    ended = command("train", "--config", config)
    assert ended.code == 0, ended
    tuned = read_lines(Path(tree["output_dir"]) / "metrics.jsonl")[-1]["held_out_loss"]
    assert tuned == pytest.approx(read_lines(finished / "metrics.jsonl")[-1]["held_out_loss"], rel=1e-6)


# ---- the output folder


def test_an_output_folder_that_is_a_file_is_named(tree, write_config, command, tmp_path):
    (tmp_path / "run").write_text("mine")
    for out in (tmp_path / "run", tmp_path / "run" / "below"):
        tree["output_dir"] = str(out)
        refused(command("train", "--config", write_config(tree)), f"output_dir: {out} cannot be written")
    assert (tmp_path / "run").read_text() == "mine"


def test_an_output_folder_of_another_run_is_left_alone(tree, write_config, command, finished):
    before = listing(finished)
    tree |= {"output_dir": str(finished), "seed": 5}
    put(tree, "train.learning_rate", 1.0)
    put(tree, "data.sources.0.weight", 2.0)
    says = "holds a run with other values of data.sources.0.weight, seed, train.learning_rate"
    refused(command("train", "--config", write_config(tree)), says)
    assert listing(finished) == before


@pytest.mark.parametrize("text", ["", "a: [", "- 1\n", "\x00"])
def test_an_output_folder_whose_record_is_damaged_is_named(tree, write_config, command, tmp_path, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(text)
    refused(command("train", "--config", write_config(tree)), "config.yaml is damaged")
    assert (tmp_path / "run" / "config.yaml").read_text() == text


# ---- evaluate


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--batch-size", "0"], ["--batch-size 0"]),
        (["--batch-size", "0", "--batches", "-1", "--held-out", "2"], ["--batch-size", "--batches", "--held-out"]),
        (["--separator", ""], ["--separator is empty"]),
        (["--sequence-length", "65"], ["--sequence-length 65: should be from 2 to the model's context of 64"]),
        (["--text", "no/such/place"], ["--text: no/such/place: no such file"]),
        (["--held-out", "1e-12"], ["no held-out document"]),
    ],
    ids=str,
)
def test_evaluate_refuses_bad_arguments(command, finished, corpus, arguments, says):
    text = [] if "--text" in arguments else ["--text", corpus]
    refused(command("evaluate", "--model", finished / "model", *text, *arguments), *says)
