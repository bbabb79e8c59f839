"""Where arrays lie while a program runs: logical axes by the mesh and rules in force (`mtp_jax.training.sharding`)."""

import math

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array


def spec_of(*axes: str | None) -> PartitionSpec:
    """The mesh axes of logical axes; none of them outside of a mesh."""
    spec = nn.logical_to_mesh_axes(axes) if jax.sharding.get_abstract_mesh().shape else None
    return PartitionSpec(*[None] * len(axes)) if spec is None else spec


def parts_of(*axes: str) -> int:
    """Over how many devices logical axes are spread; 1 outside of a mesh."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    names = [name for entry in spec_of(*axes) if entry for name in ((entry,) if isinstance(entry, str) else entry)]
    return math.prod(sizes[name] for name in names)


def place(x: Array, *axes: str | None) -> Array:
    """`x`, spread by its logical axes; one that is None, or that the devices do not divide, is whole on each of them.

    Said of a weight just before it is used, this makes the compiler gather weights, and not move activations instead.
    """
    if jax.sharding.get_abstract_mesh().size <= 1:
        return x
    kept = [
        name if axis is not None and size % parts_of(axis) == 0 else None
        for name, axis, size in zip(spec_of(*axes), axes, x.shape, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*kept))
