"""Decode on a mesh of 4 simulated devices and on one of them; print both outputs and how much is sharded."""

import json
import sys

import jax

from mtp_jax import sharding
from mtp_jax.config import Mesh
from mtp_jax.decoding.generator import Generator, Sampling
from mtp_jax.decoding.plan import parse_plan


def main():
    model, adapter, prompts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    found = {}
    for name in ("one", "many"):
        mesh = sharding.make_mesh(Mesh(data=1, fsdp=2, tensor=2)) if name == "many" else None
        generator = Generator.load(model, "float32", adapter, mesh=mesh)
        generator.stops = ()
        for plan in ("none", "quadratic:2") if name == "one" else ("quadratic:2",):
            generator.plan = parse_plan(plan)
            done = generator.complete(prompts, 12, len(prompts))
            found[f"{name} {plan}"] = [(d.token_ids, d.steps) for d in done]
        done = generator.complete(prompts, 12, len(prompts), Sampling(seed=5))
        found[f"{name} sampled"] = [(d.token_ids, d.steps) for d in done]
        weights = jax.tree.leaves(generator.variables["params"])
        found[f"{name} sharded"] = sum(not leaf.sharding.is_fully_replicated for leaf in weights) / len(weights)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
