"""Train one config on several meshes of 8 simulated devices; print losses and where the optimizer's state lies."""

import json
import sys
from pathlib import Path

import jax
import optax
import yaml

from mtp_jax.config_file import validate
from mtp_jax.training import run


def main():
    tree = yaml.safe_load(Path(sys.argv[1]).read_text())
    out, found = tree["output_dir"], {}
    seen = {}
    original = run.Checkpoints.save

    def save(self, state, batches, best=None):
        seen["state"] = jax.tree.map(lambda x: (x.shape, x.sharding.shard_shape(x.shape)), state)
        seen["sharding"] = jax.tree.map(lambda x: x.sharding, state)
        original(self, state, batches, best)

    run.Checkpoints.save = save
    for mesh in json.loads(sys.argv[2]):
        name = "x".join(map(str, mesh))
        tree |= {"output_dir": f"{out}-{name}", "mesh": dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))}
        run.train(validate(tree, name))
        lines = [json.loads(line) for line in (Path(tree["output_dir"]) / "metrics.jsonl").read_text().splitlines()]
        state = seen["sharding"]
        moments = [optax.tree.get(state.optimizer, moment) for moment in ("mu", "nu")]
        weights = jax.tree.leaves(state.trained)
        found[name] = {
            "losses": [line["loss"] for line in lines if "loss" in line],
            "held_out": [line["held_out_loss"] for line in lines if "held_out_loss" in line],
            "moments_like_weights": all(weights == jax.tree.leaves(moment) for moment in moments),
            "sharded": sum(not sharding.is_fully_replicated for sharding in weights),
            "weights": len(weights),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
