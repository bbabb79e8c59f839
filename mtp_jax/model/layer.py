"""One layer of the frozen base. How families differ is data in the geometry."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from mtp_jax.model.activation import ACTIVATIONS
from mtp_jax.model.attention import Blocks, LayerCache, RealRows, Scores, attend, attend_blocks
from mtp_jax.model.chunks import map_chunks
from mtp_jax.model.experts import Mixture
from mtp_jax.model.geometry import Geometry
from mtp_jax.model.mask_kernel import Tiling, attend_blocks_fused
from mtp_jax.model.projection import Matrices, Projection, product
from mtp_jax.model.rope import rotate
from mtp_jax.model.step_rows import StepRows


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, float32 inside, as the geometry says of its scale."""

    g: Geometry

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.g.norm_epsilon)
        if self.g.norm_wide:
            return (wide * (self.g.norm_offset + scale.astype(jnp.float32))).astype(x.dtype)
        return wide.astype(x.dtype) * scale.astype(x.dtype)


class Layer(nn.Module):
    """One layer: attention and a gated MLP or mixture of experts, with norms, added to the residual stream.

    Real rows and mask rows are two streams through the same frozen weights; `adapted` rows also meet the LoRA.
    """

    g: Geometry

    def setup(self) -> None:
        g = self.g
        if g.norm_before:
            self.attention_norm, self.mlp_norm = RMSNorm(g), RMSNorm(g)
        if g.norm_after:
            self.attention_out_norm, self.mlp_out_norm = RMSNorm(g), RMSNorm(g)
        if g.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(g), RMSNorm(g)
        self.q = Projection(g.N * g.H, g.qkv_bias, g.int8, (None, "heads"))
        self.k = Projection(g.K * g.H, g.qkv_bias, g.int8, (None, "kv_heads"))
        self.v = Projection(g.K * g.H, g.qkv_bias, g.int8, (None, "kv_heads"))
        self.o = Projection(g.D, g.o_bias, g.int8, ("heads", None))
        if g.experts:
            self.mixture = Mixture(g)
            return
        self.gate, self.up = (Projection(g.F, g.mlp_bias, g.int8, (None, "mlp")) for _ in range(2))
        self.down = Projection(g.D, g.mlp_bias, g.int8, ("mlp", None))

    def real(
        self,
        x: Float[Array, "B R D"],
        cos: Float[Array, "kinds B R 1 half"],
        sin: Float[Array, "kinds B R 1 half"],
        kind: Int[Array, ""] | int,
        adapted: bool,
        keep: bool,
        attention: Callable[[Array, LayerCache, Any], Array],
    ) -> tuple[Float[Array, "B R D"], LayerCache | None]:
        """Real rows of whole sequences; returns their keys and values where these are to be kept."""
        q, k, v = self._attention_inputs(x, cos[kind], sin[kind], adapted)
        held = LayerCache.of_rows(k, v)
        x = self._attended(x, attention(q, held, kind), adapted)
        x = self._mlp(x, self._mlp_weights(x.dtype, adapted))
        self.sow("intermediates", "residual", x)
        return x, held if keep else None

    def step(
        self,
        x: Float[Array, "B R D"],
        rows: StepRows,
        kind: Int[Array, ""] | int,
        cache: LayerCache,
        visible: Bool[Array, "kinds B R S"],
        fused: Any,
        real: int,
        first: bool,
    ) -> tuple[Float[Array, "B R D"], LayerCache]:
        """Real rows, then mask rows, through each frozen product together; returns the cache with the real rows.

        Rows read the cache as it was and one another's keys beside it: reading what was just written would make XLA
        copy the cache.

        Args:
            visible: which slots of the cache a row sees.
            fused: matrices by group of projections that read one input: `kernel` (and `kernel_scale`, `bias`) of the
                group, where they are not left to the projections, and of its LoRA, which mask rows alone meet, `a` of
                all and each `b`.
            real: how many rows are real.
            first: nothing is in the cache yet.
        """
        g = self.g

        def project(group: str, names: tuple[str, ...], x: Array) -> Array:
            joined = fused.get(group, {})
            if "kernel" in joined:
                y = product(x, joined["kernel"], joined.get("kernel_scale"))
            else:
                y = jnp.concatenate([getattr(self, name)(x, gather=False) for name in names], axis=-1)
            if "bias" in joined:
                y = y + joined["bias"]
            if "a" in joined and real < x.shape[1]:
                inner = jnp.split(x[:, real:] @ joined["a"], np.cumsum([len(b) for b in joined["b"]])[:-1], axis=-1)
                low = [part @ b for part, b in zip(inner, joined["b"], strict=True)]
                y = jnp.concatenate([y[:, :real], y[:, real:] + jnp.concatenate(low, axis=-1)], axis=1)
            return y

        h = project("attention_in", ("q", "k", "v"), self.attention_norm(x) if g.norm_before else x)
        q, k, v = self._heads(*jnp.split(h, [g.N * g.H, (g.N + g.K) * g.H], axis=2))
        held = None if first else LayerCache(cache.k.astype(x.dtype), cache.v.astype(x.dtype))
        cos, sin = rows.cos[kind], rows.sin[kind]
        q, own = rotate(q, cos, sin), LayerCache.of_rows(rotate(k, cos, sin), v)
        h = attend(q, held, visible[kind], Scores.of(g), own, rows.own[kind])
        # Always 0, and not known before the old cache was read: XLA then writes in place, and copies it otherwise.
        late = jnp.minimum(jnp.isnan(h[:, 0, 0, 0]).astype(jnp.int32), 0)
        cache = cache.write(LayerCache(own.k[:, :, :real], own.v[:, :, :real]), rows.start + late)
        h = project("attention_out", ("o",), h.reshape(*x.shape[:2], -1))
        x = self._added(x, h, "attention_out_norm")
        h = self.mlp_norm(x) if g.norm_before else x
        if g.experts:
            h = self.mixture(h)
        else:
            gate, up = jnp.split(project("mlp_in", ("gate", "up"), h), 2, axis=-1)
            h = project("mlp_out", ("down",), ACTIVATIONS[g.activation](gate) * up)
        return nn.with_logical_constraint(self._added(x, h, "mlp_out_norm"), ("batch", None, None)), cache

    def masks(
        self,
        m: Float[Array, "B G M D"],
        cos: Float[Array, "B G M 1 half"],
        sin: Float[Array, "B G M 1 half"],
        window: Int[Array, ""] | None,
        blocks: Blocks,
        keys: RealRows,
        real: LayerCache,
        chunk: int | None,
        parts: int,
        tiles: Tiling | None = None,
    ) -> Float[Array, "B G M D"]:
        """Mask rows, which see the real rows' keys and values and those of their own block.

        The MLP takes the blocks in `parts`: in its backward pass some ten arrays of width F exist at a time.
        """
        q, k, v = self._attention_inputs(m, cos, sin, adapted=True)
        with jax.named_scope("attend"):
            if tiles is not None and real.k.shape[2] % tiles.keys == 0:
                h = attend_blocks_fused(q, (k, v), real, blocks, keys, window, tiles, Scores.of(self.g).scale)
            else:
                h = attend_blocks(q, (k, v), real, blocks, keys, window, chunk, Scores.of(self.g))
        m = self._attended(m, h, adapted=True)
        with_weights = self._mlp_weights(m.dtype, adapted=True)  # gathered once for all parts
        return map_chunks(lambda m: self._mlp(m, with_weights), m, -(-m.shape[1] // parts))

    def _attention_inputs(self, x: Float[Array, "... D"], cos: Array, sin: Array, adapted: bool) -> tuple[Array, ...]:
        with jax.named_scope("attention"):
            h = self.attention_norm(x) if self.g.norm_before else x
            q, k, v = self._heads(self.q(h, adapted), self.k(h, adapted), self.v(h, adapted))
            return rotate(q, cos, sin), rotate(k, cos, sin), v

    def _heads(
        self, q: Float[Array, "... qs"], k: Float[Array, "... ks"], v: Float[Array, "... ks"]
    ) -> tuple[Float[Array, "... N H"], Float[Array, "... K H"], Float[Array, "... K H"]]:
        """Queries, keys and values by head, normed where the geometry says so."""
        g = self.g
        if g.qk_norm == "width":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.reshape(*x.shape[:-1], -1, g.H) for x in (q, k, v))
        if g.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def _added(self, x: Float[Array, "... D"], y: Float[Array, "... D"], norm: str) -> Float[Array, "... D"]:
        """The residual stream with what attention or MLP adds."""
        if self.g.norm_after:
            y = getattr(self, norm)(y)
        if self.g.residual_scale != 1:
            y = (y.astype(jnp.float32) * self.g.residual_scale).astype(y.dtype)
        return x + y

    def _attended(self, x: Float[Array, "... D"], h: Float[Array, "... N H"], adapted: bool) -> Float[Array, "... D"]:
        with jax.named_scope("attention"):
            return self._added(x, self.o(h.reshape(*x.shape[:-1], -1), adapted), "attention_out_norm")

    def _mlp_weights(self, dtype: DTypeLike, adapted: bool) -> tuple[Matrices, Matrices, Matrices] | None:
        D, F = self.g.D, self.g.F
        if self.g.experts:
            return None
        gate, up = self.gate.matrices(D, dtype, adapted), self.up.matrices(D, dtype, adapted)
        return gate, up, self.down.matrices(F, dtype, adapted)

    def _mlp(
        self, x: Float[Array, "... D"], weights: tuple[Matrices, Matrices, Matrices] | None
    ) -> Float[Array, "... D"]:
        with jax.named_scope("mlp"):
            h = self.mlp_norm(x) if self.g.norm_before else x
            if weights is None:
                h = self.mixture(h)
            else:
                gate, up, down = weights
                h = down(ACTIVATIONS[self.g.activation](gate(h)) * up(h))
            x = self._added(x, h, "mlp_out_norm")
        return nn.with_logical_constraint(x, ("batch",) + (None,) * (x.ndim - 1))
