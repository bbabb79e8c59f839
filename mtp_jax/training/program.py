"""A run's computation, from a config and a geometry alone: shapes, shardings and the jitted step, but no array.

`mtp_jax.training.run` executes it; `mtp_jax.preflight` compiles it, also for devices that are not here.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from mtp_jax import sharding
from mtp_jax.config import Config
from mtp_jax.data.batches import Batch, anchors_of, noise_of
from mtp_jax.errors import UserError
from mtp_jax.model.geometry import Geometry
from mtp_jax.model.weights import Params, Weight, abstract_params, weight_table
from mtp_jax.mtp.adapter import adapter_table
from mtp_jax.mtp.blocks import Anchors
from mtp_jax.mtp.losses import MultiTokenLoss
from mtp_jax.training.flops import model_flops
from mtp_jax.training.objectives import NextToken, make_objective
from mtp_jax.training.step import TrainState, learning_rate, make_optimizer, make_train_step


class Program(NamedTuple):
    """A training step and everything it takes. Leaves are shapes with dtype and sharding."""

    mesh: jax.sharding.Mesh
    objective: NextToken | MultiTokenLoss
    table: tuple[Weight, ...]  # every trained array: gradient, optimizer state and checkpoint exist for these alone
    anchors: Anchors | None  # blocks of masks in a batch; None where the objective is the next token
    state: TrainState
    frozen: Params | None  # the base that the adapter is trained beside, and its draft vocabulary
    batch: dict[str, Any]
    tx: Any
    steps: Callable[[NextToken | MultiTokenLoss], Any]  # of an objective, jitted: see `step`

    @property
    def step(self) -> Any:
        """Jitted (state, frozen, batch) -> (state, metrics), the state donated; blocks have all their masks."""
        return self.steps(self.objective)

    def step_at(self, step: int) -> Any:
        """The same for a step, counted from 0, while blocks grow: one program for each of their lengths."""
        if isinstance(self.objective, NextToken):
            return self.step
        return self.steps(self.objective.at(step))

    def flops_at(self, step: int) -> float:
        """Arithmetic of a step, counted from 0, by its definition (`training/flops.py`)."""
        B, T = self.batch["tokens"].shape
        if isinstance(self.objective, NextToken):
            return model_flops(self.objective, B, T)
        return model_flops(self.objective.at(step), B, T, self.batch["anchors"].shape[1])

    @property
    def placed(self) -> TrainState:
        """The shardings of the state."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.state)

    def place(self, batch: Batch) -> dict[str, jax.Array]:
        """A batch on the devices, from the sequences that each process feeds."""
        arrays: dict[str, Any] = {**batch}
        return {
            name: jax.make_array_from_process_local_data(shape.sharding, np.asarray(arrays[name]), shape.shape)
            for name, shape in self.batch.items()
        }


def build_program(config: Config, g: Geometry, mesh: jax.sharding.Mesh) -> Program:
    """The program of a config on a mesh, whose devices need not be attached; call within `sharding.on(mesh)`."""
    objective, anchors, frozen = make_objective(config, g, mesh), anchors_of(config, g.V), None
    if isinstance(objective, NextToken):
        table = weight_table(g)
    else:
        table = adapter_table(g, objective.shape)
        # Frozen weights are held in the dtype they are computed in: nothing is added to them that would need more.
        frozen = {"params": abstract_params(g, jnp.dtype(config.model.compute_dtype))}
        frozen = abstract(frozen, {"params": sharding.table_sharding(mesh, weight_table(g))})
        if objective.shape.vocabulary is not None:
            ids = jax.ShapeDtypeStruct((objective.shape.vocabulary,), jnp.int32, sharding=sharding.replicated(mesh))
            frozen |= {"vocabulary": ids}
    tx = make_optimizer(config.train, unflatten_dict({weight.path: weight.decays for weight in table}))
    weights, trained = sharding.table_sharding(mesh, table), shapes_of(table)
    everywhere: Any = sharding.replicated(mesh)
    count: Any = jax.ShapeDtypeStruct((), jnp.int32)
    placed = TrainState(everywhere, weights, sharding.optimizer_sharding(mesh, tx, trained, weights))
    shapes = TrainState(count, trained, jax.eval_shape(tx.init, trained))

    @functools.cache
    def steps(objective: NextToken | MultiTokenLoss) -> Any:
        step = make_train_step(objective, tx, learning_rate(config.train), config.train.accumulation, weights)
        return jax.jit(step, donate_argnums=0, out_shardings=(placed, everywhere))

    batch = batch_shapes(config, mesh, anchors)
    return Program(mesh, objective, table, anchors, abstract(shapes, placed), frozen, batch, tx, steps)


def batch_shapes(config: Config, mesh: jax.sharding.Mesh, anchors: Anchors | None) -> dict[str, Any]:
    """The arrays of a batch (`data.batches.Batch`) that go to the devices."""
    B, T = config.train.batch_size, config.train.sequence_length
    spread = sharding.batch_sharding(mesh)

    def array(width: int, dtype: Any, *more: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((B, width, *more), dtype, sharding=spread)

    batch = {name: array(T, jnp.int32) for name in ("tokens", "labels", "positions", "segments")}
    batch["supervised"] = array(T, jnp.bool_)
    if anchors is not None:
        batch["anchors"] = array(anchors.count or T, jnp.int32)
        if anchors.noise is not None:
            batch["noise"] = array(anchors.count or T, jnp.int32, anchors.masks)
    return batch


def check_length(config: Config, g: Geometry) -> None:
    """Raise UserError where sequences are longer than the model's context."""
    if config.train.sequence_length > g.max_positions:
        raise UserError(
            f"train.sequence_length={config.train.sequence_length} is longer than the model's context of "
            f"{g.max_positions}."
        )


def check_vocabulary(config: Config, V: int, stops: Sequence[int] = ()) -> None:
    """Raise UserError where the draft vocabulary or the noise is larger than the model's, or misses its stop ids."""
    noise = noise_of(config, V)
    if noise is not None and not noise.low < noise.high <= V:
        raise UserError(
            f"mtp.noise: ids from {noise.low} to below {noise.high} should be some of the model's {V}, 0 to {V - 1}."
        )
    wanted, least = None if config.mtp is None else config.mtp.vocabulary, len(set(stops))
    if wanted is not None and not least <= wanted <= V:
        raise UserError(
            f"mtp.vocabulary={wanted} should be at most {V}, the model's tokens, and at least {max(least, 1)}, to hold "
            "its stop ids; null drafts any token."
        )


def check_divides(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Raise UserError where a part of the batch cannot be spread over the mesh."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    part = config.train.batch_size // config.train.accumulation
    if part % ways:
        raise UserError(
            f"train.batch_size / train.accumulation = {part} sequences do not divide over data x fsdp = {ways} devices."
        )


def shapes_of(table: tuple[Weight, ...]) -> Params:
    """Shapes of a table's float32 arrays."""
    return unflatten_dict({weight.path: jax.ShapeDtypeStruct(weight.shape, jnp.float32) for weight in table})


def abstract(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes of a tree, with the shardings it is to have."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
