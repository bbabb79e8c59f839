"""A run on 8 devices computes what one device computes, however the mesh divides them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import environment, read_lines

MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]


def divisible(tree):
    """A config whose widths, heads and batch divide by 8."""
    tree["model"]["scratch"]["config"] |= {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 304}
    tree["train"] |= {"batch_size": 8, "steps": 3}
    tree["evaluation"] = {"every": 3}
    return tree


@pytest.fixture(scope="module")
def runs(make_tree, tmp_path_factory):
    """What on_meshes.py found on every mesh, and the losses of one device."""
    import yaml

    from mtp_jax.config_file import validate
    from mtp_jax.training.run import train

    folder = tmp_path_factory.mktemp("meshes")
    tree = divisible(make_tree(folder / "one"))
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    ended = subprocess.run(
        [sys.executable, Path(__file__).with_name("on_meshes.py"), folder / "config.yaml", json.dumps(MESHES)],
        env=environment(8),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    train(validate(tree, "tree"))
    lines = read_lines(folder / "one" / "metrics.jsonl")
    one = [[line[name] for line in lines if name in line] for name in ("loss", "held_out_loss")]
    return json.loads(ended.stdout.splitlines()[-1]), *one


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_losses_are_those_of_one_device(runs, mesh):
    found, losses, held_out = runs
    ours = found["x".join(map(str, mesh))]
    assert len(losses) == 3 and len(set(losses)) == 3
    np.testing.assert_allclose(ours["losses"], losses, rtol=1e-5)
    np.testing.assert_allclose(ours["held_out"], held_out, rtol=1e-5)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_the_optimizer_lies_where_the_weights_lie(runs, mesh):
    ours = runs[0]["x".join(map(str, mesh))]
    assert ours["moments_like_weights"]
    assert (ours["sharded"] > 0) == (mesh != (8, 1, 1))
    if mesh != (8, 1, 1):
        assert ours["sharded"] >= 9  # all matrices
