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
