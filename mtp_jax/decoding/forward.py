"""What a decoding step asks of the model: weights as it reads them, latents of its rows, logits, and parts of tables.

The loop and drafting know the model through this interface alone; `XlaForward` computes it with the decoder, anywhere.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mtp_jax.decoding.sampling import likeliest
from mtp_jax.model.decoder import Cache, Decoder
from mtp_jax.model.step_rows import MaskRows
from mtp_jax.model.weights import Params
from mtp_jax.mtp.adapter import AdapterShape, with_adapter
from mtp_jax.mtp.sampler import parted

# Groups of projections that read one input: side by side they are fewer and larger products (`Layer.step`).
_ATTENTION = {"attention_in": ("q", "k", "v"), "attention_out": ("o",)}
GROUPS = {**_ATTENTION, "mlp_in": ("gate", "up"), "mlp_out": ("down",)}
# What `prepare` gives: arrays of the implementation's own, and with an adapter `mtp`: its masks and sampler, and
# `vocabulary`: the ascending ids [U] of its draft vocabulary, where it has one. The loop's variables may also hold
# `draft`: what `prepare` gave for a draft model.
Variables = dict[str, Any]


@runtime_checkable
class Forward(Protocol):
    """One pass over the rows of a step, and what drafting needs beside it. Hashable, so that it can be static."""

    @property
    def model(self) -> Decoder:
        """The decoder; with weights from `prepare`, one whose layers are not scanned."""

    @property
    def shape(self) -> AdapterShape | None:
        """The adapter's; None without one."""

    @property
    def build(self) -> str:
        """What its speed depends on beside the versions of this package and JAX."""

    def prepare(self, params: Params, adapter: Params | None) -> Variables:
        """Weights as the other methods take them, from unstacked `params`, which are consumed."""

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
        """Latents of real and mask rows and the cache with the real rows, as `Decoder.step` gives them."""

    def logits(self, variables: Variables, latents: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """The base head."""

    def draft_logits(self, variables: Variables, latents: Float[Array, "... D"]) -> Float[Array, "... U"]:
        """The base head over the draft vocabulary, or over all tokens where there is none."""

    def embedded(self, variables: Variables, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
        """Input embeddings of tokens."""

    def unembedded(self, variables: Variables, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
        """What the base head multiplies a latent with for the logits of these tokens."""

    def likeliest(self, logits: Float[Array, "... V"]) -> Int[Array, "..."]:
        """Greedy choice: the first index of the largest logit."""

    def candidates(self, scores: Float[Array, "... V"], count: int) -> Int[Array, "... C"]:
        """The indices of the `count` highest scores, in no certain order."""


@dataclass(frozen=True)
class XlaForward:
    """The decoder's own step."""

    model: Decoder
    shape: AdapterShape | None = None
    # Join the base's matrices too. Not where they are sharded over columns: parts would have to move.
    joined: bool = True
    build: str = ""

    def prepare(self, params: Params, adapter: Params | None) -> Variables:
        """`params` without what was joined, `fused` (see `Layer.step`), and of an adapter `mtp` and its vocabulary."""
        dtype, layers = self.model.dtype, {}
        lora = None if adapter is None or self.shape is None else with_adapter({}, adapter, self.shape)["lora"]
        for i in range(self.model.g.L):
            layer: dict[str, Any] = {}
            for group, names in (_ATTENTION if self.model.g.experts else GROUPS).items():
                into = layer[group] = {}
                if lora is not None and any(name in lora["layers"] for name in names):
                    a, b = lora_parts(self.model, lora, names, i)
                    into |= {"a": jnp.concatenate(a, axis=-1), "b": tuple(b)}
                if self.joined:
                    parts = [params[f"layer_{i}"].pop(name) for name in names]
                    into |= {kind: jnp.concatenate([part[kind] for part in parts], axis=-1) for kind in parts[0]}
            layers[f"layer_{i}"] = layer
        variables: Variables = {"params": params, "fused": layers}
        if adapter is None:
            return variables
        if "vocabulary" in adapter:
            ids = variables["vocabulary"] = jnp.asarray(adapter["vocabulary"])
            variables["draft_head"] = self._apply(variables, method="head").of(ids)
        return variables | {"mtp": drafting_weights(adapter, dtype)}

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
        """`Decoder.step`."""
        return self._apply(
            variables, tokens, start, cache, masks, variables.get("fused"), first, lengths, method="step"
        )

    def logits(self, variables: Variables, latents: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """`Decoder.logits`."""
        return self._apply(variables, latents, method="logits")

    def draft_logits(self, variables: Variables, latents: Float[Array, "... D"]) -> Float[Array, "... U"]:
        """The same over the draft vocabulary alone."""
        head = variables.get("draft_head")
        return self.logits(variables, latents) if head is None else head(latents, self.model.g)

    def embedded(self, variables: Variables, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
        """Rows of the table of embeddings."""
        return self._apply(variables, tokens, method="embeddings")

    def unembedded(self, variables: Variables, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
        """Rows of the base head's table."""
        return self._apply(variables, method="head").rows(tokens)

    def likeliest(self, logits: Float[Array, "... V"]) -> Int[Array, "..."]:
        """`sampling.likeliest`."""
        return likeliest(logits)

    def candidates(self, scores: Float[Array, "... V"], count: int) -> Int[Array, "... C"]:
        """On TPU, where sorting would cost more than the sampler saves, each is found with a probability of 0.99."""

        def nearly(scores: Array) -> Array:
            return jax.lax.approx_max_k(scores, count, recall_target=0.99)[1]

        def exactly(scores: Array) -> Array:
            return jax.lax.top_k(scores, count)[1]

        return jax.lax.platform_dependent(scores, tpu=nearly, default=exactly)

    def _apply(self, variables: Variables, *arguments: Any, method: str) -> Any:
        return self.model.apply({"params": variables["params"]}, *arguments, method=method)


def lora_parts(model: Decoder, lora: Params, names: tuple[str, ...], layer: int) -> tuple[list[Array], list[Array]]:
    """A [in, R] and B [R, out] of each named projection of a layer, from the stacked and scaled collection.

    A projection without LoRA has rank 0.
    """
    g, of = model.g, lora["layers"]
    widths = {"q": g.N * g.H, "k": g.K * g.H, "v": g.K * g.H, "o": g.D, "gate": g.F, "up": g.F, "down": g.D}
    width = next(of[name]["a"].shape[1] for name in names if name in of)
    a = [of[name]["a"][layer] if name in of else jnp.zeros((width, 0)) for name in names]
    b = [of[name]["b"][layer] if name in of else jnp.zeros((0, widths[name])) for name in names]
    return [jnp.asarray(x, model.dtype) for x in a], [jnp.asarray(x, model.dtype) for x in b]


def drafting_weights(adapter: Params, dtype: DTypeLike) -> Params:
    """Masks and sampler in `dtype`; norms stay as they are, as they are computed in float32."""
    mtp = adapter.get("mtp", {})
    cast = jax.tree.map_with_path(lambda path, x: jnp.asarray(x, None if "norm" in str(path) else dtype), mtp)
    return cast | {"sampler": parted(cast["sampler"])} if "sampler" in cast else cast
