"""The C++ calls: compiling them, and what each takes and gives as arrays."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from mtp_jax.files import cache_folder, scratch_folder
from mtp_jax.model.attention import LayerCache
from mtp_jax.model.step_rows import StepRows

CACHE = "~/.cache/mtp_jax/native"
_SOURCE = Path(__file__).with_name("bindings.cc")
_CALLS = ("product", "layers", "largest")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-Wall", "-Wextra", "-shared", "-fPIC", "-pthread")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["panels", "scale"], meta_fields=["ends"])
@dataclass(frozen=True)
class Panels:
    """A matrix, or several side by side, as the C++ product takes it."""

    # [P, in, W]: W columns each; a matrix begins one of its own, and its last is filled up. Where whole numbers meet
    # rows of whole numbers [P, in / 4, W, 4], larger by 128.
    panels: Any
    ends: tuple[int, ...]  # the columns at which the matrices end
    scale: Any = None  # of each column, where numbers are whole


@functools.partial(jax.tree_util.register_dataclass, data_fields=["a", "b"], meta_fields=["offsets"])
@dataclass(frozen=True)
class PanelLora:
    """The LoRA of matrices side by side: matrix i reads `inner[:, offsets[i] : offsets[i] + R]`, inner being x A."""

    a: Panels
    b: Panels  # R rows, cut like the matrices it is added to
    offsets: tuple[int, ...]


class PanelLayer(NamedTuple):
    """Weights of one layer, its projections in groups that read one input: q,k,v; o; gate,up; down."""

    norms: tuple[Float[Array, " _"], ...]  # scales before attention and MLP, and of q and k where these are normed
    kernels: tuple[Panels, ...]
    biases: tuple[Float[Array, " _"] | None, ...]
    loras: tuple[PanelLora | None, ...]


def pack(*matrices: Num[Array, "in _"], scale: Float[Array, " _"] | None = None, rounds: bool = False) -> Panels:
    """Matrices side by side, in panels; whole numbers with the scales of all their columns.

    Args:
        rounds: rows that meet whole numbers are rounded to such too, each 32 numbers with a scale of their own.
    """
    W = library().width
    filled = [jnp.pad(matrix, ((0, 0), (0, -matrix.shape[1] % W))) for matrix in matrices]
    panels = [matrix.reshape(len(matrix), -1, W).swapaxes(0, 1) for matrix in filled]
    ends = np.cumsum([matrix.shape[1] for matrix in matrices]).tolist()
    joined = jnp.concatenate(panels)
    if scale is not None and rounds:
        fours = jnp.pad(joined.astype(jnp.int16) + 128, ((0, 0), (0, -joined.shape[1] % 4), (0, 0))).astype(jnp.uint8)
        joined = fours.reshape(len(fours), -1, 4, W).swapaxes(2, 3)
    if scale is not None:
        return Panels(joined, tuple(ends), scale)
    joined = narrow(joined)
    if joined.dtype == jnp.bfloat16:  # in pairs, see products.h
        joined = joined.reshape(*joined.shape[:2], 2, W // 2).swapaxes(2, 3).reshape(joined.shape)
    return Panels(joined, tuple(ends))


def narrow(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """float32 numbers as bfloat16 where this changes none of them: products are the same, and read half the bytes."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return x if jnp.any(bits & 0xFFFF) else x.astype(jnp.bfloat16)


def times(x: Float[Array, "... in"], w: Panels) -> Float[Array, "... out"]:
    """x W."""
    out = jax.ShapeDtypeStruct((x.size // x.shape[-1], w.ends[-1]), jnp.float32)
    call = jax.ffi.ffi_call("mtp_jax_product", out)
    y = call(x.reshape(-1, x.shape[-1]), w.panels, ends=_numbers(w.ends)).reshape(*x.shape[:-1], -1)
    return y if w.scale is None else y * w.scale


def largest(x: Float[Array, "... V"], count: int) -> Int[Array, "... C"]:
    """Indices, in order, of the `count` largest numbers; of equal ones the first."""
    rows = x.reshape(-1, x.shape[-1])
    out = jax.ShapeDtypeStruct((len(rows), count), jnp.int32)
    return jax.ffi.ffi_call("mtp_jax_largest", out)(rows).reshape(*x.shape[:-1], count)


_FIXED = 11  # arguments of the call for all layers before those of the first


def layers(
    tokens: Int[Array, "B real"],
    embedding: Array,
    masks: Float[Array, "Q D"] | Float[Array, "B Q D"],
    rows: StepRows,
    weights: Sequence[PanelLayer],
    norm: Float[Array, " D"],
    cache: Sequence[LayerCache],
    kinds: Sequence[int],
    epsilon: float,
    used: Int[Array, ""] | int | None = None,
) -> tuple[Float[Array, "B R D"], list[LayerCache]]:
    """All layers of a step and the final norm, over R = real + Q rows.

    Args:
        tokens: of the real rows, whose keys and values are written.
        embedding: the table [V, D], float32, or bfloat16 numbers as uint16.
        masks: embeddings of the rows behind them, which meet the LoRA; of all sequences alike, or of each its own.
        norm: scale of the final norm.
        kinds: which visibility of `rows` each layer has; all rotate alike.
        used: how many of the real rows, from the first on, are needed; the latents of others are zero. None for all.
    Returns:
        Latents, and the cache with the real rows; written in place where nothing else needs the one that was given.
    """
    arguments: list[Array] = []
    alias = {}
    for layer, of_layer in zip(weights, cache, strict=True):
        arguments += layer.norms
        for kernel, bias, lora in zip(layer.kernels, layer.biases, layer.loras, strict=True):
            arguments += [kernel.panels, *(x for x in (kernel.scale, bias) if x is not None)]
            for part in () if lora is None else (lora.a, lora.b):
                arguments += [part.panels, *(() if part.scale is None else (part.scale,))]
        arguments += of_layer
        for half in (2, 1):
            alias[_FIXED + len(arguments) - half] = 1 + len(alias)
    first = weights[0]
    shape = {f"ends{i}": kernel.ends for i, kernel in enumerate(first.kernels)}
    shape |= {f"inner_ends{i}": lora.a.ends if lora else () for i, lora in enumerate(first.loras)}
    shape |= {f"offsets{i}": lora.offsets if lora else () for i, lora in enumerate(first.loras)}
    shape |= {"kinds": tuple(kinds), "with_bias": tuple(bias is not None for bias in first.biases)}
    caches = [jax.ShapeDtypeStruct(part.shape, part.dtype) for of_layer in cache for part in of_layer]
    (B, real), (Q, D) = tokens.shape, masks.shape[-2:]
    latents = jax.ShapeDtypeStruct((B, real + Q, D), jnp.float32)
    call = jax.ffi.ffi_call("mtp_jax_layers", (latents, *caches), input_output_aliases=alias)
    visible = (rows.low, rows.high, rows.own)
    y, *written = call(
        *(tokens, embedding, masks.reshape(-1, D), rows.cos[0], rows.sin[0], *visible, rows.start),
        *(jnp.asarray(real if used is None else used, jnp.int32)[None], norm, *arguments),
        **{name: _numbers(numbers) for name, numbers in shape.items()},
        head_norms=np.int64(len(first.norms) > 2),
        epsilon=np.float32(epsilon),
    )
    return y, [LayerCache(*pair) for pair in zip(written[::2], written[1::2], strict=True)]


def _numbers(numbers: tuple[int, ...]) -> np.ndarray:
    return np.asarray(numbers, np.int64)


# ---- the library


class BuildError(Exception):
    """Why there is no library."""


class Library(NamedTuple):
    """The compiled calls, known to XLA by their names."""

    width: int  # W, columns of a panel
    build: str  # names the processor, the source and the compiler's options
    rounds: bool  # whether the processor multiplies whole numbers


@functools.cache
def library() -> Library:
    """The library, compiled where it is not there yet.

    Raises:
        BuildError: no compiler, one that fails, or a library that cannot be loaded.
    """
    path = _build()
    try:
        calls = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} cannot be loaded ({error})") from error
    for name in _CALLS:
        call = jax.ffi.pycapsule(getattr(calls, f"mtp_jax_{name}"))
        jax.ffi.register_ffi_target(f"mtp_jax_{name}", call, platform="cpu")
    rounds = calls.mtp_jax_rounds
    rounds.restype = ctypes.c_bool
    return Library(calls.mtp_jax_panel_width(), path.stem, rounds())


def _build() -> Path:
    """The library for this processor, this source and this JAX."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise BuildError("there is no C++ compiler to build the faster engine with (c++, g++, clang++, or CXX)")
    command = [compiler, *_FLAGS, "-isystem", jax.ffi.include_dir()]
    sources = [path.read_text() for path in sorted((*_SOURCE.parent.glob("*.h"), _SOURCE))]
    told = (*sources, *command, jax.__version__, _processor())
    name = hashlib.sha256("\0".join(told).encode()).hexdigest()[:24]
    folder = cache_folder(CACHE) or scratch_folder()
    path = folder / f"{name}.so"
    if path.exists():
        return path
    try:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            part = Path(scratch) / "bindings.so"
            subprocess.run([*command, str(_SOURCE), "-o", str(part)], check=True, capture_output=True, timeout=300)
            part.replace(path)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").splitlines()
        said = next((line for line in lines if "error" in line), lines[0] if lines else f"exit code {error.returncode}")
        raise BuildError(f"the C++ compiler {compiler} failed ({said.strip()})") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"the C++ engine could not be built ({error})") from error
    return path


def _processor() -> str:
    """What -march=native may depend on, so that a home folder can serve several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
