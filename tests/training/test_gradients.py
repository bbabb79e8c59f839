"""Every mesh, of one process or two, computes the gradients of one device (the bars of data and training at scale)."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from conftest import environment, free_port
from orbax.checkpoint import PyTreeCheckpointer, RestoreArgs

SCRIPT = Path(__file__).with_name("gradients.py")
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
STEPS = 5
BOUND = 1e-5


def run(config, meshes, devices, processes=1):
    """Run the script in so many processes of so many devices."""
    together = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": str(processes)}
    started = [
        subprocess.Popen(
            [sys.executable, SCRIPT, config, json.dumps(meshes)],
            env=environment(devices, **together, JAX_PROCESS_ID=str(i)),
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    for process in started:
        err = process.communicate(timeout=500)[1]
        assert process.returncode == 0, err


def gradients(folder):
    """The gradient of each step, leaf by leaf."""
    found = []
    for step in range(1, STEPS + 1):
        state = (folder / "checkpoints" / str(step) / "state").absolute()
        reader = PyTreeCheckpointer()  # into host memory: this process has not the devices that saved it
        held = reader.metadata(state).item_metadata.tree
        saved = reader.restore(state, restore_args=jax.tree.map(lambda _: RestoreArgs(restore_type=np.ndarray), held))
        flat, _ = jax.tree.flatten_with_path(saved["optimizer"][0])
        found.append({jax.tree_util.keystr(path): np.asarray(leaf, np.float64) for path, leaf in flat})
    return found


def worst(ours, theirs):
    """The largest ||dg||/||g|| over steps and leaves."""
    assert all(a.keys() == b.keys() and len(a) > 5 for a, b in zip(ours, theirs, strict=True))
    errors = [
        np.linalg.norm(a[leaf] - b[leaf]) / np.linalg.norm(b[leaf])
        for a, b in zip(ours, theirs, strict=True)
        for leaf in a
        if a[leaf].any() or b[leaf].any()  # A of a fresh LoRA has none: B is zero
    ]
    return np.max(errors)  # not a number where one is none


@pytest.fixture(scope="module", params=["next_token", "multi_token"])
def reference(request, make_tree, llama_config, finished, tmp_path_factory):
    """A config of five SGD steps, and the gradients of one device."""
    folder = tmp_path_factory.mktemp(request.param)
    tree = make_tree(folder)
    llama = tree["model"]["scratch"]["config"]
    llama |= {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 304}
    tree["train"] |= {"batch_size": 8, "steps": STEPS, "warmup_steps": 0, "learning_rate": 0.1}
    tree |= {"evaluation": {}, "checkpoints": {"every": 1, "keep": STEPS}}
    if request.param == "multi_token":
        base = copy.deepcopy(tree) | {"output_dir": str(folder / "base")}
        (folder / "base.yaml").write_text(yaml.safe_dump(base))
        run(folder / "base.yaml", [(1, 1, 1)], 1)
        tree["model"] = {"path": str(folder / "base" / "1x1x1" / "model"), "save_dtype": "float32"}
        tree |= {"objective": "multi_token", "lora": {"rank": 8}, "mtp": {"masks": 3}}
        tree["train"]["anchors"] = 8
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    run(config, [(1, 1, 1)], 1)
    return config, gradients(folder / "1x1x1")


@pytest.mark.slow
def test_meshes_of_eight_devices(reference, record_property):
    config, theirs = reference
    run(config, MESHES, 8)
    for mesh in MESHES:
        error = worst(gradients(config.parent / "x".join(map(str, mesh))), theirs)
        print(f"{theirs[0].keys().__len__()} leaves, mesh {mesh}: {error:.1e}")
        assert error <= BOUND, mesh


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(2, 2, 1), (1, 2, 2)], ids=str)
def test_two_processes_of_two_devices(reference, mesh):
    config, theirs = reference
    run(config, [mesh], 2, processes=2)
    folder = config.parent / "x".join(map(str, mesh))
    error = worst(gradients(folder), theirs)
    print(f"2 processes, mesh {mesh}: {error:.1e}")
    assert error <= BOUND
    assert (folder / "adapter" / "adapter.safetensors").exists() or (folder / "model" / "model.safetensors").exists()
