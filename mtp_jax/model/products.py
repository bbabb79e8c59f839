"""Products of few rows with large matrices on CPU: a call into C++ that reads each weight once (`products.cc`).

The source is compiled on first use with the system's C++ compiler and kept in ~/.cache/mtp_jax/native. Without a
compiler, or with MTP_JAX_NATIVE=0, matrices stay as they are and XLA multiplies them.
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
_CALLS = ("mtp_jax_product", "mtp_jax_adapted_product", "mtp_jax_attention")
_WIDEST = 16  # numbers that C++ takes at once; head widths are multiples of it, or XLA computes attention


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Transposed:
    """A float32 matrix as the C++ product takes it."""

    rows: Float[Array, "out in"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["a", "b"], meta_fields=["ends", "offsets"])
@dataclass(frozen=True)
class TransposedLora:
    """The LoRA of joined projections as the C++ product takes it: no zeros between their blocks.

    Columns of the product up to `ends[i]` read `inner[:, offsets[i] : offsets[i] + R]`, inner being x A.
    """

    a: Float[Array, "C in"]
    b: Float[Array, "out R"]
    ends: tuple[int, ...]
    offsets: tuple[int, ...]


Matrix = Float[Array, "in out"] | Transposed


def times(x: Float[Array, "... in"], w: Matrix) -> Float[Array, "... out"]:
    """x W."""
    if not isinstance(w, Transposed):
        return x @ w.astype(x.dtype)
    out = jax.ShapeDtypeStruct((x.size // x.shape[-1], len(w.rows)), jnp.float32)
    y = jax.ffi.ffi_call("mtp_jax_product", out)(x.reshape(-1, x.shape[-1]), w.rows)
    return y.reshape(*x.shape[:-1], -1)


def adapted_times(x: Float[Array, "B R in"], real: int, w: Transposed, lora: TransposedLora) -> Float[Array, "B R out"]:
    """x W for the first `real` rows of each sequence, x W + (x A) B for the others."""
    B, R, _ = x.shape
    y = jax.ShapeDtypeStruct((B, R, len(w.rows)), jnp.float32)
    inner = jax.ShapeDtypeStruct((B, R - real, len(lora.a)), jnp.float32)
    ends, offsets = (np.asarray(numbers, np.int64) for numbers in (lora.ends, lora.offsets))
    call = jax.ffi.ffi_call("mtp_jax_adapted_product", (y, inner))
    return call(x, w.rows, lora.a, lora.b, ends=ends, offsets=offsets)[0]


def attends(width: int) -> bool:
    """Whether the C++ attention takes heads so wide."""
    return width % _WIDEST == 0


def attend_slots(
    q: Float[Array, "B R N H"],
    held: tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]],
    low: Int[Array, "B R"],
    high: Int[Array, "B R"],
    own: tuple[Float[Array, "B K R H"], Float[Array, "B K R H"]],
    own_visible: Bool[Array, "B R R"],
) -> Float[Array, "B R N H"]:
    """Softmax attention of rows over slots low <= s < high of a cache, and over those of their own keys they see."""
    out = jax.ShapeDtypeStruct(q.shape, jnp.float32)
    return jax.ffi.ffi_call("mtp_jax_attention", out)(q, *held, *own, low, high, own_visible)


def native() -> bool:
    """Whether the C++ product is at hand: on CPU, with a compiler or a library that one has built before."""
    return jax.default_backend() == "cpu" and os.environ.get("MTP_JAX_NATIVE") != "0" and _register()


@functools.cache
def _register() -> bool:
    try:
        library = ctypes.CDLL(str(_build()))
    except (OSError, subprocess.SubprocessError):
        return False
    for name in _CALLS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return True


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
