"""Which row sees which key, the key/value cache, and grouped-query attention over both."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mtp_jax.model.geometry import Geometry


class LayerCache(NamedTuple):
    """Keys and values of one layer, slot s holding the token at position s of each row."""

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]

    def write(self, k: Float[Array, "B R K H"], v: Float[Array, "B R K H"], start: Int[Array, " B"]) -> "LayerCache":
        """Store R consecutive rows from position `start` of each sequence; S must be at least start + R."""
        at = jax.vmap(lambda cache, rows, i: jax.lax.dynamic_update_slice_in_dim(cache, rows, i, axis=0))
        return LayerCache(at(self.k, k.astype(self.k.dtype), start), at(self.v, v.astype(self.v.dtype), start))


def empty_cache(g: Geometry, batch: int, slots: int, dtype: jnp.dtype, stacked: bool) -> LayerCache | list[LayerCache]:
    """A cache of zeros: one stacked [L, ...] for scanned layers, else one per layer."""
    shape = (batch, slots, g.K, g.H)
    if stacked:
        return LayerCache(jnp.zeros((g.L, *shape), dtype), jnp.zeros((g.L, *shape), dtype))
    return [LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(g.L)]


def visibility(
    positions: Int[Array, "B R"],
    key_positions: Int[Array, "B S"],
    segments: Int[Array, "B R"] | None = None,
    key_segments: Int[Array, "B S"] | None = None,
    window: int | None = None,
) -> Bool[Array, "B R S"]:
    """A row sees the keys of its own segment up to its position, the last `window` of them where there is a window."""
    distance = positions[:, :, None] - key_positions[:, None, :]
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    if segments is not None:
        assert key_segments is not None
        visible &= segments[:, :, None] == key_segments[:, None, :]
    return visible


def attend(
    q: Float[Array, "B R N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    visible: Bool[Array, "B R S"],
) -> Float[Array, "B R N H"]:
    """Softmax attention, each key/value head serving N/K query heads; scores and softmax in float32."""
    B, R, N, H = q.shape
    K = k.shape[2]
    # Heads before rows and a key/value head's queries side by side: plain batched products, twice as fast on CPU.
    grouped = q.reshape(B, R, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, N // K * R, H)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    scores = jnp.einsum("bkqh,bksh->bkqs", grouped, k, preferred_element_type=jnp.float32) * H**-0.5
    scores = scores.reshape(B, K, N // K, R, -1)
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(B, K, N // K * R, -1)
    out = jnp.einsum("bkqs,bksh->bkqh", weights, v).reshape(B, K, N // K, R, H)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, R, N, H)


class Blocks(NamedTuple):
    """G blocks of M mask rows per sequence, each anchored to a key (method.md, section 1).

    Mask j = 1..M of a block has position p + j, p being its anchor's; it sees keys up to its anchor and the masks of
    its own block up to itself.
    """

    anchors: Int[Array, "B G"]  # index of the anchor among the keys
    positions: Int[Array, "B G"]  # position of the anchor
    segments: Int[Array, "B G"] | None = None  # document of the anchor; 0 for a block that only fills the array


class Keys(NamedTuple):
    """What blocks see of the real rows besides keys and values."""

    positions: Int[Array, "B S"]
    segments: Int[Array, "B S"] | None = None


def attend_blocks(
    q: Float[Array, "B G M N H"],
    own: LayerCache,
    real: LayerCache,
    blocks: Blocks,
    keys: Keys,
    window: Int[Array, ""] | int | None,
    chunk: int,
) -> Float[Array, "B G M N H"]:
    """Attention of mask rows: one softmax over the prefix up to the anchor and the own block up to the row.

    The scores of `chunk` blocks exist at a time. `own` is [B, G, M, K, H], `real` [B, S, K, H]; a block of segment 0
    sees itself alone. Plain XLA, so that gradients reach q, own, and real where real depends on what is trained.
    """
    B, G, M, N, H = q.shape
    c = min(chunk, G)
    count = -(-G // c)

    def cut(leaf: Array) -> Array:
        leaf = jnp.pad(leaf, [(0, 0), (0, count * c - G)] + [(0, 0)] * (leaf.ndim - 2))
        return jnp.moveaxis(leaf.reshape(B, count, c, *leaf.shape[2:]), 1, 0)

    def part(of: tuple[Array, LayerCache, Blocks]) -> Array:
        return _attend_chunk(*of, real, keys, window)

    pieces = jax.tree.map(cut, (q, own, blocks))
    if count == 1:
        return part(jax.tree.map(lambda x: x[0], pieces))[:, :G]
    out = jax.lax.map(jax.checkpoint(part), pieces)
    return jnp.moveaxis(out, 0, 1).reshape(B, count * c, M, N, H)[:, :G]


def _attend_chunk(
    q: Float[Array, "B c M N H"],
    own: LayerCache,
    blocks: Blocks,
    real: LayerCache,
    keys: Keys,
    window: Int[Array, ""] | int | None,
) -> Float[Array, "B c M N H"]:
    B, c, M, N, H = q.shape
    K = real.k.shape[2]
    n = N // K
    # [B, K, n, c, M, .]: the rows that share a key/value head side by side.
    heads = q.reshape(B, c, M, K, n, H).transpose(0, 3, 4, 1, 2, 5)
    k, v = real.k.swapaxes(1, 2), real.v.swapaxes(1, 2)
    own_k, own_v = own.k.transpose(0, 3, 1, 2, 4), own.v.transpose(0, 3, 1, 2, 4)  # [B, K, c, M, H]

    rows = heads.reshape(B, K, n * c * M, H)
    prefix = jnp.einsum("bkqh,bksh->bkqs", rows, k, preferred_element_type=jnp.float32) * H**-0.5
    inside = jnp.einsum("bkncmh,bkcjh->bkncmj", heads, own_k, preferred_element_type=jnp.float32) * H**-0.5

    index, offset = jnp.arange(k.shape[2]), jnp.arange(M)
    seen = index <= blocks.anchors[..., None]  # [B, c, S]
    if blocks.segments is not None:
        assert keys.segments is not None
        seen &= (blocks.segments[..., None] == keys.segments[:, None]) & (blocks.segments[..., None] != 0)
    seen = seen[:, :, None]  # [B, c, 1, S], or [B, c, M, S] with a window
    causal = offset[:, None] >= offset[None, :]
    if window is not None:  # measured from a row's own position
        distance = (blocks.positions[..., None] + 1 + offset)[..., None] - keys.positions[:, None, None]
        seen = seen & (distance < window)
        causal &= offset[:, None] - offset[None, :] < window
    lowest = jnp.finfo(jnp.float32).min
    prefix = jnp.where(seen[:, None, None], prefix.reshape(B, K, n, c, M, -1), lowest)
    inside = jnp.where(causal, inside, lowest)

    # One softmax over two parts, joined by their common maximum. A row always sees itself, so that it is finite.
    top = jax.lax.stop_gradient(jnp.maximum(prefix.max(-1), inside.max(-1)))[..., None]
    prefix, inside = jnp.exp(prefix - top), jnp.exp(inside - top)
    total = prefix.sum(-1) + inside.sum(-1)
    out = jnp.einsum("bkqs,bksh->bkqh", prefix.astype(v.dtype).reshape(B, K, n * c * M, -1), v)
    out = out.reshape(B, K, n, c, M, H) + jnp.einsum("bkncmj,bkcjh->bkncmh", inside.astype(v.dtype), own_v)
    return (out / total[..., None].astype(out.dtype)).transpose(0, 3, 4, 1, 2, 5).reshape(B, c, M, N, H)
