"""The frozen base: a decoder of the Llama, Qwen2, Qwen3 and Mistral families as one pure function of its variables.

One forward pass serves training (rows of packed documents, no cache), prefill (a chunk of prompt, cache) and
decoding (a few rows, cache). It knows neither losses nor drafts.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mtp_jax.model.attention import Blocks, Keys, LayerCache, attend, attend_blocks, visibility
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
    """y = x W (+ b), in the dtype of x; for adapted rows y + (x A) B, where the `lora` collection holds A and B."""

    features: int
    bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "... in"], adapted: bool = False) -> Float[Array, "... out"]:
        kernel = self.param("kernel", nn.initializers.zeros, (x.shape[-1], self.features))
        y = x @ kernel.astype(x.dtype)
        if self.bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        if adapted and self.has_variable("lora", "a"):
            a, b = self.get_variable("lora", "a"), self.get_variable("lora", "b")
            y = y + low_rank(x, a.astype(x.dtype), b.astype(x.dtype))
        return y


@jax.custom_vjp
def low_rank(x: Float[Array, "... in"], a: Float[Array, "in R"], b: Float[Array, "R out"]) -> Float[Array, "... out"]:
    """(x A) B. Its backward pass transposes only arrays of width R, where autodiff would transpose full rows."""
    return (x @ a) @ b


def _low_rank_forward(x: Array, a: Array, b: Array) -> tuple[Array, tuple[Array, ...]]:
    inner = x @ a
    return inner @ b, (x, a, b, inner)


def _low_rank_backward(saved: tuple[Array, ...], dy: Float[Array, "... out"]) -> tuple[Array, Array, Array]:
    x, a, b, inner = saved
    d_inner = dy @ b.T
    d_a = jnp.einsum("...r,...i->ri", d_inner, x).T
    d_b = jnp.einsum("...r,...o->ro", inner, dy)
    return d_inner @ a.T, d_a, d_b


low_rank.defvjp(_low_rank_forward, _low_rank_backward)


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
    """One layer: attention and gated MLP, each behind a norm and added to the residual stream.

    Real rows and mask rows are two streams through the same frozen weights; `adapted` rows also meet the LoRA.
    """

    g: Geometry

    def setup(self) -> None:
        g = self.g
        self.attention_norm, self.mlp_norm = RMSNorm(g.norm_epsilon), RMSNorm(g.norm_epsilon)
        if g.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(g.norm_epsilon), RMSNorm(g.norm_epsilon)
        self.q = Projection(g.N * g.H, g.qkv_bias)
        self.k = Projection(g.K * g.H, g.qkv_bias)
        self.v = Projection(g.K * g.H, g.qkv_bias)
        self.o = Projection(g.D, g.o_bias)
        self.gate, self.up = Projection(g.F, g.mlp_bias), Projection(g.F, g.mlp_bias)
        self.down = Projection(g.D, g.mlp_bias)

    def real(
        self,
        x: Float[Array, "B R D"],
        rows: Rows,
        kind: Int[Array, ""] | int,
        cache: LayerCache | None,
        adapted: bool,
        keep: bool,
    ) -> tuple[Float[Array, "B R D"], LayerCache | None]:
        """Real rows; returns the cache with them in it, or their own keys and values where these are to be kept."""
        q, k, v = self._attention_inputs(x, rows.cos, rows.sin, adapted)
        held = LayerCache(k, v) if cache is None else cache.write(k, v, rows.start)
        h = attend(q, held.k.astype(x.dtype), held.v.astype(x.dtype), rows.visible[kind])
        x = self._outputs(x, h, adapted)
        self.sow("intermediates", "residual", x)
        return x, held if keep else None

    def masks(
        self,
        m: Float[Array, "B G M D"],
        cos: Float[Array, "B G M 1 H/2"],
        sin: Float[Array, "B G M 1 H/2"],
        blocks: Blocks,
        keys: Keys,
        window: Int[Array, ""] | None,
        real: LayerCache,
        chunk: int,
    ) -> Float[Array, "B G M D"]:
        """Mask rows, which see the real rows' keys and values and those of their own block."""
        q, k, v = self._attention_inputs(m, cos, sin, adapted=True)
        real = LayerCache(real.k.astype(m.dtype), real.v.astype(m.dtype))
        h = attend_blocks(q, LayerCache(k, v), real, blocks, keys, window, chunk)
        return self._outputs(m, h, adapted=True)

    def _attention_inputs(self, x: Float[Array, "... D"], cos: Array, sin: Array, adapted: bool) -> tuple[Array, ...]:
        g = self.g
        with jax.named_scope("attention"):
            h = self.attention_norm(x)
            q = self.q(h, adapted).reshape(*x.shape[:-1], g.N, g.H)
            k = self.k(h, adapted).reshape(*x.shape[:-1], g.K, g.H)
            v = self.v(h, adapted).reshape(*x.shape[:-1], g.K, g.H)
            if g.qk_norm:
                q, k = self.q_norm(q), self.k_norm(k)
            return rotate(q, cos, sin), rotate(k, cos, sin), v

    def _outputs(self, x: Float[Array, "... D"], h: Float[Array, "... N H"], adapted: bool) -> Float[Array, "... D"]:
        with jax.named_scope("attention"):
            x = x + self.o(h.reshape(*x.shape[:-1], -1), adapted)
        with jax.named_scope("mlp"):
            h = self.mlp_norm(x)
            x = x + self.down(jax.nn.silu(self.gate(h, adapted)) * self.up(h, adapted), adapted)
        return nn.with_logical_constraint(x, ("batch",) + (None,) * (x.ndim - 1))


class Decoder(nn.Module):
    """The base model. `params` come from `weight_table`; computation runs in `dtype`, softmax and norms in float32.

    With `scanned` layers every weight is stacked [L, ...]: one compiled layer, for training. Without, `params` and
    cache hold one entry per layer (`unstack_layers`): nothing is copied out of a stack, for decoding.
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
        if self.scanned:
            self.layers = Layer(self.g)
        else:
            self.layer = [Layer(self.g) for _ in range(self.g.L)]

    def __call__(
        self,
        tokens: Int[Array, "B R"],
        positions: Int[Array, "B R"],
        segments: Int[Array, "B R"] | None = None,
        cache: Cache | None = None,
        adapted: bool = False,
        keep: bool = False,
    ) -> tuple[Float[Array, "B R D"], Cache | None]:
        """Latents of real rows after the final norm, and the cache with these rows written at their positions.

        Without a cache a row sees the rows of its own segment up to its position. With one it sees every slot up to
        its position; the rows of a sequence then have consecutive positions and there are no segments.

        Args:
            adapted: let real rows meet the LoRA too: standard LoRA, to show what the gate prevents.
            keep: without a cache, return the rows' own keys and values in its place, for mask blocks to see.
        """
        g, keep = self.g, keep or cache is not None
        x = self.embed()[tokens].astype(self.dtype)
        x = nn.with_logical_constraint(x, ("batch", "rows", None))
        windows = sorted(set(g.windows), key=lambda window: (window is None, window))
        kinds = [windows.index(window) for window in g.windows]
        keys, key_segments = positions, segments
        if cache is not None:
            assert segments is None
            slots = (cache if isinstance(cache, LayerCache) else cache[0]).k.shape[-3]
            keys = jnp.broadcast_to(jnp.arange(slots), (len(tokens), slots))
        visible = jnp.stack([visibility(positions, keys, segments, key_segments, window) for window in windows])
        rows = Rows(*angles(g.rope, positions), visible, positions[:, 0])

        def body(layer: Layer, x: Array, kind: Any, cache: LayerCache | None) -> tuple[Array, LayerCache | None]:
            return layer.real(x, rows, kind, cache, adapted, keep)

        if self.scanned:
            x, cache = self._scan(self._rematerialised(body))(self.layers, x, jnp.asarray(kinds), cache)
        else:
            written = []
            for i, layer in enumerate(self.layer):
                x, layer_cache = body(layer, x, kinds[i], None if cache is None else cache[i])
                written.append(layer_cache)
            cache = written if keep else None  # type: ignore[assignment]
        return self.norm(x), cache

    def masks(
        self,
        embeddings: Float[Array, "M D"],
        blocks: Blocks,
        keys: Keys,
        real: LayerCache,
        chunk: int,
    ) -> Float[Array, "B G M D"]:
        """Latents of all mask rows after the final norm.

        Args:
            embeddings: of the mask tokens m_1..m_M.
            blocks: the anchors; `keys` and `real` describe the real rows, as `__call__` kept them or in a cache.
            chunk: how many blocks' attention scores exist at a time.
        """
        g, M = self.g, embeddings.shape[0]
        m = jnp.broadcast_to(embeddings.astype(self.dtype), (*blocks.anchors.shape, M, g.D))
        positions = blocks.positions[..., None] + 1 + jnp.arange(M)
        cos, sin = angles(g.rope, positions)
        # A window that no distance reaches stands for none, so that one compiled layer serves both kinds.
        windowed = any(window is not None for window in g.windows)
        windows = jnp.asarray([window or jnp.iinfo(jnp.int32).max for window in g.windows]) if windowed else None

        def body(layer: Layer, m: Array, window: Any, real: LayerCache) -> tuple[Array, None]:
            return layer.masks(m, cos, sin, blocks, keys, window, real, chunk), None

        m, _ = self._scan(self._rematerialised(body))(self.layers, m, windows, real)
        return self.norm(m)

    def logits(self, latents: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """The base head, float32."""
        return jnp.einsum(
            "...d,vd->...v", latents, self.unembedding().astype(latents.dtype), preferred_element_type=jnp.float32
        )

    def embeddings(self, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
        """Input embeddings of tokens, as stored."""
        return self.embed()[tokens]

    def unembedding(self) -> Float[Array, "V D"]:
        """The table of the base head, as stored."""
        return self.embed() if self.g.tied else self.unembed()

    def _rematerialised(self, body: Callable[..., Any]) -> Callable[..., Any]:
        return body if self.remat == "none" else nn.remat(body, policy=REMAT_POLICIES[self.remat])

    def _scan(self, body: Callable[..., Any]) -> Callable[..., Any]:
        return nn.scan(
            body,
            variable_axes={"params": 0, "lora": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=self.g.L,
        )


class _Table(nn.Module):
    """An embedding table [V, D], used as input embedding or as unembedding."""

    V: int
    D: int

    @nn.compact
    def __call__(self) -> Float[Array, "V D"]:
        return self.param("embedding", nn.initializers.zeros, (self.V, self.D))
