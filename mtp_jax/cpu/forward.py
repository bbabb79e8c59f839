"""The forward pass of a decoding step in C++ (`decoding.forward.Forward`)."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mtp_jax.cpu.native import PanelLayer, PanelLora, largest, layers, narrow, pack, times
from mtp_jax.decoding.forward import GROUPS, Variables, drafting_weights, lora_parts
from mtp_jax.model.attention import LayerCache
from mtp_jax.model.decoder import Cache, Decoder
from mtp_jax.model.head import Head
from mtp_jax.model.int8 import quantise
from mtp_jax.model.step_rows import MaskRows, step_rows
from mtp_jax.model.weights import Params
from mtp_jax.mtp.adapter import AdapterShape, with_adapter


@dataclass(frozen=True)
class CpuForward:
    """All layers of a step in one call, the base head and the shortlist; the rest is XLA's, where it is as fast."""

    model: Decoder
    shape: AdapterShape | None
    build: str
    rounds: bool = False  # rows that meet whole numbers, see `pack`

    def prepare(self, params: Params, adapter: Params | None) -> Variables:
        """`layers`, `norm`, the table `embed`, the base head by rows and in panels, and of an adapter `mtp`.

        Of an adapter with a draft vocabulary also its ids and, in panels too, the part of the base head that it needs.
        """
        g = self.model.g
        lora = None if adapter is None or self.shape is None else with_adapter({}, adapter, self.shape)["lora"]
        stored = params["unembed" if g.own_head else "embed"]
        head = Head(stored["embedding"], stored.get("embedding_scale"))
        embed = _gathered(params["embed"]["embedding"])
        # Beside the panels: drafting reads whole rows.
        unembed = head if g.int8 else Head(_gathered(head.table) if g.own_head else embed)
        variables: Variables = {
            "layers": [self._layer(params.pop(f"layer_{i}"), lora, i) for i in range(g.L)],
            "norm": params["norm"]["scale"],
            "embed": embed,
            "unembed": unembed,
            "head": pack(head.table.T, scale=head.scale, rounds=self.rounds),
        }
        if adapter is None:
            return variables
        if "vocabulary" in adapter:
            ids = variables["vocabulary"] = jnp.asarray(adapter["vocabulary"])
            some = head.of(ids)
            variables["draft_head"] = pack(some.table.T, scale=some.scale, rounds=self.rounds)
        return variables | {"mtp": drafting_weights(adapter, self.model.dtype)}

    def _layer(self, params: Params, lora: Params | None, layer: int) -> PanelLayer:
        norms = ("attention_norm", "mlp_norm", *(("q_norm", "k_norm") if self.model.g.qk_norm else ()))
        kernels, biases, loras = [], [], []
        for names in GROUPS.values():
            parts = [params.pop(name) for name in names]
            scale = jnp.concatenate([part["kernel_scale"] for part in parts]) if self.model.g.int8 else None
            kernels.append(pack(*(part["kernel"] for part in parts), scale=scale, rounds=self.rounds))
            biases.append(jnp.concatenate([part["bias"] for part in parts]) if "bias" in parts[0] else None)
            adapted = lora is not None and any(name in lora["layers"] for name in names)
            loras.append(self._lora(*lora_parts(self.model, lora, names, layer)) if adapted and lora else None)
        return PanelLayer(tuple(params[name]["scale"] for name in norms), tuple(kernels), tuple(biases), tuple(loras))

    def _lora(self, a: list[Array], b: list[Array]) -> PanelLora:
        ranks = [len(part) for part in b]
        rows = [jnp.pad(part, ((0, max(ranks) - len(part)), (0, 0))) for part in b]  # none adds zero
        offsets = [int(sum(ranks[:i])) if rank else 0 for i, rank in enumerate(ranks)]
        columns = [jnp.concatenate(a, axis=-1)]
        if not self.rounds:
            return PanelLora(pack(*columns), pack(*rows), tuple(offsets))
        # Whole numbers here too: they are read sooner, and nothing but drafts depends on them.
        (columns, scale), (rows, of_rows) = _quantised(columns), _quantised(rows)
        return PanelLora(pack(*columns, scale=scale, rounds=True), pack(*rows, scale=of_rows), tuple(offsets))

    def rows(
        self,
        variables: Variables,
        tokens: Int[Array, "B R"],
        start: Int[Array, " B"],
        cache: Cache,
        masks: MaskRows | None = None,
        first: bool = False,
        lengths: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B R D"], Float[Array, "B Q D"], Cache]:
        """What `Decoder.step` gives, and zeros where all prompts are padding."""
        del first  # rows see only slots that hold something
        assert not isinstance(cache, LayerCache)
        g, R = self.model.g, tokens.shape[1]
        m = jnp.zeros((0, g.D)) if masks is None else masks.embeddings
        rows, (_, kinds) = step_rows(g, start, R, masks, lengths), g.kinds
        weights, norm = variables["layers"], variables["norm"]
        used = None if lengths is None else jnp.max(lengths - start)  # what is behind is padding
        x, written = layers(tokens, variables["embed"], m, rows, weights, norm, cache, kinds, g.norm_epsilon, used)
        return x[:, :R], x[:, R:], written

    def logits(self, variables: Variables, latents: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """The base head."""
        return times(latents, variables["head"])

    def draft_logits(self, variables: Variables, latents: Float[Array, "... D"]) -> Float[Array, "... U"]:
        """The base head over the draft vocabulary."""
        return times(latents, variables["draft_head" if "draft_head" in variables else "head"])

    def embedded(self, variables: Variables, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
        """Rows of the table of embeddings."""
        return _rows(variables["embed"], tokens)

    def unembedded(self, variables: Variables, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
        """Rows of the base head's table."""
        table, scale = variables["unembed"]
        rows = _rows(table, tokens)
        return rows if scale is None else rows * scale[tokens][..., None]

    def likeliest(self, logits: Float[Array, "... V"]) -> Int[Array, "..."]:
        """The first index of the largest logit; where none is a number, the first of all."""
        return largest(logits, 1)[..., 0]

    def candidates(self, scores: Float[Array, "... V"], count: int) -> Int[Array, "... C"]:
        """The `count` largest, without a sort."""
        return largest(scores, count)


def _gathered(table: Float[Array, "V D"]) -> Array:
    """A table to take rows from: bfloat16 numbers as uint16, as XLA converts a whole bfloat16 table for each gather."""
    table = narrow(table)
    return table if table.dtype == jnp.float32 else jax.lax.bitcast_convert_type(table, jnp.uint16)


def _rows(table: Any, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
    rows = table[tokens]
    if rows.dtype == jnp.uint16:
        rows = jax.lax.bitcast_convert_type(rows, jnp.bfloat16)
    return rows.astype(jnp.float32)


def _quantised(matrices: list[Array]) -> tuple[list[Array], Float[Array, " _"]]:
    """Matrices as whole numbers, and the scales of all their columns."""
    values, scales = zip(*(quantise(np.asarray(matrix)) for matrix in matrices), strict=True)
    return [jnp.asarray(of) for of in values], jnp.concatenate(scales)
