"""`python gradients.py CONFIG [MESHES]`: train by plain SGD, every step's gradient in the checkpoint of that step.

MESHES is a JSON list of lists data, fsdp, tensor: one run on each, in a folder of that name.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
import yaml

from mtp_jax.runs import processes
from mtp_jax.training import program


class Kept(NamedTuple):
    """The gradient of the step before."""

    gradient: Any


def keep_gradient():
    return optax.GradientTransformation(
        lambda params: Kept(jax.tree.map(jax.numpy.zeros_like, params)),
        lambda updates, state, params=None: (updates, Kept(updates)),
    )


def main():
    program.make_optimizer = lambda train, _: optax.chain(keep_gradient(), optax.sgd(train.learning_rate))
    with processes.together():
        from mtp_jax.config_file import validate
        from mtp_jax.training.run import train

        tree = yaml.safe_load(Path(sys.argv[1]).read_text())
        out = tree["output_dir"]
        for mesh in json.loads(sys.argv[2]):
            sizes = dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))
            train(validate(tree | {"output_dir": f"{out}/{'x'.join(map(str, mesh))}", "mesh": sizes}, "tree"))


if __name__ == "__main__":
    main()
