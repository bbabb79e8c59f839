"""Blocks of masks behind anchors, and what each mask row is to predict (docs/how-it-works.md, sections 1 and 6)."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mtp_jax.model.attention import Blocks


@dataclass(frozen=True)
class Noise:
    """Mask rows that hold embeddings of random tokens in place of learned ones: of the ids low, ..., high - 1."""

    low: int
    high: int


@dataclass(frozen=True)
class Anchors:
    """How many blocks of masks a sequence has: `count`, chosen by hash, or one behind every row (None)."""

    count: int | None
    seed: int
    noise: Noise | None = None  # what the blocks' rows hold; None for learned embeddings
    masks: int = 0  # M, rows of a block; needed for noise alone


def hash_positions(seed: int, epoch: int, document: int, positions: np.ndarray) -> np.ndarray:
    """A 64-bit hash of every position of a document: a pure function of its arguments.

    Anchors are chosen by it, and noise drawn, so that they depend on neither packing nor devices.
    """
    mixed = np.asarray(seed, np.uint64)
    for value in (np.uint64(epoch), np.uint64(document), positions.astype(np.uint64)):
        mixed = _mixed(mixed, value)
    return mixed


def _mixed(hashes: Any, value: Any) -> Any:
    """Hashes of what was hashed and one value more, as in splitmix64."""
    with np.errstate(over="ignore"):
        mixed = (hashes ^ value) + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


def add_blocks(rows: dict[str, np.ndarray], wanted: Anchors) -> None:
    """Put a sequence's `anchors`, and the `noise` of its blocks if it has any, in place of its rows' `hashes`."""
    hashes = rows.pop("hashes")
    anchors = rows["anchors"] = choose_anchors(hashes, rows["supervised"], rows["segments"], wanted.count)
    if wanted.noise is not None:
        rows["noise"] = noise_ids(hashes[np.maximum(anchors, 0)], wanted.masks, wanted.noise)


def noise_ids(hashes: np.ndarray, masks: int, noise: Noise) -> np.ndarray:
    """[G, M] int32: the token ids of the rows of blocks whose anchors have these hashes, [G]."""
    drawn = _mixed(hashes[:, None], np.arange(1, masks + 1, dtype=np.uint64))
    return (drawn % np.uint64(noise.high - noise.low)).astype(np.int32) + np.int32(noise.low)


def choose_anchors(hashes: np.ndarray, supervised: np.ndarray, segments: np.ndarray, count: int | None) -> np.ndarray:
    """Anchors of a sequence in ascending order, -1 where there are fewer than asked for.

    A block may stand behind every row whose output is supervised (so behind the last prompt token and none before it)
    and whose next row is in the same document, for without one no mask has a target.

    Args:
        hashes: [T] uint64, see `hash_positions`.
        supervised: [T] bool, whether the row's next token is supervised.
        segments: [T] int32, document of each row.
        count: G anchors, those of the smallest hashes; None for a block behind every row that may have one, G = T.
    Returns:
        [G] int32 row numbers.
    """
    fits = supervised & np.append(segments[1:] == segments[:-1], False) & (segments != 0)
    rows = np.flatnonzero(fits)
    G = len(segments) if count is None else count
    if len(rows) > G:
        rows = np.sort(rows[np.argsort(hashes[rows], kind="stable")[:G]])
    return np.pad(rows, (0, G - len(rows)), constant_values=-1).astype(np.int32)


class Targets(NamedTuple):
    """What every mask row m_j behind anchor i is trained on, and the noise it holds; [B, G, M] each."""

    row: Int[Array, "B G M"]  # the real row i+j of equal position, which predicts the same token
    exists: Bool[Array, "B G M"]  # whether that row is in the same document
    label: Int[Array, "B G M"]  # x_{i+j+1}
    labelled: Bool[Array, "B G M"]  # whether that label exists and is supervised
    previous: Int[Array, "B G M"]  # x_{i+j}, which the sampler is teacher-forced with
    share: Float[Array, "B G M"]  # 1/|S(t)|, S(t) being the mask rows of position t; 0 where there is no such row
    noise: Int[Array, "B G M"] | None = None  # token ids whose embeddings the rows hold; None for those of the masks


def blocks_of(anchors: Int[Array, "B G"], positions: Int[Array, "B T"], segments: Int[Array, "B T"]) -> Blocks:
    """The blocks of a batch for the decoder; an anchor of -1 gives a block that sees itself alone."""
    at = jnp.maximum(anchors, 0)
    segment = jnp.where(anchors >= 0, jnp.take_along_axis(segments, at, axis=1), 0)
    return Blocks(at, jnp.take_along_axis(positions, at, axis=1), segment)


def targets_of(
    blocks: Blocks,
    M: int,
    tokens: Int[Array, "B T"],
    labels: Int[Array, "B T"],
    supervised: Bool[Array, "B T"],
    segments: Int[Array, "B T"],
) -> Targets:
    """Targets of all mask rows of a batch."""
    B, T = tokens.shape
    assert blocks.segments is not None
    row = blocks.anchors[..., None] + 1 + jnp.arange(M)
    inside, row = row < T, jnp.minimum(row, T - 1)
    flat = row.reshape(B, -1)

    def at(values: Array) -> Array:
        return jnp.take_along_axis(values, flat, axis=1).reshape(row.shape)

    exists = inside & (at(segments) == blocks.segments[..., None]) & (blocks.segments[..., None] != 0)
    together = jnp.zeros((B, T)).at[jnp.arange(B)[:, None], flat].add(exists.reshape(B, -1))
    share = jnp.where(exists, 1 / jnp.maximum(at(together), 1), 0.0)
    return Targets(row, exists, at(labels), exists & at(supervised), at(tokens), share)
