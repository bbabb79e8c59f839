"""Products of few rows with large matrices on CPU: calls into C++ that read each weight once, in order.

The source, `products.cc`, is compiled on first use with the system's C++ compiler and kept in
~/.cache/mtp_jax/native. Without a compiler, or with MTP_JAX_NATIVE=0, matrices stay as they are and
XLA multiplies them.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

CACHE = "~/.cache/mtp_jax/native"
_SOURCE = Path(__file__).with_name("products.cc")
_CALLS = tuple(
    f"mtp_jax_{name}" for name in ("product", "adapted_product", "attention", "add_norm", "lookup", "largest")
)
_WIDEST = 16  # numbers that C++ takes at once; head widths are multiples of it, or XLA computes attention


@functools.partial(jax.tree_util.register_dataclass, data_fields=["panels"], meta_fields=["ends"])
@dataclass(frozen=True)
class Panels:
    """A float32 matrix, or several side by side, as the C++ product takes it."""

    panels: Float[Array, "P in W"]  # W columns each; a matrix begins one of its own, and its last is filled up
    ends: tuple[int, ...]  # the columns at which the matrices end


@functools.partial(jax.tree_util.register_dataclass, data_fields=["a", "b"], meta_fields=["offsets"])
@dataclass(frozen=True)
class PanelLora:
    """The LoRA of matrices side by side: matrix i reads `inner[:, offsets[i] : offsets[i] + R]`, inner being x A."""

    a: Panels
    b: Panels  # R rows, cut like the matrices it is added to
    offsets: tuple[int, ...]


Matrix = Float[Array, "in out"] | Panels


def pack(*matrices: Float[Array, "in out"]) -> Panels:
    """Matrices side by side, in panels; where the C++ product is at hand."""
    library = _library()
    assert library is not None
    W = library.mtp_jax_panel_width()
    filled = [jnp.pad(matrix, ((0, 0), (0, -matrix.shape[1] % W))) for matrix in matrices]
    panels = [matrix.reshape(len(matrix), -1, W).swapaxes(0, 1) for matrix in filled]
    ends = np.cumsum([matrix.shape[1] for matrix in matrices]).tolist()
    return Panels(jnp.concatenate(panels), tuple(ends))


def times(x: Float[Array, "... in"], w: Matrix) -> Float[Array, "... out"]:
    """x W."""
    if not isinstance(w, Panels):
        return x @ w.astype(x.dtype)
    out = jax.ShapeDtypeStruct((x.size // x.shape[-1], w.ends[-1]), jnp.float32)
    call = jax.ffi.ffi_call("mtp_jax_product", out)
    return call(x.reshape(-1, x.shape[-1]), w.panels, ends=_numbers(w.ends)).reshape(*x.shape[:-1], -1)


def adapted_times(x: Float[Array, "B R in"], real: int, w: Panels, lora: PanelLora) -> Float[Array, "B R out"]:
    """x W for the first `real` rows of each sequence, x W + (x A) B for the others."""
    B, R, _ = x.shape
    y = jax.ShapeDtypeStruct((B, R, w.ends[-1]), jnp.float32)
    inner = jax.ShapeDtypeStruct((B, R - real, lora.a.ends[-1]), jnp.float32)
    call = jax.ffi.ffi_call("mtp_jax_adapted_product", (y, inner))
    ends, inner_ends, offsets = map(_numbers, (w.ends, lora.a.ends, lora.offsets))
    return call(x, w.panels, lora.a.panels, lora.b.panels, ends=ends, inner_ends=inner_ends, offsets=offsets)[0]


def _numbers(numbers: tuple[int, ...]) -> np.ndarray:
    return np.asarray(numbers, np.int64)


def attends(width: int) -> bool:
    """Whether the C++ attention takes heads so wide."""
    return width % _WIDEST == 0


def attend_slots(
    projected: Float[Array, "B R N+2K H"],
    angles: tuple[Float[Array, "B R 1 H/2"], Float[Array, "B R 1 H/2"]],
    held: tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]],
    low: Int[Array, "B R"],
    high: Int[Array, "B R"],
    own_visible: Bool[Array, "B R R"],
) -> tuple[Float[Array, "B R N H"], Float[Array, "B K R H"], Float[Array, "B K R H"]]:
    """Softmax attention of rows over slots low <= s < high of a cache, and over those of their own keys they see.

    Args:
        projected: queries, keys and values, not yet rotated.
        angles: cosines and sines of the rows' positions.
    Returns:
        What the rows attended to, and their own rotated keys and values, as the cache holds them.
    """
    B, R, heads, H = projected.shape
    K = held[0].shape[1]
    out = jax.ShapeDtypeStruct((B, R, heads - 2 * K, H), jnp.float32)
    own = jax.ShapeDtypeStruct((B, K, R, H), jnp.float32)
    call = jax.ffi.ffi_call("mtp_jax_attention", (out, own, own))
    return call(projected, *angles, *held, low, high, own_visible)


def add_norm(
    x: Float[Array, "... D"], added: Float[Array, "... D"], scale: Float[Array, " D"], epsilon: float
) -> tuple[Float[Array, "... D"], Float[Array, "... D"]]:
    """x + added, and its root-mean-square norm."""
    rows = jax.ShapeDtypeStruct((x.size // x.shape[-1], x.shape[-1]), jnp.float32)
    call = jax.ffi.ffi_call("mtp_jax_add_norm", (rows, rows))
    total, normed = call(x.reshape(rows.shape), added.reshape(rows.shape), scale, epsilon=np.float32(epsilon))
    return total.reshape(x.shape), normed.reshape(x.shape)


def look_up(x: Float[Array, "B D"], table: Float[Array, "V D"], ids: Int[Array, "B C"]) -> Float[Array, "B C"]:
    """x by its own rows `ids` of a table."""
    return jax.ffi.ffi_call("mtp_jax_lookup", jax.ShapeDtypeStruct(ids.shape, jnp.float32))(x, table, ids)


def largest(x: Float[Array, "... V"], classes: int) -> Int[Array, "... C"]:
    """The first index of the largest number of each class; those are in one class that are equal modulo `classes`."""
    rows = x.reshape(-1, x.shape[-1])
    out = jax.ShapeDtypeStruct((len(rows), classes), jnp.int32)
    return jax.ffi.ffi_call("mtp_jax_largest", out)(rows).reshape(*x.shape[:-1], classes)


def native() -> bool:
    """Whether the C++ product is at hand: on CPU, with a compiler or a library that one has built before."""
    return jax.default_backend() == "cpu" and os.environ.get("MTP_JAX_NATIVE") != "0" and _library() is not None


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The library, its calls made known to XLA; None where it cannot be had."""
    try:
        library = ctypes.CDLL(str(_build()))
    except (OSError, subprocess.SubprocessError):
        return None
    for name in _CALLS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return library


def _build() -> Path:
    """The library for this processor, this source and this JAX."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("no C++ compiler")
    command = [
        compiler,
        "-std=c++17",
        "-O3",
        "-march=native",
        "-w",
        "-shared",
        "-fPIC",
        "-pthread",
        "-I",
        jax.ffi.include_dir(),
    ]
    told = (_SOURCE.read_text(), *command, jax.__version__, _processor())
    name = hashlib.sha256("\0".join(told).encode()).hexdigest()[:24]
    folder = Path(CACHE).expanduser()
    library = folder / f"{name}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            part = Path(scratch) / "products.so"
            subprocess.run([*command, str(_SOURCE), "-o", str(part)], check=True, capture_output=True, timeout=300)
            part.replace(library)
    return library


def _processor() -> str:
    """What -march=native may depend on, so that a home folder can serve several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
