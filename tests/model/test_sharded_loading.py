"""Loading onto eight simulated devices gives every device its own part of the same values."""

import json
import subprocess
import sys

import pytest
from conftest import environment

PROGRAM = """
import json, sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import Mesh
from mtp_jax.model.base import open_base
from mtp_jax.model.decoder import Decoder
from mtp_jax.model.weights import leaf_at, weight_table
from mtp_jax.sharding import make_mesh, on, weight_sharding

folder = Path(sys.argv[1])
base = open_base(str(folder))
g = base.g
mesh = make_mesh(Mesh(data=2, fsdp=2, tensor=2))
plain = base.load()
sharded = base.load(shardings=lambda weight: weight_sharding(mesh, weight))
tokens = np.random.default_rng(0).integers(0, g.V, (4, 24))
positions = np.broadcast_to(np.arange(24), tokens.shape)
model = Decoder(g)

@jax.jit
def run(params):
    latents, _ = model.apply({"params": params}, tokens, positions)
    return model.apply({"params": params}, latents, method="logits")

shapes, unlike = {}, []
for weight in weight_table(g):
    leaf, whole = leaf_at(sharded, weight.path), np.asarray(leaf_at(plain, weight.path))
    name = ".".join(weight.path)
    shapes[name] = sorted({shard.data.shape for shard in leaf.addressable_shards})
    if leaf.sharding != weight_sharding(mesh, weight):
        unlike.append(name)
    for shard in leaf.addressable_shards:  # replicas too
        if np.asarray(shard.data).tobytes() != whole[shard.index].tobytes():
            unlike.append(name)
with jax.default_matmul_precision("highest"):
    expected = run(plain)
    with on(mesh):
        logits = run(sharded)
print(json.dumps({
    "devices": jax.device_count(), "shapes": shapes, "unlike": unlike,
    "largest": float(jnp.abs(expected).max()), "off": float(np.abs(np.asarray(logits) - np.asarray(expected)).max()),
}))
"""


@pytest.fixture(scope="module")
def outcome(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    # 90 tokens, 6 heads and 2 key/value heads divide by 2; a vocabulary of 90 is not a power of two.
    models.make(
        "qwen3", vocab_size=90, num_attention_heads=6, attention_bias=True, num_hidden_layers=2
    ).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)], capture_output=True, text=True, env=environment(8), timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_shard_holds_its_part_of_the_unsharded_value(outcome):
    assert outcome["devices"] == 8
    assert outcome["unlike"] == []


def test_logits_agree(outcome):
    assert outcome["largest"] > 1
    assert outcome["off"] < 1e-5


def test_each_shard_has_the_shape_that_the_rules_give(outcome):
    D, F, V, heads, kv, H = 32, 48, 90, 6, 2, 16
    shapes = {
        "embed.embedding": (V // 2, D // 2),
        "unembed.embedding": (V // 2, D // 2),
        "norm.scale": (D,),
        "layers.attention_norm.scale": (2, D),
        "layers.mlp_norm.scale": (2, D),
        "layers.q_norm.scale": (2, H),
        "layers.k_norm.scale": (2, H),
        "layers.q.kernel": (2, D // 2, heads * H // 2),
        "layers.k.kernel": (2, D // 2, kv * H // 2),
        "layers.v.kernel": (2, D // 2, kv * H // 2),
        "layers.o.kernel": (2, heads * H // 2, D // 2),
        "layers.q.bias": (2, heads * H // 2),
        "layers.k.bias": (2, kv * H // 2),
        "layers.v.bias": (2, kv * H // 2),
        "layers.o.bias": (2, D // 2),
        "layers.gate.kernel": (2, D // 2, F // 2),
        "layers.up.kernel": (2, D // 2, F // 2),
        "layers.down.kernel": (2, F // 2, D // 2),
    }
    assert {name: [tuple(s) for s in found] for name, found in outcome["shapes"].items()} == {
        name: [shape] for name, shape in shapes.items()
    }
