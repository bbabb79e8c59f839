"""What a run computes, from a config and a geometry alone: shapes, shardings and the jitted step, but no array.

A run executes it; `mtp_jax.preflight` compiles it, also for devices that are not there.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from mtp_jax import sharding
from mtp_jax.config import Config
from mtp_jax.data.batches import Anchors, anchors_of
from mtp_jax.errors import UserError
from mtp_jax.model.decoder import Decoder
from mtp_jax.model.geometry import Geometry
from mtp_jax.model.kernels import PLATFORMS, misfit
from mtp_jax.model.weights import Params, Weight, abstract_params, weight_table
from mtp_jax.mtp.adapter import AdapterShape, adapter_table
from mtp_jax.mtp.losses import LossTerms, MultiTokenLoss
from mtp_jax.training.next_token import NextToken
from mtp_jax.training.optimizer import learning_rate, make_optimizer
from mtp_jax.training.step import Objective, TrainState, make_train_step

# What may be kept of mask rows for the backward pass, on each device; more blocks are computed in chunks.
_KEPT_BYTES = 1 << 30


class Program(NamedTuple):
    """A training step and all it takes. Leaves are shapes with dtype and sharding."""

    mesh: jax.sharding.Mesh
    objective: Objective
    table: tuple[Weight, ...]  # every trained array: gradient, optimizer state and checkpoint exist for these alone
    anchors: Anchors | None  # blocks of masks in a batch; none where the objective is the next token
    state: TrainState
    frozen: Params | None  # the base beside which is trained
    batch: dict[str, Any]
    tx: Any
    step: Any  # jitted: (state, frozen, batch) -> (state, metrics), the state donated

    @property
    def placed(self) -> TrainState:
        """The shardings of the state."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.state)


def build_program(config: Config, g: Geometry, mesh: jax.sharding.Mesh) -> Program:
    """The program of a config on a mesh, whose devices need not be attached; call within `sharding.on(mesh)`."""
    objective: Objective
    anchors, frozen = None, None
    if config.objective == "next_token":
        objective, table = NextToken(make_decoder(g, config, mesh), config.train.loss_chunk), weight_table(g)
    else:
        objective, anchors = multi_token_loss(config, g, mesh), anchors_of(config)
        table = adapter_table(g, objective.shape)
        # Frozen weights are kept as they are computed with: nothing is added to them that would need more.
        frozen = {"params": abstract_params(g, jnp.dtype(config.model.compute_dtype))}
        frozen = abstract(frozen, {"params": sharding.table_sharding(mesh, weight_table(g))})
    tx = make_optimizer(config.train, unflatten_dict({weight.path: weight.decays for weight in table}))
    weights, trained = sharding.table_sharding(mesh, table), shapes_of(table)
    placed = TrainState(sharding.replicated(mesh), weights, sharding.optimizer_sharding(mesh, tx, trained, weights))
    shapes = TrainState(jax.ShapeDtypeStruct((), jnp.int32), trained, jax.eval_shape(tx.init, trained))
    step = jax.jit(
        make_train_step(objective, tx, learning_rate(config.train), config.train.accumulation, weights),
        donate_argnums=0,
        out_shardings=(placed, sharding.replicated(mesh)),
    )
    batch = batch_shapes(config, mesh, anchors)
    return Program(mesh, objective, table, anchors, abstract(shapes, placed), frozen, batch, tx, step)


def make_decoder(g: Geometry, config: Config, mesh: jax.sharding.Mesh) -> Decoder:
    """The model as the config wants it computed.

    Raises:
        UserError: a kernel that this platform has not, or that does not take the config's sequences.
    """
    dtype, asked = jnp.dtype(config.model.compute_dtype), config.model.attention
    platform = mesh.devices.flat[0].platform
    kernel = "xla"
    for name, platforms in PLATFORMS.items():
        reason = misfit(name, config.train.sequence_length, g.H, dtype)
        if platform not in platforms:
            reason = f"is a kernel for {platforms[0]}, not for {platform}"
        if asked == name and reason:
            raise UserError(f"model.attention={name} {reason}; leave it at auto.")
        if asked in ("auto", name) and not reason:
            kernel = name
    return Decoder(g, dtype, config.model.remat, attention=kernel)


def multi_token_loss(config: Config, g: Geometry, mesh: jax.sharding.Mesh) -> MultiTokenLoss:
    """The objective multi_token."""
    assert config.mtp is not None
    m, shape = config.mtp, adapter_shape(config)
    terms = LossTerms(
        target=m.target,
        base_weight=m.weights.base,
        sampler_weight=m.weights.sampler,
        lcm_weight=m.weights.lcm,
        sampler_on_real=m.sampler_on_real,
        offset_weights=m.offset_weights,
        decay=m.decay,
        kl_warmup_steps=m.kl_warmup_steps,
    )
    chunk = anchor_chunk(config, g, mesh)
    return MultiTokenLoss(make_decoder(g, config, mesh), shape, terms, config.train.loss_chunk, anchor_chunk=chunk)


def anchor_chunk(config: Config, g: Geometry, mesh: jax.sharding.Mesh) -> int | None:
    """Blocks of a sequence that are computed at a time: the config's, or so many that what is kept of them fits."""
    assert config.mtp is not None and config.lora is not None
    G = anchors_of(config).count or config.train.sequence_length
    if config.train.anchor_chunk is not None or not config.lora.gated:
        return config.train.anchor_chunk
    products = 3 * g.D + (g.N + 2 * g.K) * g.H + 3 * g.F
    width = {"full": g.D, "dots": products, "none": 2 * products}[config.model.remat]  # kept of a row in a layer
    sequences = -(-config.train.batch_size // config.train.accumulation // (mesh.shape["data"] * mesh.shape["fsdp"]))
    per_block = sequences * config.mtp.masks * width * g.L * jnp.dtype(config.model.compute_dtype).itemsize
    chunks = -(-G // max(1, _KEPT_BYTES // per_block))
    return None if chunks == 1 else -(-G // chunks)


def adapter_shape(config: Config) -> AdapterShape:
    """What a config's adapter consists of."""
    assert config.lora is not None and config.mtp is not None
    lora = config.lora
    alpha = 2.0 * lora.rank if lora.alpha is None else lora.alpha
    return AdapterShape(config.mtp.masks, lora.rank, alpha, tuple(lora.targets), config.mtp.sampler, lora.gated)


def batch_shapes(config: Config, mesh: jax.sharding.Mesh, anchors: Anchors | None) -> dict[str, Any]:
    """What of a batch goes to the devices (`data.batches.Batch`)."""
    B, T = config.train.batch_size, config.train.sequence_length
    spread = sharding.batch_sharding(mesh)

    def rows(width: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((B, width), dtype, sharding=spread)

    batch = {name: rows(T, jnp.int32) for name in ("tokens", "labels", "positions", "segments")}
    batch["supervised"] = rows(T, jnp.bool_)
    if anchors is not None:
        batch["anchors"] = rows(anchors.count or T, jnp.int32)
    return batch


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
    """Shapes and dtypes of a tree with the shardings it shall have."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
