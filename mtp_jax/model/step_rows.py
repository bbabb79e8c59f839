"""The rows of a decoding step: real rows, then mask rows in blocks; where they stand and what they see."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mtp_jax.model.geometry import Geometry, Kind
from mtp_jax.model.rope import Rope, angles


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
    cos, sin = angles_of(kinds, positions, None if lengths is None else lengths[:, None])
    return StepRows(start, cos, sin, low, high, own)


def angles_of(
    kinds: list[Kind], positions: Int[Array, "*rows"], lengths: Int[Array, "*lengths"] | None = None
) -> tuple[Float[Array, "kinds *rows 1 half"], Float[Array, "kinds *rows 1 half"]]:
    """Cosine and sine for each kind of layer; where queries and keys are not rotated, by an angle of 0."""
    width = max(len(kind.rope.inv_freq) if kind.rope else 1 for kind in kinds)
    pairs = [angles(kind.rope or Rope((0.0,) * width), positions, lengths) for kind in kinds]
    return jnp.stack([cos for cos, _ in pairs]), jnp.stack([sin for _, sin in pairs])
