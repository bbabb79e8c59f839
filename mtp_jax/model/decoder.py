"""The frozen base: a decoder as one pure function of its variables. How families differ is data in the geometry.

`__call__` and `masks` serve training: real rows, then blocks of mask rows that see them. `step` serves prefill and
decoding: both kinds of rows at once, beside a cache. None of them knows losses or drafts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mtp_jax.model.attention import Blocks, LayerCache, RealRows, Scores, attend_rows, visibility
from mtp_jax.model.geometry import Geometry
from mtp_jax.model.head import Head
from mtp_jax.model.kernels import flash, misfit
from mtp_jax.model.layer import Layer, RMSNorm
from mtp_jax.model.mask_kernel import Tiling
from mtp_jax.model.step_rows import MaskRows, angles_of, step_rows
from mtp_jax.sharding import parts_of

REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
# Mask rows that go through the MLP at a time, on each device, where memory counts (remat "full").
_MLP_ROWS = 1024
Cache = LayerCache | Sequence[LayerCache]


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
        if self.g.own_head:
            self.unembed = _Table(self.g.V, self.g.D, self.g.int8)
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
        windows = list(dict.fromkeys(kind.window for kind in every))
        of_kind = [windows.index(kind.window) for kind in every]
        visible = jnp.stack([visibility(positions, positions, segments, segments, window) for window in windows])
        cos, sin = angles_of(every, positions, positions.max(axis=1, keepdims=True) + 1)
        scores_of = Scores.of(g)

        def attention(q: Array, held: LayerCache, kind: Any) -> Array:
            window = jnp.asarray(of_kind)[kind] if len(windows) > 1 else 0
            if self.attention == "xla" or misfit(self.attention, q.shape[1], g.H, q.dtype, scores_of):
                return attend_rows(q, held, visible[window], scores_of)
            return flash(self.attention, q, held, visible, segments, windows, window, scores_of.scale)

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
        cos, sin = angles_of(every, positions)
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
        return self.head()(latents, self.g)

    def embeddings(self, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
        """Input embeddings of tokens, in the dtype they are stored in."""
        rows = self.embed().table[tokens]
        return rows if self.g.embed_scale == 1 else rows * jnp.asarray(self.g.embed_scale, rows.dtype)

    def _embedded(self, tokens: Int[Array, "B R"]) -> Float[Array, "B R D"]:
        return self.embeddings(tokens).astype(self.dtype)

    def head(self) -> Head:
        """The base head, as stored."""
        return self.unembed() if self.g.own_head else self.embed()

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
    """A table [V, D] of input embeddings or of the base head."""

    V: int
    D: int
    int8: bool = False

    @nn.compact
    def __call__(self) -> Head:
        table = self.param("embedding", nn.initializers.zeros, (self.V, self.D))
        scale = self.param("embedding_scale", nn.initializers.zeros, (self.V,)) if self.int8 else None
        return Head(table, scale)
