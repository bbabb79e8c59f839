"""The export command: what it writes, that it comes back, and what it refuses."""

import inspect
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import listing
from exported import export, noisy_adapter
from safetensors import safe_open
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from mtp_jax import storage
from mtp_jax.errors import UserError
from mtp_jax.exporting import base_files
from mtp_jax.exporting import folder as exporting_folder
from mtp_jax.exporting.source import find_source
from mtp_jax.files import read_json
from mtp_jax.model import folder_writer
from mtp_jax.model.base import open_base
from mtp_jax.model.folder import INDEX, stored_tensors
from mtp_jax.mtp.adapter_folder import CONFIG, TENSORS, open_adapter


@pytest.fixture(scope="module")
def adapter(small_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("noisy") / "adapter"
    noisy_adapter(small_folder, folder)
    return folder


def test_copy_holds_everything(command, adapter, small_folder, tmp_path):
    done = command("export", "--adapter", adapter, "--out", tmp_path / "out")
    assert (done.code, done.out) == (0, f"exported: {tmp_path / 'out'}\n"), done
    found, base = listing(tmp_path / "out"), listing(small_folder)
    assert base.items() <= found.items()
    added = set(found) - set(base)
    assert added == {
        "README.md",
        CONFIG,
        TENSORS,
        "custom_generate",
        "custom_generate/generate.py",
        "custom_generate/requirements.txt",
    }
    assert found[TENSORS] == (adapter / TENSORS).read_bytes()


def test_reference_points_to_the_base(command, adapter, small_folder, tmp_path):
    done = command("export", "--adapter", adapter, "--out", tmp_path / "out", "--base", "reference")
    assert done.code == 0, done
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["README.md", TENSORS, "custom_generate", CONFIG]
    assert read_json(out / CONFIG)["base"]["name"] == str(small_folder)
    assert "no base weights" in (out / "README.md").read_text()


def test_the_revision_of_a_base_from_the_hub_is_kept(adapter, small_folder, tmp_path, monkeypatch):
    """A base that lies where the hub's library puts it is known by its commit, and asked for by it again."""
    from mtp_jax.exporting import source

    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "snapshots" / commit
    snapshot.parent.mkdir()
    snapshot.symlink_to(small_folder)
    asked = []

    def find_folder(name, revision=None):
        asked.append((name, revision))
        return snapshot

    config = read_json(adapter / CONFIG)
    config["base"]["name"] = "org/small"
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(config))
    (tmp_path / "adapter" / TENSORS).write_bytes((adapter / TENSORS).read_bytes())
    monkeypatch.setattr(source, "find_folder", find_folder)
    export(tmp_path / "adapter", tmp_path / "out", base="reference")
    assert read_json(tmp_path / "out" / CONFIG)["base"]["revision"] == commit
    card = (tmp_path / "out" / "README.md").read_text()
    assert f'from_pretrained("org/small", revision="{commit}")' in card and "base_model: org/small" in card
    export(tmp_path / "out", tmp_path / "again", base="reference")
    assert asked == [("org/small", None), ("org/small", commit)]
    assert listing(tmp_path / "again") == listing(tmp_path / "out")


@pytest.mark.parametrize("base", ["copy", "reference"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_export_import_export_is_byte_identical(adapter, small_folder, tmp_path, base, dtype):
    first = export(adapter, tmp_path / "first", base=base, dtype=dtype and np.dtype(dtype_of(dtype)), peft=True)
    second = export(first, tmp_path / "second", base=base, peft=True)
    assert listing(second) == listing(first)
    opened = open_base(str(small_folder))
    before, after = (open_adapter(str(folder), opened) for folder in (first, second))
    assert before.shape == after.shape and before.digest == after.digest
    assert all(np.array_equal(a, b) for a, b in zip(leaves(before.arrays), leaves(after.arrays), strict=True))


def dtype_of(name):
    import jax.numpy as jnp

    return jnp.dtype(name)


def leaves(tree):
    import jax

    return jax.tree.leaves(tree)


def test_generate_and_train_take_an_exported_folder_as_adapter(
    command, adapter, small_folder, tree, write_config, tmp_path
):
    out = export(adapter, tmp_path / "out")
    options = ["--prompt", "the cat", "--max-new-tokens", 8, "--plan", "quadratic:1", "--json"]
    own = command("generate", "--model", small_folder, "--adapter", adapter, *options)
    there = command("generate", "--model", out, "--adapter", out, *options)
    assert there.code == 0, there
    assert json.loads(there.out)["token_ids"] == json.loads(own.out)["token_ids"]
    assert json.loads(there.out)["steps"] == json.loads(own.out)["steps"]
    tree |= {"objective": "multi_token", "lora": {"rank": 4}, "mtp": {"masks": 3}}
    tree["model"] = {"path": str(small_folder), "save_dtype": "float32"}
    tree["train"] |= {"steps": 1, "anchors": 4, "learning_rate": 1e-12, "warmup_steps": 0}
    del tree["evaluation"]
    done = command("train", "--config", write_config(tree), "--adapter", out)
    assert done.code == 0, done
    trained, before = load_file(tmp_path / "run" / "adapter" / TENSORS), load_file(adapter / TENSORS)
    assert all(np.allclose(trained[key], before[key], atol=1e-9) for key in before)


# ---- buckets


def test_an_export_into_a_bucket_is_the_one_on_disk_and_an_adapter_from_there(command, bucket, adapter, tmp_path):
    assert command("export", "--adapter", adapter, "--out", tmp_path / "out").code == 0
    storage.write("gs://b/out/stale", b"")
    refused = command("export", "--adapter", adapter, "--out", "gs://b/out")
    assert refused.code == 2 and "gs://b/out: exists and is not empty" in refused.errors[0]
    done = command("export", "--adapter", adapter, "--out", "gs://b/out", "--overwrite")
    assert (done.code, done.out) == (0, "exported: gs://b/out\n"), done
    expected = {name: content for name, content in listing(tmp_path / "out").items() if content is not None}
    assert {name.removeprefix("out/"): bucket.content("b", name) for name in bucket.names("b")} == expected
    objects = bucket.buckets["b"].objects
    assert max(objects, key=lambda name: objects[name][1]) == f"out/{CONFIG}"

    again = command("export", "--adapter", "gs://b/out", "--out", "gs://b/out", "--overwrite")
    assert again.code == 2 and "which the export is made from" in again.errors[0]
    ended = command(
        *("generate", "--model", "gs://b/out", "--adapter", "gs://b/out", "--prompt", "the", "--max-new-tokens", 4),
        *("--plan", "quadratic:1", "--dtype", "float32"),
    )
    assert ended.code == 0, ended


def test_a_run_in_a_bucket_is_exported(command, bucket, finished, tmp_path):
    storage.upload(finished, ["config.yaml", "checkpoints/12/manifest.json"], "gs://b/run")
    early = command("export", "--run", "gs://b/run", "--out", tmp_path / "out")
    assert (
        early.code == 2
        and "gs://b/run: has no finished model or adapter; its newest checkpoint is of step 12" in (early.errors[0])
    )
    storage.replace(finished / "model", "gs://b/run/model", "config.json")
    done = command("export", "--run", "gs://b/run/", "--out", tmp_path / "out")
    assert done.code == 0 and listing(finished / "model").items() <= listing(tmp_path / "out").items(), done


# ---- a run's own model, PEFT, dtype


def test_a_run_of_next_token_exports_as_an_ordinary_model(command, finished, tmp_path, monkeypatch):
    done = command("export", "--run", finished, "--out", tmp_path / "out")
    assert done.code == 0, done
    model = listing(finished / "model")
    assert model.items() <= listing(tmp_path / "out").items()
    assert set(listing(tmp_path / "out")) - set(model) == {"README.md"}

    monkeypatch.setattr(inspect.unwrap(folder_writer.write_tensors), "__defaults__", (40_000,))
    assert command("export", "--run", finished, "--out", tmp_path / "half", "--dtype", "bfloat16").code == 0
    assert len(set(read_json(tmp_path / "half" / INDEX)["weight_map"].values())) > 1
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "half", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == torch.bfloat16
    reference = AutoModelForCausalLM.from_pretrained(finished / "model", dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), reference.parameters(), strict=True))
    options = ("--peft", "--base", "reference", "--overwrite")
    refused = command("export", "--run", finished, "--out", tmp_path / "out", *options)
    assert refused.code == 2 and "trained a whole model" in refused.errors[0]


def test_several_files_without_an_index_get_one(small_folder, tmp_path):
    from safetensors.numpy import save_file

    tensors = load_file(small_folder / "model.safetensors")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_bytes((small_folder / "config.json").read_bytes())
    for name, part in (("a", list(tensors)[::2]), ("b", list(tensors)[1::2])):
        save_file({k: tensors[k] for k in part}, tmp_path / "base" / f"{name}.safetensors", {"format": "pt"})
    (tmp_path / "out").mkdir()
    base_files.copy_companions(tmp_path / "base", tmp_path / "out")
    base_files.copy_weights(open_base(str(tmp_path / "base")), tmp_path / "out")
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    reference = AutoModelForCausalLM.from_pretrained(small_folder)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), reference.parameters(), strict=True))


def test_dtype_is_the_adapters_and_never_the_copied_bases(command, adapter, small_folder, tmp_path):
    assert command("export", "--adapter", adapter, "--out", tmp_path / "out", "--dtype", "bfloat16").code == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (small_folder / "model.safetensors").read_bytes()
    wide, narrow = load_file(adapter / TENSORS), load_file(tmp_path / "out" / TENSORS)
    assert all(np.array_equal(narrow[key], wide[key].astype(dtype_of("bfloat16"))) for key in wide)


def test_peft_only_when_asked_for_and_with_a_warning(command, adapter, small_folder, tmp_path):
    done = command("export", "--adapter", adapter, "--out", tmp_path / "out", "--peft")
    assert done.code == 0 and done.err.startswith("warning: PEFT has no gate")
    folder = tmp_path / "out" / "peft"
    with safe_open(folder / "adapter_model.safetensors", "numpy") as tensors:
        assert "has no gate" in tensors.metadata()["warning"]
        held = {key: torch.from_numpy(tensors.get_tensor(key)) for key in tensors.keys()}  # noqa: SIM118
    assert "has no gate" in (folder / "README.md").read_text()
    assert "has no gate" in (tmp_path / "out" / "README.md").read_text()
    config = read_json(folder / "adapter_config.json")

    # Applied as PEFT applies it, the base computes what rows that meet the LoRA compute in ours.
    model = AutoModelForCausalLM.from_pretrained(small_folder)
    used = set()
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.split(".")[-1] in config["target_modules"]:
                pair = [f"base_model.model.{name}.lora_{kind}.weight" for kind in "AB"]
                a, b = (held[key] for key in pair)
                module.weight += config["lora_alpha"] / config["r"] * b @ a
                used.update(pair)
        assert used == set(held)
        tokens = torch.arange(5, 17)[None]
        theirs = model(tokens).logits.numpy()
    assert np.allclose(theirs, adapted_logits(small_folder, adapter, tokens.numpy()), atol=1e-3, rtol=1e-3)


def adapted_logits(base, adapter, tokens):
    import jax
    import jax.numpy as jnp

    from mtp_jax.model.decoder import Decoder
    from mtp_jax.mtp.adapter import with_adapter

    opened = open_base(str(base))
    found = open_adapter(str(adapter), opened)
    variables, model = with_adapter(opened.load(), found.arrays, found.shape), Decoder(opened.g)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    with jax.default_matmul_precision("highest"):
        latents, _ = model.apply(variables, jnp.asarray(tokens), positions, adapted=True)
        return np.asarray(model.apply(variables, latents, method="logits"))


# ---- whole or absent


def test_an_existing_folder_is_replaced_only_when_told(command, adapter, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    done = command("export", "--adapter", adapter, "--out", out)
    assert done.code == 2 and "is not empty" in done.errors[0]
    assert listing(tmp_path) == {"out": None, "out/mine.txt": b"mine"}
    assert command("export", "--adapter", adapter, "--out", out, "--overwrite").code == 0
    assert not (out / "mine.txt").exists() and (out / CONFIG).is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    (tmp_path / "empty").mkdir()
    assert command("export", "--adapter", adapter, "--out", tmp_path / "empty").code == 0
    done = command("export", "--adapter", out, "--out", out, "--overwrite")
    assert done.code == 2 and "made from" in done.errors[0]
    assert (out / CONFIG).is_file()


def test_a_failure_leaves_the_old_folder_and_nothing_else(command, adapter, tmp_path, monkeypatch):
    assert command("export", "--adapter", adapter, "--out", tmp_path / "out").code == 0
    before = listing(tmp_path)

    def full(*_):
        raise OSError(28, os.strerror(28), "card")

    monkeypatch.setattr(exporting_folder, "model_card", full)
    done = command("export", "--adapter", adapter, "--out", tmp_path / "out", "--overwrite")
    assert done.code == 2 and len(done.errors) == 1 and "the disk is full" in done.errors[0]
    assert listing(tmp_path) == before


def test_a_kill_leaves_no_folder_that_looks_complete(adapter, tmp_path):
    script = (
        "import os, signal, sys, mtp_jax.exporting.folder as f, mtp_jax.export as e\n"
        "f.model_card = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"sys.argv = ['export', '--adapter', {str(adapter)!r}, '--out', {str(tmp_path / 'out')!r}]\n"
        "e.main()\n"
    )
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".out.part"]
    export(adapter, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---- bad input


def test_bad_input_is_one_line_and_writes_nothing(
    command, adapter, small_folder, finished, stories, tmp_path, monkeypatch
):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    unfinished = tmp_path / "unfinished"
    (unfinished / "checkpoints" / "7").mkdir(parents=True)
    (unfinished / "config.yaml").write_text("objective: multi_token\n")
    file = tmp_path / "file"
    file.write_text("")
    prompts = tmp_path / "bad.jsonl"
    prompts.write_text("{}\n")
    before, out = listing(tmp_path), tmp_path / "out"
    cases = [
        (["--run", unfinished], "its newest checkpoint is of step 7"),
        (["--run", tmp_path], "this is no run's output folder"),
        (["--adapter", adapter, "--model", stories], "the base model is stories260k (fingerprint"),
        (["--adapter", tmp_path / "gone"], "no such folder"),
        (["--adapter", small_folder], f"{CONFIG} is missing"),
        (["--adapter", adapter, "--out", file], "is a file"),
        (["--adapter", adapter, "--out", small_folder], "is not empty"),
        (["--adapter", adapter, "--out", small_folder, "--overwrite"], "which the export is made from"),
        (["--adapter", adapter, "--out", file / "below"], "cannot be written"),
        (["--adapter", adapter, "--push-to-hub", "me/mine"], "no token for the Hugging Face hub"),
        (["--adapter", adapter, "--push-to-hub", "a/b/c"], "--push-to-hub a/b/c"),
        (["--adapter", adapter, "--push-to-hub", "mine"], "needs an owner"),
        (["--adapter", adapter, "--prompts", prompts], "line 1"),
        (["--adapter", "bundled:stdlib-5m", "--base", "reference"], "give --base copy"),
    ]
    for options, says in cases:
        done = command("export", *(options if "--out" in options else [*options, "--out", out]))
        assert done.code == 2 and len(done.errors) == 1 and says in done.errors[0], (options, done)
        assert listing(tmp_path) == before, options


def test_a_base_that_has_moved_is_named(adapter, tmp_path):
    config = read_json(adapter / CONFIG)
    config["base"]["name"] = str(tmp_path / "moved")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(config))
    (tmp_path / "adapter" / TENSORS).write_bytes((adapter / TENSORS).read_bytes())
    with pytest.raises(UserError, match=r"moved.* name its folder with --model"):
        find_source(None, str(tmp_path / "adapter"), None)


def test_fingerprints_of_both_bases_are_said(adapter, stories):
    with pytest.raises(UserError) as refused:
        find_source(None, str(adapter), str(stories))
    assert str(refused.value).count("(fingerprint") == 2


@pytest.mark.slow
def test_memory_is_bounded_by_a_shard(tmp_path):
    """2 GB of random weights, as they are and converted: at most 1.5 times the largest file above the floor."""
    script = Path(__file__).parents[2] / "benchmarks" / "export_memory.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_full_disk(adapter, start, finish, tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        ended = finish(start("export", "--adapter", adapter, "--out", folder / "out"))
        assert ended.code == 2 and len(ended.errors) == 1 and "the disk is full" in ended.errors[0], ended
        assert list(folder.iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_the_card_gives_measured_figures_by_domain(command, tmp_path):
    for name in ("math", "code"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "def main():"}\n')
    from mtp_jax.exporting import measure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "PLANS", ("quadratic:1", "quadratic:9"))
        patch.setattr(measure, "NEW_TOKENS", 8)
        files = [tmp_path / "math.jsonl", tmp_path / "code.jsonl"]
        out = tmp_path / "out"
        done = command("export", "--adapter", "bundled:stdlib-5m", "--out", out, "--prompts", *files)
    assert done.code == 0, done
    measured = read_json(out / CONFIG)["measured"]
    assert set(measured["tokens_per_step"]) == {"math", "code"}
    assert set(measured["tokens_per_step"]["math"]) == {"quadratic:1"}  # the adapter has eight masks
    card = (out / "README.md").read_text()
    assert f"| math | 1 | {measured['tokens_per_step']['math']['quadratic:1']:.2f} |" in card
    assert stored_tensors(out)
