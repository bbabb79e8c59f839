"""Train each config on meshes of 8 simulated devices, decode with its adapter on the last; print losses and tokens."""

import json
import sys
from pathlib import Path

import yaml

import mtp_jax
from mtp_jax import sharding
from mtp_jax.config import Mesh
from mtp_jax.config_file import validate
from mtp_jax.decoding.plan import parse_plan
from mtp_jax.training.run import train

NAMES = ("data", "fsdp", "tensor")


def main():
    meshes, prompts, found = json.loads(sys.argv[1]), json.loads(sys.argv[2]), {}
    for config in map(Path, sys.argv[3:]):
        losses = {}
        for mesh in meshes:
            tree = yaml.safe_load(config.read_text())
            tree |= {"output_dir": f"{config.parent}/{'x'.join(map(str, mesh))}"}
            tree |= {"mesh": dict(zip(NAMES, mesh, strict=True))}
            train(validate(tree, str(config)))
            lines = [json.loads(line) for line in (Path(tree["output_dir"]) / "metrics.jsonl").read_text().splitlines()]
            losses["x".join(map(str, mesh))] = [line["loss"] for line in lines if "loss" in line]
        devices = sharding.make_mesh(Mesh(**dict(zip(NAMES, meshes[-1], strict=True))))
        adapter = str(config.parent / "run" / "adapter")
        generator = mtp_jax.load(
            tree["model"]["path"], adapter=adapter, plan=parse_plan("quadratic:2"), dtype="float32", mesh=devices
        )
        texts = [completion.token_ids for completion in generator.complete(prompts, 12, len(prompts))]
        found[config.parent.name] = {"losses": losses, "texts": texts}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
