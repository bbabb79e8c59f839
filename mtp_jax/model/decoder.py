"""The frozen base: a decoder of the Llama, Qwen2, Qwen3 and Mistral families as one pure function of its variables.

One forward pass serves training (rows of packed documents, no cache), prefill (a chunk of prompt, cache) and
decoding (a few rows, cache). It knows neither losses nor drafts.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mtp_jax.model.attention import LayerCache, attend, visibility
from mtp_jax.model.geometry import Geometry
from mtp_jax.model.rope import angles, rotate

REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
Cache = LayerCache | Sequence[LayerCache]


class Rows(NamedTuple):
    """What all layers share about the rows of a call."""

    cos: Float[Array, "B R 1 H/2"]
    sin: Float[Array, "B R 1 H/2"]
    visible: Bool[Array, "kinds B R S"]  # one mask for each kind of layer: each window that occurs
    start: Int[Array, " B"]  # position of the first row, where a cache is written


class Projection(nn.Module):
    """y = x W (+ b), in the dtype of x."""

    features: int
    bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B R in"]) -> Float[Array, "B R out"]:
        kernel = self.param("kernel", nn.initializers.zeros, (x.shape[-1], self.features))
        y = x @ kernel.astype(x.dtype)
        if self.bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        return y


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis: float32 inside, cast back before the scale, as transformers does."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return wide.astype(x.dtype) * scale.astype(x.dtype)


class Layer(nn.Module):
    """One layer: attention and gated MLP, each behind a norm and added to the residual stream."""

    g: Geometry

    @nn.compact
    def __call__(
        self, x: Float[Array, "B R D"], rows: Rows, kind: Int[Array, ""], cache: LayerCache | None
    ) -> tuple[Float[Array, "B R D"], LayerCache | None]:
        g = self.g
        with jax.named_scope("attention"):
            h = RMSNorm(g.norm_epsilon, name="attention_norm")(x)
            q = self._heads("q", h, g.N)
            k = self._heads("k", h, g.K)
            v = self._heads("v", h, g.K)
            if g.qk_norm:
                q = RMSNorm(g.norm_epsilon, name="q_norm")(q)
                k = RMSNorm(g.norm_epsilon, name="k_norm")(k)
            q, k = rotate(q, rows.cos, rows.sin), rotate(k, rows.cos, rows.sin)
            if cache is not None:
                cache = cache.write(k, v, rows.start)
                k, v = cache.k.astype(x.dtype), cache.v.astype(x.dtype)
            h = attend(q, k, v, rows.visible[kind])
            x = x + Projection(g.D, g.o_bias, name="o")(h.reshape(*h.shape[:2], -1))
        with jax.named_scope("mlp"):
            h = RMSNorm(g.norm_epsilon, name="mlp_norm")(x)
            gate = Projection(g.F, g.mlp_bias, name="gate")(h)
            up = Projection(g.F, g.mlp_bias, name="up")(h)
            x = x + Projection(g.D, g.mlp_bias, name="down")(jax.nn.silu(gate) * up)
        x = nn.with_logical_constraint(x, ("batch", "rows", None))
        self.sow("intermediates", "residual", x)
        return x, cache

    def _heads(self, name: str, h: Float[Array, "B R D"], heads: int) -> Float[Array, "B R heads H"]:
        y = Projection(heads * self.g.H, self.g.qkv_bias, name=name)(h)
        return y.reshape(*h.shape[:2], heads, self.g.H)


class Decoder(nn.Module):
    """The base model. `params` come from `weight_table`; computation runs in `dtype`, softmax and norms in float32.

    With `scanned` layers every weight is stacked [L, ...]: one compiled layer, for training. Without, `params` and cache
    hold one entry per layer (`unstack_layers`): nothing is copied out of a stack, for decoding.
    """

    g: Geometry
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    scanned: bool = True

    def setup(self) -> None:
        self.embed = _Table(self.g.V, self.g.D)
        self.norm = RMSNorm(self.g.norm_epsilon)
        if not self.g.tied:
            self.unembed = _Table(self.g.V, self.g.D)
        layer = Layer if self.remat == "none" else nn.remat(Layer, policy=REMAT_POLICIES[self.remat])
        if self.scanned:
            self.layers = nn.scan(
                layer,
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, 0, 0),
                length=self.g.L,
            )(self.g)
        else:
            self.layer = [layer(self.g) for _ in range(self.g.L)]

    def __call__(
        self,
        tokens: Int[Array, "B R"],
        positions: Int[Array, "B R"],
        segments: Int[Array, "B R"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B R D"], Cache | None]:
        """Latents after the final norm, and the cache with these rows written at their positions.

        Without a cache a row sees the rows of its own segment up to its position. With one it sees every slot up to
        its position; the rows of a sequence then have consecutive positions and there are no segments.
        """
        g = self.g
        x = nn.with_logical_constraint(self.embed()[tokens].astype(self.dtype), ("batch", "rows", None))
        windows = sorted(set(g.windows), key=lambda window: (window is None, window))
        kinds = jnp.asarray([windows.index(window) for window in g.windows])
        keys, key_segments = positions, segments
        if cache is not None:
            assert segments is None
            slots = (cache if isinstance(cache, LayerCache) else cache[0]).k.shape[-3]
            keys = jnp.broadcast_to(jnp.arange(slots), (len(tokens), slots))
        visible = jnp.stack([visibility(positions, keys, segments, key_segments, window) for window in windows])
        rows = Rows(*angles(g.rope, positions), visible, positions[:, 0])
        if self.scanned:
            x, cache = self.layers(x, rows, kinds, cache)
        else:
            written = []
            for i, layer in enumerate(self.layer):
                x, layer_cache = layer(x, rows, windows.index(g.windows[i]), None if cache is None else cache[i])
                written.append(layer_cache)
            cache = None if cache is None else written
        return self.norm(x), cache

    def logits(self, latents: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """The base head, float32."""
        table = self.embed() if self.g.tied else self.unembed()
        return jnp.einsum(
            "...d,vd->...v", latents, table.astype(latents.dtype), preferred_element_type=jnp.float32
        )


class _Table(nn.Module):
    """An embedding table [V, D], used as input embedding or as unembedding."""

    V: int
    D: int

    @nn.compact
    def __call__(self) -> Float[Array, "V D"]:
        return self.param("embedding", nn.initializers.zeros, (self.V, self.D))
