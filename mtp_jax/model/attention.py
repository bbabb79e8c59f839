"""Which row sees which key, the key/value cache, and grouped-query attention over both."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from mtp_jax.model.chunks import map_chunks
from mtp_jax.model.geometry import Geometry
from mtp_jax.sharding import parts_of

# Float32 attention scores that may exist at a time, on each device.
_SCORE_BYTES = 64 << 20


class LayerCache(NamedTuple):
    """Keys and values of one layer, heads first: in a cache, slot s holds the token at position s."""

    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]

    @classmethod
    def of_rows(cls, k: Float[Array, "B S K H"], v: Float[Array, "B S K H"]) -> "LayerCache":
        """From rows as projections give them."""
        return cls(k.swapaxes(1, 2), v.swapaxes(1, 2))

    def write(self, rows: "LayerCache", start: Int[Array, " B"]) -> "LayerCache":
        """Store consecutive rows from position `start` of each sequence; there must be slots for all of them."""

        def into(cache: Array, rows: Array) -> Array:
            rows = rows.astype(cache.dtype)
            if len(cache) == 1:  # one plain slice; over a batch it becomes a scatter
                return jax.lax.dynamic_update_slice_in_dim(cache, rows, start[0], axis=2)
            return jax.vmap(lambda c, r, i: jax.lax.dynamic_update_slice_in_dim(c, r, i, axis=1))(cache, rows, start)

        return jax.tree.map(into, self, rows)


def empty_cache(g: Geometry, batch: int, slots: int, dtype: DTypeLike, stacked: bool) -> LayerCache | list[LayerCache]:
    """A cache of zeros: one stacked [L, ...] for scanned layers, else one per layer."""
    shape = (batch, g.K, slots, g.H)
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


class Scores(NamedTuple):
    """How products of queries and keys become scores. Hashable, so that it can be static."""

    scale: float
    cap: float | None = None  # c: scores become c tanh(score / c)

    @classmethod
    def of(cls, g: Geometry) -> "Scores":
        """Those of a geometry."""
        return cls(g.H**-0.5 if g.score_scale is None else g.score_scale, g.score_cap)

    def __call__(self, products: Float[Array, "..."]) -> Float[Array, "..."]:
        """Scores, before any is masked."""
        return capped(products * self.scale, self.cap)


def capped(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """c tanh(x / c), or x where there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attend(
    q: Float[Array, "B R N H"],
    held: LayerCache | None,
    visible: Bool[Array, "B R S"] | None,
    scores_of: Scores,
    own: LayerCache | None = None,
    own_visible: Bool[Array, "B R R"] | None = None,
) -> Float[Array, "B R N H"]:
    """Softmax attention, each key/value head serving N/K query heads; scores and softmax in float32.

    One softmax over the keys that are held and over those of the rows themselves; either may be absent.
    """
    B, R, N, H = q.shape
    parts = [(keys, seen) for keys, seen in ((held, visible), (own, own_visible)) if keys is not None]
    K = parts[0][0].k.shape[1]
    # Heads before rows and a key/value head's queries side by side: plain batched products, twice as fast on CPU.
    grouped = q.reshape(B, R, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, N // K * R, H)
    scores = []
    for keys, seen in parts:
        assert seen is not None
        product = scores_of(jnp.einsum("bkqh,bksh->bkqs", grouped, keys.k, preferred_element_type=jnp.float32))
        product = product.reshape(B, K, N // K, R, -1)
        scores.append(jnp.where(seen[:, None, None], product, jnp.finfo(jnp.float32).min))
    weights = jax.nn.softmax(scores[0] if len(scores) == 1 else jnp.concatenate(scores, axis=-1), axis=-1)
    out, start = [], 0
    for keys, _ in parts:
        share = weights[..., start : start + keys.v.shape[2]].astype(keys.v.dtype).reshape(B, K, N // K * R, -1)
        out.append(jnp.einsum("bkqs,bksh->bkqh", share, keys.v))
        start += keys.v.shape[2]
    return sum(out[1:], out[0]).reshape(B, K, N // K, R, H).transpose(0, 3, 1, 2, 4).reshape(B, R, N, H)


def attend_rows(
    q: Float[Array, "B R N H"], held: LayerCache, visible: Bool[Array, "B R S"], scores_of: Scores
) -> Float[Array, "B R N H"]:
    """`attend` for the rows of whole sequences: scores of all heads exist for as many rows at a time as fit."""
    B, _, N, _ = q.shape
    rows = rows_that_fit(B * N * held.k.shape[2])
    return map_chunks(lambda part: attend(part[0], held, part[1], scores_of), (q, visible), rows)


def rows_that_fit(scores: int) -> int:
    """How many rows' (or blocks') attention scores fit in the memory budget, with `scores` each over the batch."""
    return max(1, _SCORE_BYTES * parts_of("batch", "heads") // (4 * scores))


class Blocks(NamedTuple):
    """G blocks of M mask rows per sequence, each anchored to a key (docs/how-it-works.md, section 1).

    Mask j = 1..M of a block has position p + j, p being its anchor's; it sees keys up to its anchor and the masks of
    its own block up to itself.
    """

    anchors: Int[Array, "B G"]  # index of the anchor among the keys
    positions: Int[Array, "B G"]  # position of the anchor
    segments: Int[Array, "B G"] | None = None  # document of the anchor; 0 for a block that only fills the array


class RealRows(NamedTuple):
    """What blocks see of the real rows besides keys and values."""

    positions: Int[Array, "B S"]
    segments: Int[Array, "B S"] | None = None


def attend_blocks(
    q: Float[Array, "B G M N H"],
    own: tuple[Array, Array],
    real: LayerCache,
    blocks: Blocks,
    keys: RealRows,
    window: Int[Array, ""] | int | None,
    chunk: int | None,
    scores_of: Scores,
) -> Float[Array, "B G M N H"]:
    """Attention of mask rows: one softmax over the prefix up to the anchor and the own block up to the row.

    The scores of `chunk` blocks exist at a time, of as many as fit where it is None. `own` is k and v [B, G, M, K, H];
    a block of segment 0 sees itself alone. Plain XLA, so that gradients reach q, own, and real where real depends on
    what is trained.
    """
    B, _, M, N, _ = q.shape
    chunk = rows_that_fit(B * N * M * real.k.shape[2]) if chunk is None else chunk

    def part(of: tuple[Array, tuple[Array, Array], Blocks]) -> Array:
        q, own, blocks = of
        return _attend_chunk(q, own, blocks, real, keys, window, scores_of)

    return map_chunks(part, (q, own, blocks), chunk)


def _attend_chunk(
    q: Float[Array, "B c M N H"],
    own: tuple[Array, Array],
    blocks: Blocks,
    real: LayerCache,
    keys: RealRows,
    window: Int[Array, ""] | int | None,
    scores_of: Scores,
) -> Float[Array, "B c M N H"]:
    B, c, M, N, H = q.shape
    k, v = real
    K = k.shape[1]
    n = N // K
    # [B, K, n, c, M, .]: the rows that share a key/value head side by side.
    heads = q.reshape(B, c, M, K, n, H).transpose(0, 3, 4, 1, 2, 5)
    own_k, own_v = (x.transpose(0, 3, 1, 2, 4) for x in own)  # [B, K, c, M, H]

    rows = heads.reshape(B, K, n * c * M, H)
    prefix = scores_of(jnp.einsum("bkqh,bksh->bkqs", rows, k, preferred_element_type=jnp.float32))
    inside = scores_of(jnp.einsum("bkncmh,bkcjh->bkncmj", heads, own_k, preferred_element_type=jnp.float32))

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
