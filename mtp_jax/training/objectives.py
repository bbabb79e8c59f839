"""What a step minimises, from a config: the objectives `next_token` and `multi_token`."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mtp_jax.config import Config
from mtp_jax.data.batches import Batch, anchors_of, noise_of
from mtp_jax.errors import UserError
from mtp_jax.model.attention import Scores
from mtp_jax.model.chunks import sum_over_chunks
from mtp_jax.model.decoder import Decoder
from mtp_jax.model.geometry import Geometry
from mtp_jax.model.kernels import PLATFORMS, misfit
from mtp_jax.model.mask_kernel import tiling
from mtp_jax.model.weights import projections
from mtp_jax.mtp.adapter import AdapterShape
from mtp_jax.mtp.losses import LossTerms, MultiTokenLoss
from mtp_jax.mtp.vocabulary import cross_entropy_sums, rows_at_a_time
from mtp_jax.training.step import Metrics

# Bytes of mask rows that each device may keep for the backward pass; more blocks than that are computed in chunks.
_KEPT_BYTES = 1 << 30


def make_objective(config: Config, g: Geometry, mesh: jax.sharding.Mesh) -> "NextToken | MultiTokenLoss":
    """The objective of a config; the losses of multi_token are those of docs/how-it-works.md, section 6.

    Raises:
        UserError: an attention kernel that does not run here.
    """
    m, t = config.model, config.train
    gated = config.lora is not None and config.lora.gated
    decoder = make_decoder(g, jnp.dtype(m.compute_dtype), t.sequence_length, mesh, m.attention, m.remat, gated)
    if config.objective == "next_token":
        return NextToken(decoder, t.loss_chunk)
    assert config.mtp is not None
    terms = LossTerms(
        target=config.mtp.target,
        base_weight=config.mtp.weights.base,
        sampler_weight=config.mtp.weights.sampler,
        lcm_weight=config.mtp.weights.lcm,
        sampler_on_real=config.mtp.sampler_on_real,
        offset_weights=config.mtp.offset_weights,
        decay=config.mtp.decay,
        kl_warmup_steps=config.mtp.kl_warmup_steps,
        grow_steps=config.mtp.grow_steps,
    )
    chunk = anchor_chunk(config, g, mesh)
    return MultiTokenLoss(decoder, adapter_shape(config, g), terms, t.loss_chunk, anchor_chunk=chunk)


def make_decoder(
    g: Geometry,
    dtype: DTypeLike,
    length: int,
    mesh: jax.sharding.Mesh,
    attention: str = "auto",
    remat: str = "none",
    gated: bool = False,
) -> Decoder:
    """The model with the attention kernel asked for, or with the one that suits the platform.

    Args:
        length: T, rows of a sequence.
        gated: real rows do not depend on what is trained, so mask rows may use a kernel too.
    Raises:
        UserError: a kernel that this platform lacks, or that cannot take such sequences.
    """
    platform = mesh.devices.flat[0].platform
    kernel = "xla"
    for name, platforms in PLATFORMS.items():
        reason = misfit(name, length, g.H, dtype, Scores.of(g))
        if platform not in platforms:
            reason = f"is a kernel for {platforms[0]}, not for {platform}"
        if attention == name and reason:
            raise UserError(f"model.attention={name} {reason}; leave it at auto.")
        if attention in ("auto", name) and not reason:
            kernel = name
    fused = gated and attention != "xla" and g.score_cap is None
    tiles = tiling(platform, length, g.H) if fused else None
    return Decoder(g, dtype, remat, attention=kernel, mask_tiles=tiles)


def adapter_shape(config: Config, g: Geometry) -> AdapterShape:
    """What a config's adapter for a model consists of.

    Raises:
        UserError: `lora.targets` that the model lacks.
    """
    assert config.lora is not None and config.mtp is not None
    lora, mtp, there = config.lora, config.mtp, projections(g)
    if missing := [name for name in lora.targets or () if name not in there]:
        raise UserError(
            f"lora.targets: {', '.join(missing)} do not exist in this model, whose layers have a mixture of experts; "
            f"give any of {', '.join(there)}, or leave it out."
        )
    alpha = 2.0 * lora.rank if lora.alpha is None else lora.alpha
    return AdapterShape(
        mtp.masks,
        lora.rank,
        alpha,
        tuple(lora.targets or there),
        mtp.sampler,
        lora.gated,
        mtp.vocabulary,
        noise_of(config, g.V),
    )


def anchor_chunk(config: Config, g: Geometry, mesh: jax.sharding.Mesh) -> int | None:
    """Blocks of a sequence to compute at a time: the config's number, or as many as fit in the memory kept for them."""
    anchors = anchors_of(config, g.V)
    assert config.mtp is not None and config.lora is not None and anchors is not None
    if config.train.anchor_chunk is not None or not config.lora.gated:
        return config.train.anchor_chunk
    mlp = g.F * (g.experts.chosen if g.experts else 1)
    G = anchors.count or config.train.sequence_length
    products = 3 * g.D + (g.N + 2 * g.K) * g.H + 3 * mlp
    width = {"full": g.D, "dots": products, "none": 2 * products}[config.model.remat]  # kept of a row in a layer
    sequences = -(-config.train.batch_size // config.train.accumulation // (mesh.shape["data"] * mesh.shape["fsdp"]))
    per_block = sequences * config.mtp.masks * width * g.L * jnp.dtype(config.model.compute_dtype).itemsize
    chunks = -(-G // max(1, _KEPT_BYTES // per_block))
    return None if chunks == 1 else -(-G // chunks)


@dataclass(frozen=True)
class NextToken:
    """Mean cross-entropy of the next token over supervised rows; trains all base weights, nothing is frozen."""

    model: Decoder
    loss_chunk: int

    def totals(self, batch: Batch) -> Float[Array, ""]:
        """Number of supervised rows."""
        return jnp.maximum(jnp.sum(batch["supervised"]), 1).astype(jnp.float32)

    def loss(
        self, trained: Any, frozen: Any, part: Batch, totals: Float[Array, ""], step: Any = None
    ) -> tuple[Array, Metrics]:
        """This part's share of the loss, in nats per token, and of `loss` and `accuracy`."""
        del frozen, step
        shares = {name: value / totals for name, value in self.sums(trained, part).items()}
        return shares["loss"], shares

    def sums(self, params: Any, batch: Batch) -> Metrics:
        """Cross-entropy and correct predictions, summed over the supervised rows."""
        variables = {"params": params}
        head = self.model.apply(variables, method="head").placed()
        latents, _ = self.model.apply(variables, batch["tokens"], batch["positions"], batch["segments"])

        def chunk(rows: tuple[Array, Array, Array]) -> Metrics:
            latents, labels, supervised = rows
            return cross_entropy_sums(head(latents, self.model.g), labels, supervised)

        rows = (latents, batch["labels"], batch["supervised"])
        return sum_over_chunks(chunk, rows, rows_at_a_time(self.loss_chunk, len(latents)))
