"""The frozen base: a decoder as one pure function of its variables. How families differ is data in the geometry.

`__call__` and `masks` serve training: real rows, then blocks of mask rows that see them. `step` serves prefill and
decoding: both kinds of rows at once, beside a cache. None of them knows losses or drafts.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from mtp_jax.model.activation import ACTIVATIONS
from mtp_jax.model.attention import (
    Blocks,
    LayerCache,
    RealRows,
    Scores,
    attend,
    attend_blocks,
    attend_rows,
    capped,
    visibility,
)
from mtp_jax.model.chunks import map_chunks
from mtp_jax.model.experts import Mixture
from mtp_jax.model.geometry import Geometry, Kind
from mtp_jax.model.kernels import flash, misfit
from mtp_jax.model.mask_kernel import Tiling, attend_blocks_fused
from mtp_jax.model.projection import Matrices, Projection, product
from mtp_jax.model.rope import Rope, angles, rotate
from mtp_jax.sharding import parts_of

REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
# Mask rows that go through the MLP at a time, on each device, where memory counts (remat "full").
_MLP_ROWS = 1024
Cache = LayerCache | Sequence[LayerCache]


class MaskRows(NamedTuple):
    """Mask rows behind the real rows of a decoding step, in blocks, each anchored to a verified token or a draft."""

    embeddings: Float[Array, "Q D"] | Float[Array, "B Q D"]  # of all sequences alike, or of each its own
    anchors: Int[Array, "B Q"]  # position of each row's anchor
    offsets: Int[np.ndarray, " Q"]  # 1, 2, ... within its block
    blocks: Int[np.ndarray, " Q"]  # rows of one block bear one number


class StepRows(NamedTuple):
    """What all layers share about the rows of a decoding step, for each kind of layer."""

    start: Int[Array, " B"]  # position of the first row, where the cache is written
    cos: Float[Array, "kinds B R 1 half"]
    sin: Float[Array, "kinds B R 1 half"]
    low: Int[Array, "kinds B R"]  # the first slot of the cache that a row sees,
    high: Int[Array, "kinds B R"]  # and the one behind the last
    own: Bool[Array, "kinds B R R"]  # which of the step's own rows a row sees


def step_rows(
    g: Geometry, start: Int[Array, " B"], real: int, masks: MaskRows | None, lengths: Int[Array, " B"] | None = None
) -> StepRows:
    """`real` consecutive rows from position `start`, then mask rows (docs/how-it-works.md, sections 2 and 7)."""
    positions = reach = start[:, None] + jnp.arange(real)
    block, order = np.full(real, -1), np.zeros(real, int)  # of a real row: no block
    if masks is not None:
        positions = jnp.concatenate([positions, masks.anchors + masks.offsets], axis=1)
        reach = jnp.concatenate([reach, masks.anchors], axis=1)
        # Numbered from 0: the floating block has number -1, which here means a real row.
        block, order = np.append(block, masks.blocks - masks.blocks.min()), np.append(order, masks.offsets)
    same = (block[:, None] == block) & (block >= 0) & (order[:, None] >= order)
    own = same | ((block < 0) & (positions[:, None, :] <= reach[..., None]))
    # A window is measured from a row's own position.
    distance = positions[..., None] - positions[:, None, :]
    kinds, _ = g.kinds
    windows = [kind.window for kind in kinds]
    own = jnp.stack([own if window is None else own & (distance < window) for window in windows])
    low = jnp.stack([jnp.zeros_like(positions) if w is None else jnp.maximum(positions - w + 1, 0) for w in windows])
    high = jnp.broadcast_to(jnp.minimum(start[:, None], reach + 1), low.shape)
    cos, sin = _angles(kinds, positions, None if lengths is None else lengths[:, None])
    return StepRows(start, cos, sin, low, high, own)


def _angles(
    kinds: list[Kind], positions: Int[Array, "*rows"], lengths: Int[Array, "*lengths"] | None = None
) -> tuple[Float[Array, "kinds *rows 1 half"], Float[Array, "kinds *rows 1 half"]]:
    """Cosine and sine for each kind of layer; where queries and keys are not rotated, by an angle of 0."""
    width = max(len(kind.rope.inv_freq) if kind.rope else 1 for kind in kinds)
    pairs = [angles(kind.rope or Rope((0.0,) * width), positions, lengths) for kind in kinds]
    return jnp.stack([cos for cos, _ in pairs]), jnp.stack([sin for _, sin in pairs])


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


class Decoder(nn.Module):
    """The base model. `params` come from `weight_table`; computation runs in `dtype`, softmax and norms in float32.

    With `scanned` layers every weight is stacked [L, ...]: one compiled layer, for training. Without, `params` and
    cache hold one entry per layer (`unstack_layers`): nothing is copied out of a stack, for decoding.
    """

    g: Geometry
    dtype: DTypeLike = jnp.float32
    remat: str = "none"
    scanned: bool = True
    attention: str = "xla"  # of real rows in whole sequences, where they fit it: "xla", "splash", "cudnn"
    mask_tiles: Tiling | None = None  # of the kernel for mask rows, which needs the gate; None for XLA

    def setup(self) -> None:
        self.embed = _Table(self.g.V, self.g.D)
        self.norm = RMSNorm(self.g)
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
        adapted: bool = False,
        keep: bool = False,
    ) -> tuple[Float[Array, "B R D"], LayerCache | None]:
        """Latents after the final norm of real rows of whole sequences; a row sees its own segment up to its position.

        Args:
            adapted: let real rows meet the LoRA too: standard LoRA, to show what the gate prevents.
            keep: return the rows' keys and values, stacked by layer, for mask blocks to see.
        """
        g = self.g
        x = nn.with_logical_constraint(self._embedded(tokens), ("batch", "rows", None))
        every, kinds = g.kinds
        windows = [kind.window for kind in every]
        visible = jnp.stack([visibility(positions, positions, segments, segments, window) for window in windows])
        cos, sin = _angles(every, positions, positions.max(axis=1, keepdims=True) + 1)
        scores_of = Scores.of(g)

        def attention(q: Array, held: LayerCache, kind: Any) -> Array:
            if self.attention == "xla" or misfit(self.attention, q.shape[1], g.H, q.dtype, scores_of):
                return attend_rows(q, held, visible[kind], scores_of)
            return flash(self.attention, q, held, visible, segments, windows, kind, scores_of.scale)

        def body(layer: Layer, x: Array, kind: Any) -> tuple[Array, LayerCache | None]:
            return layer.real(x, cos, sin, kind, adapted, keep, attention)

        if self.scanned:
            x, kept = self._scan(self._rematerialised(body))(self.layers, x, jnp.asarray(kinds))
        else:
            kept = None
            for layer, kind in zip(self.layer, kinds, strict=True):
                x, _ = body(layer, x, kind)
        return self.norm(x), kept

    def step(
        self,
        tokens: Int[Array, "B R"],
        start: Int[Array, " B"],
        cache: Cache,
        masks: MaskRows | None = None,
        fused: Any = None,
        first: bool = False,
        lengths: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B R D"], Float[Array, "B Q D"], Cache]:
        """Latents of real rows and of mask rows after the final norm, and the cache with the real rows written.

        Real rows are consecutive from position `start`; each sees every slot up to its position. A mask row sees the
        slots up to its anchor and the masks of its own block up to itself.

        Args:
            fused: for each layer what `Layer.step` takes, see there; stacked, under `layers`, where layers are scanned.
            first: nothing is in the cache yet, `start` being 0.
            lengths: of the prompts, in prefill: see `angles`.
        """
        B, R = tokens.shape
        m = jnp.zeros((0, self.g.D)) if masks is None else masks.embeddings
        x = self._embedded(tokens)
        x = jnp.concatenate([x, jnp.broadcast_to(m.astype(self.dtype), (B, *m.shape[-2:]))], axis=1)
        rows, (_, kinds) = step_rows(self.g, start, R, masks, lengths), self.g.kinds
        slots = jnp.arange((cache if isinstance(cache, LayerCache) else cache[0]).k.shape[-2])
        visible = (rows.low[..., None] <= slots) & (slots < rows.high[..., None])

        def body(layer: Layer, x: Array, kind: Any, cache: LayerCache, fused: Any) -> tuple[Array, LayerCache]:
            return layer.step(x, rows, kind, cache, visible, fused, R, first)

        if self.scanned:
            assert isinstance(cache, LayerCache)
            x, cache = self._scan(body)(self.layers, x, jnp.asarray(kinds), cache, (fused or {}).get("layers", {}))
        else:
            written = []
            assert not isinstance(cache, LayerCache)
            for i, (layer, of_layer) in enumerate(zip(self.layer, cache, strict=True)):
                x, layer_cache = body(layer, x, kinds[i], of_layer, (fused or {}).get(f"layer_{i}", {}))
                written.append(layer_cache)
            cache = written
        x = self.norm(x)
        return x[:, :R], x[:, R:], cache

    def masks(
        self,
        embeddings: Float[Array, "M D"] | Float[Array, "B G M D"],
        blocks: Blocks,
        keys: RealRows,
        real: LayerCache,
        chunk: int | None = None,
    ) -> Float[Array, "B G M D"]:
        """Latents of all mask rows after the final norm.

        Args:
            embeddings: of the mask tokens m_1..m_M, of all blocks alike or of each its own.
            blocks: the anchors; `keys` and `real` describe the real rows, as `__call__` kept them or in a cache.
            chunk: how many blocks' attention scores exist at a time; as many as fit by default.
        """
        g, M = self.g, embeddings.shape[-2]
        m = jnp.broadcast_to(embeddings.astype(self.dtype), (*blocks.anchors.shape, M, g.D))
        positions = blocks.positions[..., None] + 1 + jnp.arange(M)
        every, kinds = g.kinds
        cos, sin = _angles(every, positions)
        # A window that no distance reaches stands for none, so that one compiled layer serves all kinds.
        windowed = any(kind.window is not None for kind in every)
        windows = jnp.asarray([kind.window or jnp.iinfo(jnp.int32).max for kind in every]) if windowed else None

        rows = blocks.anchors.size * M // parts_of("batch")
        parts = -(-rows // _MLP_ROWS) if self.remat == "full" else 1

        def body(layer: Layer, m: Array, kind: Any, real: LayerCache) -> tuple[Array, None]:
            of_kind = cos[kind], sin[kind], None if windows is None else windows[kind]
            return layer.masks(m, *of_kind, blocks, keys, real, chunk, parts, self.mask_tiles), None

        m, _ = self._scan(self._rematerialised(body))(self.layers, m, jnp.asarray(kinds), real)
        return self.norm(m)

    def logits(self, latents: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """The base head, float32."""
        return head(latents, self.unembedding(), self.g)

    def embeddings(self, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
        """Input embeddings of tokens, in the dtype they are stored in."""
        rows = self.embed()[tokens]
        return rows if self.g.embed_scale == 1 else rows * jnp.asarray(self.g.embed_scale, rows.dtype)

    def _embedded(self, tokens: Int[Array, "B R"]) -> Float[Array, "B R D"]:
        return self.embeddings(tokens).astype(self.dtype)

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


def head(latents: Float[Array, "... D"], unembedding: Float[Array, "V D"], g: Geometry) -> Float[Array, "... V"]:
    """Logits, float32."""
    table = unembedding.astype(latents.dtype)
    return as_logits(jnp.einsum("...d,vd->...v", latents, table, preferred_element_type=jnp.float32), g)


def as_logits(products: Float[Array, "..."], g: Geometry) -> Float[Array, "..."]:
    """Products of latents and rows of the base head's table as logits."""
    return capped(products if g.logit_divisor == 1 else products / g.logit_divisor, g.logit_cap)


class _Table(nn.Module):
    """An embedding table [V, D], used as input embedding or as unembedding."""

    V: int
    D: int

    @nn.compact
    def __call__(self) -> Float[Array, "V D"]:
        return self.param("embedding", nn.initializers.zeros, (self.V, self.D))
