"""Where arrays lie: the device mesh, the one table from logical axes to mesh axes, and placement within a program."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import numpy as np
import optax
from flax.traverse_util import unflatten_dict
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

from mtp_jax.config import Mesh as MeshConfig
from mtp_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
RULES = (
    ("batch", ("data", "fsdp")),
    ("rows", None),
    ("layers", None),
    ("embed", "fsdp"),
    ("rank", "fsdp"),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("experts", "fsdp"),
)


@runtime_checkable
class Placed(Protocol):
    """A row of a weight table, as far as its placement goes."""

    @property
    def path(self) -> tuple[str, ...]: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def axes(self) -> tuple[str | None, ...]: ...


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh a config asks for, of all devices that are there or of those given.

    Raises:
        UserError: sizes that do not multiply to the number of devices.
    """
    sizes, count = [config.data, config.fsdp, config.tensor], len(devices or jax.devices())
    if -1 in sizes:
        rest = -sizes[0] * sizes[1] * sizes[2]
        sizes[sizes.index(-1)] = count // rest
    if sizes[0] * sizes[1] * sizes[2] != count:
        asked = f"data={config.data}, fsdp={config.fsdp}, tensor={config.tensor}"
        raise UserError(f"mesh: {asked} does not multiply to the {count} devices here; change one, or set it to -1.")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


@contextlib.contextmanager
def on(mesh: jax.sharding.Mesh) -> Iterator[None]:
    """Within: the model's logical axis names mean axes of this mesh."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def sharding_of(mesh: jax.sharding.Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of logical axes; one that its mesh axes do not divide is replicated."""

    def parts(names: str | tuple[str, ...] | None) -> int:
        return math.prod(mesh.shape[name] for name in ((names,) if isinstance(names, str) else names or ()))

    spec = nn.logical_to_mesh_axes(axes, RULES)
    kept = [names if size % parts(names) == 0 else None for names, size in zip(spec, shape, strict=True)]
    return NamedSharding(mesh, PartitionSpec(*kept))


def weight_sharding(mesh: jax.sharding.Mesh, weight: Placed) -> NamedSharding:
    """The sharding of one row of the weight table."""
    return sharding_of(mesh, weight.axes, weight.shape)


def table_sharding(mesh: jax.sharding.Mesh, table: Sequence[Placed]) -> dict[str, Any]:
    """The sharding of every weight of a table."""
    return unflatten_dict({weight.path: weight_sharding(mesh, weight) for weight in table})


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Sequences are spread over the data and fsdp axes."""
    return NamedSharding(mesh, nn.logical_to_mesh_axes(("batch", "rows"), RULES))


def sequences_here(spread: NamedSharding, batch_size: int) -> list[int]:
    """The sequences of a batch that devices of this process compute, in order."""
    indices = spread.addressable_devices_indices_map((batch_size, 1)).values()
    return sorted({row for index in indices if index for row in range(*index[0].indices(batch_size))})


def put(value: Any, sharding: NamedSharding) -> jax.Array:
    """An array that every process holds whole, of which each device gets its part."""
    value = np.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def optimizer_sharding(mesh: jax.sharding.Mesh, tx: optax.GradientTransformation, trained: Any, shardings: Any) -> Any:
    """Optimizer state is placed like the weights it belongs to; the rest is replicated.

    Left to itself jit would replicate the state on every device.
    """
    state = jax.eval_shape(tx.init, trained)
    return optax.tree.map_params(
        tx, lambda _, sharding: sharding, state, shardings, transform_non_params=lambda _: replicated(mesh)
    )


# ---- within a program


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

    Applied to a weight just before its use, this makes the compiler gather the weight instead of moving activations.
    """
    if jax.sharding.get_abstract_mesh().size <= 1:
        return x
    kept = [
        name if axis is not None and size % parts_of(axis) == 0 else None
        for name, axis, size in zip(spec_of(*axes), axes, x.shape, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*kept))
