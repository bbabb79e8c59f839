"""All losses of the method, as returned values (method.md, section 4)."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mtp_jax.model.attention import Keys
from mtp_jax.model.decoder import Decoder
from mtp_jax.model.weights import Params
from mtp_jax.mtp.adapter import AdapterShape, with_adapter
from mtp_jax.mtp.blocks import Targets, blocks_of, targets_of
from mtp_jax.mtp.sampler import sample_latent
from mtp_jax.mtp.vocabulary import cross_entropy, divergence, over_chunks, sum_over_chunks

Sums = dict[str, Array]


@dataclass(frozen=True)
class LossTerms:
    """Which terms there are, and against what. The paper: hard data labels, sampler on real rows, all weights 1."""

    target: str = "base_soft"  # "data", "base_hard", "base_soft", "total_variation"
    base_weight: float = 1.0
    sampler_weight: float = 1.0
    lcm_weight: float = 1.0
    sampler_on_real: bool = False
    offset_weights: str = "flat"  # "flat", "decay", "expected_length"
    decay: float = 0.8  # weight of offset j is decay^(j-1)
    kl_warmup_steps: int = 0  # of total variation, which is unstable from scratch


@dataclass(frozen=True)
class MultiTokenLoss:
    """The two-stream forward and every loss term of a batch."""

    model: Decoder
    shape: AdapterShape
    terms: LossTerms
    loss_chunk: int  # rows whose logits exist at a time
    attention_chunk: int  # blocks whose attention scores exist at a time

    def totals(self, batch: Any) -> Sums:
        """What sums over a whole batch are divided by."""
        targets = self._targets(batch)[1]
        counted = self._counted(targets)
        labelled_real = jnp.sum(batch["supervised"])
        totals = {
            "mask_rows": jnp.sum(counted * self._static_weights()),
            "offsets": jnp.sum(targets.exists, axis=(0, 1)),
            "lcm": jnp.sum(targets.share),  # the shares of one position add up to 1
            "real_rows": labelled_real,
            "all_rows": labelled_real + jnp.sum(counted * self._static_weights()),
        }
        return {name: value.astype(jnp.float32) for name, value in totals.items()}

    def loss(
        self, trained: Params, frozen: Params, part: Any, totals: Sums, step: Int[Array, ""]
    ) -> tuple[Float[Array, ""], Sums]:
        """This part's share of the total loss, and of every term and agreement."""
        return self.values(self.sums(trained, frozen, part, step), totals)

    def values(self, sums: Sums, totals: Sums) -> tuple[Float[Array, ""], Sums]:
        """The total loss and every figure, from sums and totals."""
        totals = {name: jnp.maximum(value, 1) for name, value in totals.items()}
        t, real, masks = self.terms, totals["real_rows"], totals["mask_rows"]
        values = {
            "base_loss": sums["base"] / masks,
            "real_loss": sums["real"] / real,  # constant under the gate: logged, not in the total
            "real_accuracy": sums["real_right"] / real,
            "agreement_base": sums["agree_base"] / totals["offsets"],
        }
        base = values["base_loss"]
        if not self.shape.gated:  # standard LoRA moves real rows too, so they are in the mean, as in the paper
            base = (sums["base"] + sums["real"]) / totals["all_rows"]
        total = t.base_weight * base
        if self.shape.sampler != "none":
            sampler = sums["sampler"] / masks
            if t.sampler_on_real:  # the paper's mean runs over real and mask rows alike
                sampler = (sums["sampler"] + sums["sampler_real"]) / totals["all_rows"]
                values["sampler_real_loss"] = sums["sampler_real"] / real
            values["sampler_loss"] = sums["sampler"] / masks
            values["agreement"] = sums["agree_sampler"] / totals["offsets"]
            total = total + t.sampler_weight * sampler
        if t.lcm_weight:
            values["lcm_loss"] = sums["lcm"] / totals["lcm"]
            total = total + t.lcm_weight * values["lcm_loss"]
        return total, {"loss": total, **values}

    def latents(self, trained: Params, frozen: Params, batch: Any) -> tuple[Array, Array]:
        """Latents of real rows [B, T, D] and of mask rows [B, G, M, D]."""
        variables = with_adapter(frozen["params"], trained, self.shape)
        tokens, positions, segments = batch["tokens"], batch["positions"], batch["segments"]
        adapted = not self.shape.gated
        z_real, kept = self.model.apply(variables, tokens, positions, segments, adapted=adapted, keep=True)
        blocks = blocks_of(batch["anchors"], positions, segments)
        keys = Keys(positions, segments)
        z = self.model.apply(
            variables, trained["mtp"]["masks"], blocks, keys, kept, self.attention_chunk, method="masks"
        )
        return z_real, z

    def sums(self, trained: Params, frozen: Params, batch: Any, step: Int[Array, ""]) -> Sums:
        """Every term summed over the rows it runs over."""
        z_real, z = self.latents(trained, frozen, batch)
        variables = {"params": frozen["params"]}
        sampler, t = trained["mtp"].get("sampler"), self.terms

        def logits(latents: Array) -> Array:
            return self.model.apply(variables, latents, method="logits")

        def sampled(previous: Array, latents: Array) -> Array:
            embedding = self.model.apply(variables, previous, method="embeddings")
            return logits(sample_latent(sampler, self.shape.sampler, embedding, latents))

        def real(rows: Any) -> tuple[Sums, Array]:
            latents, tokens, labels, counted = rows
            scores = logits(latents)
            choice = jnp.argmax(scores, axis=-1)
            sums = {
                "real": jnp.sum(cross_entropy(scores, labels) * counted),
                "real_right": jnp.sum((choice == labels) & counted).astype(jnp.float32),
            }
            if t.sampler_on_real and sampler is not None:
                sums["sampler_real"] = jnp.sum(cross_entropy(sampled(tokens, latents), labels) * counted)
            return sums, choice

        rows = (z_real, batch["tokens"], batch["labels"], batch["supervised"])
        real_sums, choice = over_chunks(real, rows, self.loss_chunk)

        # Targets taken from the base model are constants, also where standard LoRA moves the real rows.
        fixed = jax.lax.stop_gradient(z_real)
        _, targets = self._targets(batch)

        def masks(rows: tuple[Array, Targets]) -> Sums:
            latents, of = rows
            flat = of.row.reshape(len(of.row), -1)
            same = jnp.take_along_axis(fixed, flat[..., None], axis=1).reshape(latents.shape)
            chosen = jnp.take_along_axis(choice, flat, axis=1).reshape(of.row.shape)
            base = logits(same) if t.target in ("base_soft", "total_variation") else None
            counted = self._counted(of) * self._static_weights()

            def term(scores: Array) -> tuple[Array, Array]:
                loss, acceptance = self._row_loss(scores, of, chosen, base, step)
                weights = counted
                if t.offset_weights == "expected_length":
                    # How likely the chain reaches this offset: what it adds to the expected accepted length.
                    reached = jnp.cumprod(jax.lax.stop_gradient(acceptance) * of.exists, axis=-1)
                    weights = counted * jnp.roll(reached, 1, axis=-1).at[..., 0].set(1.0)
                # The draft is the base model's choice where nothing scores higher: cheaper than an argmax on CPU.
                right = jnp.take_along_axis(scores, chosen[..., None], axis=-1)[..., 0] >= jnp.max(scores, axis=-1)
                agree = jnp.sum(right & of.exists, axis=(0, 1)).astype(jnp.float32)
                return jnp.sum(loss * weights), agree

            sums: Sums = {}
            sums["base"], sums["agree_base"] = term(logits(latents))
            if sampler is not None:
                sums["sampler"], sums["agree_sampler"] = term(sampled(of.previous, latents))
            if t.lcm_weight:
                gap = (same - latents).astype(jnp.float32)
                sums["lcm"] = jnp.sum(jnp.mean(gap * gap, axis=-1) * of.share)
            return sums

        return real_sums | sum_over_chunks(masks, (z, targets), max(1, self.loss_chunk // self.shape.masks))

    def _row_loss(
        self, scores: Array, of: Targets, chosen: Array, base: Array | None, step: Array
    ) -> tuple[Float[Array, "B c M"], Float[Array, "B c M"]]:
        """Loss of each mask row, and how likely its draft would be accepted."""
        if base is None:
            loss = cross_entropy(scores, of.label if self.terms.target == "data" else chosen)
            return loss, jnp.exp(-loss)
        loss = divergence(self.terms.target, base, scores)
        accepted = 1 - (loss if self.terms.target == "total_variation" else divergence("total_variation", base, scores))
        if self.terms.target == "total_variation" and self.terms.kl_warmup_steps:
            loss = jnp.where(step < self.terms.kl_warmup_steps, divergence("base_soft", base, scores), loss)
        return loss, accepted

    def _targets(self, batch: Any) -> tuple[Any, Targets]:
        blocks = blocks_of(batch["anchors"], batch["positions"], batch["segments"])
        fields = (batch["tokens"], batch["labels"], batch["supervised"], batch["segments"])
        return blocks, targets_of(blocks, self.shape.masks, *fields)

    def _counted(self, of: Targets) -> Array:
        return of.labelled if self.terms.target == "data" else of.exists

    def _static_weights(self) -> Float[Array, " M"]:
        decay = self.terms.decay if self.terms.offset_weights == "decay" else 1.0
        return decay ** jnp.arange(self.shape.masks)
