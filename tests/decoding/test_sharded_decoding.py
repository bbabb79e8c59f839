"""A model spread over devices writes what it writes on one."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from conftest import environment

from mtp_jax.model.base import open_base
from mtp_jax.model.weights import PROJECTIONS
from mtp_jax.mtp.adapter import AdapterShape, init_adapter
from mtp_jax.mtp.adapter_folder import write_adapter

PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13, 14]]


def test_fsdp_and_tensor_axes_change_no_token(small_folder, tmp_path):
    opened = open_base(str(small_folder))
    g, table = opened.g, opened.load(jnp.dtype("float32"))["embed"]["embedding"]
    shape = AdapterShape(2, 4, 8.0, PROJECTIONS, "residual")
    adapter = init_adapter(g, shape, table, jax.random.key(0))
    draw = np.random.default_rng(1)
    adapter = jax.tree.map(lambda x: x + 0.1 * draw.standard_normal(x.shape).astype(np.float32), adapter)
    base = {"name": "small", "fingerprint": opened.fingerprint}
    write_adapter(tmp_path / "adapter", g, shape, adapter, base, {}, jnp.dtype("float32"))
    outcome = subprocess.run(
        [
            sys.executable,
            Path(__file__).with_name("sharded_decode.py"),
            small_folder,
            tmp_path / "adapter",
            json.dumps(PROMPTS),
        ],
        env=environment(4),
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr
    found = json.loads(outcome.stdout.splitlines()[-1])
    for plan in ("quadratic:2", "sampled"):
        assert found[f"many {plan}"] == found[f"one {plan}"], plan
    assert found["one sharded"] == 0 and found["many sharded"] > 0.5
    tokens = [tokens for tokens, _ in found["one none"]]
    assert [tokens for tokens, _ in found["many quadratic:2"]] == tokens
    assert found["many draft:2"] == [[text, 4] for text in tokens]  # 3 tokens a step, the first one by prefill
