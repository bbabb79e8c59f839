"""Decode on a mesh of 4 simulated devices and on one of them; print both outputs and how much is sharded."""

import json
import sys

import jax

import mtp_jax
from mtp_jax import sharding
from mtp_jax.api import with_draft_model
from mtp_jax.config import Mesh
from mtp_jax.decoding.options import Sampling
from mtp_jax.decoding.plan import parse_plan
from mtp_jax.model.base import open_base


def main():
    model, adapter, prompts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    found = {}
    for name in ("one", "many"):
        mesh = sharding.make_mesh(Mesh(data=1, fsdp=2, tensor=2)) if name == "many" else None
        generator = mtp_jax.load(model, adapter=adapter, dtype="float32", mesh=mesh)
        generator.stops = ()
        for plan in ("none", "quadratic:2") if name == "one" else ("quadratic:2",):
            generator = generator.using(plan=parse_plan(plan))
            generator.stops = ()
            done = generator.complete(prompts, 12, len(prompts))
            found[f"{name} {plan}"] = [(d.token_ids, d.steps) for d in done]
        done = generator.complete(prompts, 12, len(prompts), Sampling(seed=5))
        found[f"{name} sampled"] = [(d.token_ids, d.steps) for d in done]
        if name == "many":  # the model drafts for itself
            drafted = with_draft_model(generator, open_base(model), 2)
            drafted.stops = ()
            found["many draft:2"] = [(d.token_ids, d.steps) for d in drafted.complete(prompts, 12, len(prompts))]
        weights = [
            leaf
            for path, leaf in jax.tree.leaves_with_path(generator.variables)
            if path[0].key != "mtp" and getattr(path[-1], "key", "") not in ("a", "b") and leaf.ndim == 2
        ]
        found[f"{name} sharded"] = sum(not leaf.sharding.is_fully_replicated for leaf in weights) / len(weights)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
