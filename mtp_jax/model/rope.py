"""Rotary position embeddings: frequencies from `config.json`, in every scaling the supported families use."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
_REQUIRED = {
    "longrope": ("short_factor", "long_factor"),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


@dataclass(frozen=True)
class Rope:
    """Angular frequency of each pair of head dimensions, and the factor that scales cos and sin (yarn).

    `dynamic` scaling changes the frequencies with the length of a sequence beyond `max_position_embeddings`, `long`
    (longrope) has others beyond the original length. With fewer frequencies than H/2 the rest of a head stays as it is.
    """

    inv_freq: tuple[float, ...]  # up to [H/2], radians per position
    scale: float = 1.0
    context: int = 0  # positions that the scaling reaches
    # theta and its exponent, factor, and the length beyond which frequencies change
    dynamic: tuple[float, float, float, int] | None = None
    long: tuple[tuple[float, ...], int] | None = None  # frequencies, and the length beyond which they are these

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        H: int,
        max_positions: int,
        where: str,
        faults: list[str],
        kinds: tuple[str, ...] = _KINDS,
        partial: bool = False,
    ) -> "Rope":
        """Read `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4); faults are appended.

        Args:
            kinds: of scaling that the family knows.
            partial: it may rotate a part of each head only.
        """
        rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if any(isinstance(value, dict) for value in rope.values()):
            kind = "a different one per layer type"
        if "longrope" in kinds and kind in ("su", "yarn"):  # its names in older checkpoints
            kind = "longrope"
        if kind not in kinds:
            faults.append(f"{where}: RoPE scaling {kind!r} is not supported, only {', '.join(kinds)}.")
            return cls(())
        missing = [key for key in _REQUIRED.get(kind, ()) if rope.get(key) is None]
        if missing:
            faults.append(f"{where}: RoPE scaling {kind!r} needs {', '.join(missing)} beside it.")
            return cls(())
        share = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
        if share != 1.0 and not (partial and 0 < share < 1 and int(H * share) % 2 == 0):
            faults.append(f"{where}: partial_rotary_factor={share} is not supported, only 1.0.")
            return cls(())
        H = int(H * share)  # that are rotated
        theta = np.float32(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0)
        original = (
            config.get("original_max_position_embeddings")
            or rope.get("original_max_position_embeddings")
            or max_positions
        )
        # float32 throughout, in the order in which the models were trained, so that angles agree to the last bit.
        plain = np.float32(1) / theta ** (np.arange(0, H, 2, dtype=np.float32) / np.float32(H))
        scale, long = 1.0, None
        if kind == "longrope":
            if any(len(rope[key]) != H // 2 for key in _REQUIRED[kind]):
                faults.append(f"{where}: short_factor and long_factor of RoPE must hold {H // 2} numbers each.")
                return cls(())
            plain, extended, scale = _longrope(theta, rope, original, max_positions)
            long = tuple(float(f) for f in extended), original
        elif kind == "linear":
            plain = plain / np.float32(rope["factor"])
        elif kind == "llama3":
            plain = _llama3(plain, rope, original)
        elif kind == "yarn":
            plain, scale = _yarn(plain, float(theta), rope, original)
        # Scaling reaches `factor` times the original length (transformers, modeling_rope_utils.py), and configs give
        # that product or the original length as max_position_embeddings; llama3 models otherwise what they reach.
        if kind in ("linear", "dynamic", "yarn") or (kind == "llama3" and max_positions <= original):
            context = max(max_positions, int(rope["factor"] * original))
        else:
            context = max_positions
        dynamic = (float(theta), H / (H - 2), float(rope["factor"]), max_positions) if kind == "dynamic" else None
        return cls(tuple(float(f) for f in plain), scale, context, dynamic, long)


def _longrope(
    theta: np.float32, rope: Mapping[str, Any], original: int, max_positions: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """LongRoPE (arXiv 2402.13753): a factor for each frequency, others beyond the original length, and a scale."""
    short, long = (np.asarray(rope[key], np.float32) for key in _REQUIRED["longrope"])
    bases = theta ** (np.arange(0, 2 * len(short), 2, dtype=np.float32) / np.float32(2 * len(short)))
    factor = rope.get("factor") or max_positions / original
    scale = rope.get("attention_factor")
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return np.float32(1) / (short * bases), np.float32(1) / (long * bases), float(scale)


def _llama3(plain: np.ndarray, rope: Mapping[str, Any], original: int) -> np.ndarray:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], np.float32(rope["factor"])
    wavelength = np.float32(2 * math.pi) / plain
    smooth = (np.float32(original) / wavelength - np.float32(low)) / np.float32(high - low)
    between = (1 - smooth) * plain / factor + smooth * plain
    stretched = np.where(wavelength > original / low, plain / factor, between)
    return np.where(wavelength < original / high, plain, stretched).astype(np.float32)


def _yarn(plain: np.ndarray, theta: float, rope: Mapping[str, Any], original: int) -> tuple[np.ndarray, float]:
    """YaRN (arXiv 2309.00071, section 3): a ramp from kept to interpolated frequencies, and a scale on cos and sin."""
    factor, H = float(rope["factor"]), 2 * len(plain)

    def dimension(rotations: float) -> float:
        return H * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, H - 1)
    ramp = np.clip((np.arange(H // 2, dtype=np.float32) - low) / ((high - low) or 0.001), 0, 1).astype(np.float32)

    def magnitude(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    scale = rope.get("attention_factor")
    if scale is None:
        m, m_all = rope.get("mscale"), rope.get("mscale_all_dim")
        scale = magnitude(m) / magnitude(m_all) if m and m_all else magnitude(1.0)
    return plain / np.float32(factor) * ramp + plain * (1 - ramp), float(scale)


def angles(
    rope: Rope, positions: Int[Array, "*rows"], lengths: Int[Array, "*lengths"] | None = None
) -> tuple[Float[Array, "*rows 1 half"], Float[Array, "*rows 1 half"]]:
    """Cosine and sine of every position's rotation, float32, to be shared by all layers and heads.

    Args:
        lengths: of the sequences that are computed at once, to broadcast with `positions`; dynamic scaling counts these
            tokens, as longrope does, and by default those up to a position, as in decoding one by one.
    """
    inv_freq = jnp.asarray(rope.inv_freq, jnp.float32)
    if rope.long is not None:
        frequencies, unchanged = rope.long
        count = positions + 1 if lengths is None else jnp.maximum(positions + 1, lengths)
        inv_freq = jnp.where((count > unchanged)[..., None, None], jnp.asarray(frequencies, jnp.float32), inv_freq)
    if rope.dynamic is not None:
        (theta, exponent, factor, unchanged), H = rope.dynamic, 2 * len(rope.inv_freq)
        count = positions + 1 if lengths is None else jnp.maximum(positions + 1, lengths)
        base = theta * (factor * count.astype(jnp.float32) / unchanged - (factor - 1)) ** exponent
        changed = 1 / base[..., None, None] ** (jnp.arange(0, H, 2, dtype=jnp.float32) / H)
        inv_freq = jnp.where((count > unchanged)[..., None, None], changed, inv_freq)
    angle = positions[..., None, None].astype(jnp.float32) * inv_freq
    return jnp.cos(angle) * rope.scale, jnp.sin(angle) * rope.scale


def rotate(
    x: Float[Array, "*rows heads H"], cos: Float[Array, "*rows 1 half"], sin: Float[Array, "*rows 1 half"]
) -> Float[Array, "*rows heads H"]:
    """Rotate the pairs (h, h + H/2) of every head, in x's dtype as the checkpoints were trained.

    With fewer angles than H/2 the head's first part is rotated so, and the rest stays.
    """
    cos, sin, half = cos.astype(x.dtype), sin.astype(x.dtype), cos.shape[-1]
    first, second, rest = jnp.split(x, [half, 2 * half], axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
