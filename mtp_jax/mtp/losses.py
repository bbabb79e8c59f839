"""All losses of the method, as returned values (docs/how-it-works.md, section 6)."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Bool, Float, Int

from mtp_jax.model.attention import Blocks, LayerCache, RealRows
from mtp_jax.model.chunks import cut, over_chunks, sum_over_chunks
from mtp_jax.model.decoder import Decoder
from mtp_jax.model.head import Head
from mtp_jax.model.weights import Params, leaf_at
from mtp_jax.mtp.accumulation import accumulated
from mtp_jax.mtp.adapter import AdapterShape, adapter_table, sampler_of, with_adapter
from mtp_jax.mtp.blocks import Targets, blocks_of, targets_of
from mtp_jax.mtp.sampler import corrected_latent
from mtp_jax.mtp.vocabulary import cross_entropy, divergence, index_in, over_vocabulary, rows_at_a_time
from mtp_jax.sharding import place

_LONG_BLOCK = 4  # masks of a block that grows from 2, a shorter one from 1

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
    grow_steps: int = 0  # over which blocks grow to all masks


class Context(NamedTuple):
    """What mask rows see of the real rows, and are compared with."""

    keys: RealRows
    kept: LayerCache | None  # keys and values, stacked by layer
    latents: Float[Array, "B T D"]
    choice: Int[Array, "B T"]  # the base model's, of the next token, as a row of `head`; -1 where it has none
    head: Head  # over all tokens, or over the draft vocabulary
    vocabulary: Int[Array, " U"] | None  # None for all tokens


@dataclass(frozen=True)
class MultiTokenLoss:
    """The two-stream forward and every loss term of a batch.

    What is frozen are the base's `params` and the ascending ids of a draft vocabulary, `vocabulary`, if there is one.
    """

    model: Decoder
    shape: AdapterShape
    terms: LossTerms
    loss_chunk: int  # rows of each device whose logits exist at a time
    attention_chunk: int | None = None  # blocks whose attention scores exist at a time; None for as many as fit
    anchor_chunk: int | None = None  # blocks of a sequence that exist at a time; None for all; needs the gate
    covered: int | None = None  # the first masks of a block, which alone are computed; None for all

    def at(self, step: int) -> "MultiTokenLoss":
        """The loss of a step, counted from 0, whose blocks have grown to some length by then (section 6.3)."""
        M, N = self.shape.masks, self.terms.grow_steps
        first = min(M, 2 if M >= _LONG_BLOCK else 1)
        return replace(self, covered=first + step * (M - first) // N) if step < N else replace(self, covered=None)

    @property
    def masks_now(self) -> int:
        """The masks of a block that are computed."""
        return self.shape.masks if self.covered is None else self.covered

    def loss(
        self, trained: Params, frozen: Params, part: Any, totals: Sums, step: Int[Array, ""]
    ) -> tuple[Float[Array, ""], Sums]:
        """This part's share of the total loss, and of every term and agreement, and the mask rows it counts."""
        if self.anchor_chunk is None or self.anchor_chunk >= part["anchors"].shape[1]:
            loss, values = self.values(self.sums(trained, frozen, part, step), totals)
        else:
            loss, values = self._in_chunks(trained, frozen, part, totals, step)
        counted = self._counted(self._targets(part)[1])
        return loss, values | {"mask_rows": jnp.sum(counted, dtype=jnp.int32)}

    def sums(self, trained: Params, frozen: Params, batch: Any, step: Int[Array, ""]) -> Sums:
        """Every term summed over the rows it runs over."""
        context, sums = self.real(trained, frozen, batch)
        blocks, targets = self._targets(batch)
        return sums | self.masks(trained, frozen, context, blocks, targets, step)

    def real(self, trained: Params, frozen: Params, batch: Any) -> tuple[Context, Sums]:
        """What mask rows need to know of the real rows, and the terms summed over real rows."""
        t, base = self.terms, {"params": frozen["params"]}
        with jax.named_scope("real_rows"):
            z_real, kept = self.real_latents(trained, frozen, batch)
        # Gathered once for all chunks of rows.
        head = self.model.apply(base, method="head").placed()
        sampler = sampler_of(trained)

        @jax.named_scope("vocabulary")
        def over_rows(rows: Any) -> tuple[Sums, Array]:
            latents, tokens, labels, counted = rows
            scores = head(latents, self.model.g)
            choice = jnp.argmax(scores, axis=-1)
            sums = {
                "real": jnp.sum(cross_entropy(scores, labels) * counted),
                "real_right": jnp.sum((choice == labels) & counted).astype(jnp.float32),
            }
            if t.sampler_on_real and sampler is not None:
                corrected = self._corrected(sampler, frozen, tokens, latents)
                sums["sampler_real"] = jnp.sum(cross_entropy(head(corrected, self.model.g), labels) * counted)
            return sums, choice

        rows = (z_real, batch["tokens"], batch["labels"], batch["supervised"])
        sums, choice = over_chunks(over_rows, rows, rows_at_a_time(self.loss_chunk, len(z_real)))
        ids = None if self.shape.vocabulary is None else frozen["vocabulary"]
        if ids is not None:
            choice, head = index_in(ids, choice), head.of(ids).placed()
        # Targets taken from the base model are constants, also where standard LoRA moves the real rows.
        keys, constant = RealRows(batch["positions"], batch["segments"]), jax.lax.stop_gradient(z_real)
        return Context(keys, kept, constant, choice, head, ids), sums

    def real_latents(self, trained: Params, frozen: Params, batch: Any) -> tuple[Float[Array, "B T D"], Any]:
        """Latents of real rows, and the keys and values that mask rows see."""
        gated = self.shape.gated
        variables = {"params": frozen["params"]} if gated else with_adapter(frozen["params"], trained, self.shape)
        fields = batch["tokens"], batch["positions"], batch["segments"]
        return self.model.apply(variables, *fields, adapted=not gated, keep=True)

    def latents(
        self, trained: Params, frozen: Params, context: Context, blocks: Blocks, noise: Int[Array, "B G m"] | None
    ) -> Float[Array, "B G m D"]:
        """Latents of mask rows, which hold the masks' embeddings, or those of `noise`."""
        variables = with_adapter(frozen["params"], trained, self.shape)
        if noise is None:
            embeddings = trained["mtp"]["masks"][: self.masks_now]
        else:
            embeddings = self.model.apply({"params": frozen["params"]}, noise, method="embeddings")
        return self.model.apply(
            variables, embeddings, blocks, context.keys, context.kept, self.attention_chunk, method="masks"
        )

    def masks(
        self,
        trained: Params,
        frozen: Params,
        context: Context,
        blocks: Blocks,
        targets: Targets,
        step: Int[Array, ""],
    ) -> Sums:
        """The terms summed over the mask rows of blocks."""
        sampler, t = sampler_of(trained), self.terms
        with jax.named_scope("mask_rows"):
            z = self.latents(trained, frozen, context, blocks, targets.noise)
        choice, head, ids = context.choice, context.head, context.vocabulary
        if ids is not None:
            targets = targets._replace(label=index_in(ids, targets.label))

        @jax.named_scope("vocabulary")
        def over_blocks(rows: tuple[Array, Targets]) -> Sums:
            latents, of = rows
            flat = of.row.reshape(len(of.row), -1)
            real = jnp.take_along_axis(context.latents, flat[..., None], axis=1).reshape(latents.shape)
            chosen = jnp.take_along_axis(choice, flat, axis=1).reshape(of.row.shape)
            base = head(real, self.model.g) if t.target in ("base_soft", "total_variation") else None
            row_weights = self._counted(of) * self._static_weights()

            def judged(scores: Array, rest: Any) -> tuple[Array, tuple[Array, Array]]:
                of, chosen, base, step = rest
                loss, acceptance = self._row_loss(scores, of, chosen, base, step)
                # The draft is the base model's choice where nothing scores higher: cheaper than an argmax on CPU.
                right = jnp.take_along_axis(scores, chosen[..., None], axis=-1)[..., 0] >= jnp.max(scores, axis=-1)
                if ids is not None:
                    right &= chosen >= 0
                return loss, (acceptance, right)

            def term(latents: Array) -> tuple[Array, Array]:
                rest = (of, chosen, base, step)
                loss, (acceptance, right) = over_vocabulary(judged, latents, head, self.model.g, rest)
                weights = row_weights
                if t.offset_weights == "expected_length":
                    # How likely the chain reaches this offset: what it adds to the expected accepted length.
                    reached = jnp.cumprod(jax.lax.stop_gradient(acceptance) * of.exists, axis=-1)
                    weights = row_weights * jnp.roll(reached, 1, axis=-1).at[..., 0].set(1.0)
                agree = jnp.sum(right & of.exists, axis=(0, 1)).astype(jnp.float32)
                return jnp.sum(loss * weights), agree

            sums: Sums = {}
            if self._scores_base:
                sums["base"], sums["agree_base"] = term(latents)
            if sampler is not None:
                corrected = self._corrected(sampler, frozen, of.previous, latents)
                sums["sampler"], sums["agree_sampler"] = term(corrected)
            if t.lcm_weight:
                gap = (real - latents).astype(jnp.float32)
                sums["lcm"] = jnp.sum(jnp.mean(gap * gap, axis=-1) * of.share)
            return sums

        chunk = rows_at_a_time(max(1, self.loss_chunk // self.masks_now), len(z))
        return sum_over_chunks(over_blocks, (z, targets), chunk)

    def values(self, sums: dict[str, Any], totals: dict[str, Any]) -> tuple[Float[Array, ""], Sums]:
        """The total loss and every figure, from sums and totals; linear in the sums, which `_in_chunks` relies on.

        Both may also be NumPy's, added up on the host.
        """
        totals = {name: jnp.maximum(value, 1) for name, value in totals.items()}
        t, real, masks = self.terms, totals["real_rows"], totals["mask_rows"]
        values = {
            "real_loss": sums["real"] / real,  # constant under the gate: logged, not in the total
            "real_accuracy": sums["real_right"] / real,
        }
        total: Any = 0.0
        if self._scores_base:
            base = values["base_loss"] = sums["base"] / masks
            values["agreement_base"] = sums["agree_base"] / totals["offsets"]
            if not self.shape.gated:  # standard LoRA moves real rows too, so they are in the mean, as in the paper
                base = (sums["base"] + sums["real"]) / totals["all_rows"]
            total = total + t.base_weight * base
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

    def _in_chunks(
        self, trained: Params, frozen: Params, batch: Any, totals: Sums, step: Int[Array, ""]
    ) -> tuple[Float[Array, ""], Sums]:
        """The loss and every figure, from chunks of blocks: losses are sums over rows, so it is the same loss."""
        assert self.anchor_chunk is not None
        context, real_sums = self.real(trained, frozen, batch)
        chunks = cut(self._targets(batch), self.anchor_chunk)

        def share(trained: Params, rest: Any, chunk: Any) -> tuple[Float[Array, ""], Sums]:
            frozen, context, totals, step, nothing = rest
            blocks, targets = chunk
            sums = self.masks(trained, frozen, context, blocks, targets, step)
            return self.values(nothing | sums, totals)[0], sums

        blocks, targets = jax.tree.map(lambda x: x[0], chunks)
        shapes = jax.eval_shape(self.masks, trained, frozen, context, blocks, targets, step)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), {**real_sums, **shapes})
        rest = (frozen, context, totals, step, nothing)
        loss, sums = accumulated(share, self._placed, trained, jax.lax.stop_gradient(rest), chunks)
        loss = loss + self.values(nothing | real_sums, totals)[0]
        values = self.values(jax.lax.stop_gradient(real_sums | sums), totals)[1]
        return loss, values | {"loss": loss}

    def _placed(self, trained: Params) -> Params:
        """A tree like the trained one, placed alike."""
        table = adapter_table(self.model.g, self.shape)
        return unflatten_dict({w.path: place(leaf_at(trained, w.path), *w.axes) for w in table})

    def _corrected(self, sampler: Params, frozen: Params, previous: Array, latents: Array) -> Array:
        embedding = self.model.apply({"params": frozen["params"]}, previous, method="embeddings")
        return corrected_latent(sampler, self.shape.sampler, embedding, latents)

    def _row_loss(
        self, scores: Array, of: Targets, chosen: Array, base: Array | None, step: Array
    ) -> tuple[Float[Array, "B c M"], Float[Array, "B c M"]]:
        """Loss of each mask row, and how likely its draft would be accepted."""
        if base is None:
            label = of.label if self.terms.target == "data" else chosen
            loss = cross_entropy(scores, label)
            if self.shape.vocabulary is None:
                return loss, jnp.exp(-loss)
            # A label that is never drafted teaches nothing, and its draft is never accepted.
            return jnp.where(label < 0, 0.0, loss), jnp.where(label < 0, 0.0, jnp.exp(-loss))
        loss = divergence(self.terms.target, base, scores)
        accepted = 1 - (loss if self.terms.target == "total_variation" else divergence("total_variation", base, scores))
        if self.terms.target == "total_variation" and self.terms.kl_warmup_steps:
            loss = jnp.where(step < self.terms.kl_warmup_steps, divergence("base_soft", base, scores), loss)
        return loss, accepted

    @property
    def _scores_base(self) -> bool:
        """Whether mask rows meet the base head: its figures alone are not worth its products."""
        return bool(self.terms.base_weight) or self.shape.sampler == "none"

    def _targets(self, batch: Any) -> tuple[Blocks, Targets]:
        blocks = blocks_of(batch["anchors"], batch["positions"], batch["segments"])
        fields = (batch["tokens"], batch["labels"], batch["supervised"], batch["segments"])
        targets = targets_of(blocks, self.masks_now, *fields)
        if self.shape.noise is not None:
            targets = targets._replace(noise=batch["noise"][..., : self.masks_now])
        return blocks, targets

    def _counted(self, of: Targets) -> Bool[Array, "B G m"]:
        return of.labelled if self.terms.target == "data" else of.exists

    def _static_weights(self) -> Float[Array, " m"]:
        decay = self.terms.decay if self.terms.offset_weights == "decay" else 1.0
        return decay ** jnp.arange(self.masks_now)
