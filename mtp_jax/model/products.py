"""A decoding step's layers, and products of few rows with large matrices, on CPU: C++ that reads each weight once.

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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

CACHE = "~/.cache/mtp_jax/native"
_SOURCE = Path(__file__).with_name("products.cc")
_CALLS = tuple(f"mtp_jax_{name}" for name in ("product", "layers", "lookup", "largest", "drafts"))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["panels"], meta_fields=["ends"])
@dataclass(frozen=True)
class Panels:
    """A matrix, or several side by side, as the C++ product takes it."""

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
    joined = narrow(jnp.concatenate(panels))
    if joined.dtype == jnp.bfloat16:  # in pairs, see products.cc
        joined = joined.reshape(*joined.shape[:2], 2, W // 2).swapaxes(2, 3).reshape(joined.shape)
    return Panels(joined, tuple(ends))


def narrow(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """float32 numbers as bfloat16 where this changes none of them: products are the same, and read half the bytes."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return x if jnp.any(bits & 0xFFFF) else x.astype(jnp.bfloat16)


def times(x: Float[Array, "... in"], w: Matrix) -> Float[Array, "... out"]:
    """x W."""
    if not isinstance(w, Panels):
        return x @ w.astype(x.dtype)
    out = jax.ShapeDtypeStruct((x.size // x.shape[-1], w.ends[-1]), jnp.float32)
    call = jax.ffi.ffi_call("mtp_jax_product", out)
    return call(x.reshape(-1, x.shape[-1]), w.panels, ends=_numbers(w.ends)).reshape(*x.shape[:-1], -1)


def _numbers(numbers: tuple[int, ...]) -> np.ndarray:
    return np.asarray(numbers, np.int64)


_FIXED = 10  # arguments of the call for all layers before those of the first


class PanelLayer(NamedTuple):
    """Weights of one layer, its projections in groups that read one input: q,k,v; o; gate,up; down."""

    norms: tuple[Float[Array, " _"], ...]  # scales before attention and MLP, and of q and k where these are normed
    kernels: tuple[Panels, ...]
    biases: tuple[Float[Array, " _"] | None, ...]
    loras: tuple[PanelLora | None, ...]


def layers(
    tokens: Int[Array, "B real"],
    embedding: Float[Array, "V D"],
    masks: Float[Array, "Q D"],
    angles: tuple[Float[Array, "B R 1 H/2"], Float[Array, "B R 1 H/2"]],
    held: tuple[Int[Array, "kinds B R"], Int[Array, "kinds B R"]],
    own_visible: Bool[Array, "kinds B R R"],
    start: Int[Array, " B"],
    weights: Sequence[PanelLayer],
    norm: Float[Array, " D"],
    cache: Sequence[tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]],
    kinds: Sequence[int],
    epsilon: float,
) -> tuple[Float[Array, "B R D"], list[tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]]]:
    """All layers of a step and the final norm, over R = real + Q rows.

    Args:
        tokens: of the real rows, whose keys and values are written.
        masks: embeddings of the rows behind them, which meet the LoRA.
        angles: cosines and sines of the rows' positions.
        held: first slot of the cache that a row sees, and the one behind the last, for each kind of layer.
        own_visible: which of the step's own rows a row sees.
        start: slot of the first row's keys and values; the slots that are seen lie before it.
        norm: scale of the final norm.
        kinds: of each layer.
    Returns:
        Latents, and the cache with the real rows; written in place where nothing else needs the one that was given.
    """
    arguments: list[Array] = []
    alias = {}
    for layer, of_layer in zip(weights, cache, strict=True):
        arguments += layer.norms
        for kernel, bias, lora in zip(layer.kernels, layer.biases, layer.loras, strict=True):
            arguments += [kernel.panels, *([] if bias is None else [bias])]
            arguments += [] if lora is None else [lora.a.panels, lora.b.panels]
        arguments += of_layer
        for half in (2, 1):
            alias[_FIXED + len(arguments) - half] = 1 + len(alias)
    first = weights[0]
    shape = {f"ends{i}": kernel.ends for i, kernel in enumerate(first.kernels)}
    shape |= {f"inner_ends{i}": lora.a.ends if lora else () for i, lora in enumerate(first.loras)}
    shape |= {f"offsets{i}": lora.offsets if lora else () for i, lora in enumerate(first.loras)}
    shape |= {"kinds": tuple(kinds), "with_bias": tuple(bias is not None for bias in first.biases)}
    caches = [jax.ShapeDtypeStruct(part.shape, part.dtype) for of_layer in cache for part in of_layer]
    (B, real), (Q, D) = tokens.shape, masks.shape
    latents = jax.ShapeDtypeStruct((B, real + Q, D), jnp.float32)
    call = jax.ffi.ffi_call("mtp_jax_layers", (latents, *caches), input_output_aliases=alias)
    y, *written = call(
        *(tokens, embedding, masks, *angles, *held, own_visible, start, norm, *arguments),
        **{name: _numbers(numbers) for name, numbers in shape.items()},
        head_norms=np.int64(len(first.norms) > 2),
        epsilon=np.float32(epsilon),
    )
    return y, list(zip(written[::2], written[1::2], strict=True))


class PanelSampler(NamedTuple):
    """The sampler head's weights; a vector for each of its two layers where there are two."""

    reads_embedding: Panels
    reads_latent: Panels
    second: Panels
    biases: tuple[Float[Array, " D"], Float[Array, " D"]]
    scales: tuple[Float[Array, " D"], Float[Array, " D"]]
    shifts: tuple[Float[Array, " D"], Float[Array, " D"]]


def draft(
    z: Float[Array, "B M D"],
    scores: Float[Array, "B M V"],
    first: Int[Array, " B"],
    embedding: Float[Array, "V D"],
    table: Float[Array, "V D"],
    sampler: PanelSampler,
    candidates: int,
    residual: bool,
) -> Int[Array, "B M"]:
    """Greedy drafts of blocks behind the tokens `first`, chosen by the sampler head from so many candidates each.

    Candidates are the `largest` of the base head's scores. `table` is the base head's.
    """
    B, M, _ = z.shape
    w, (bias, second_bias), (scale, second_scale), (shift, second_shift) = sampler[:3], *sampler[3:]
    call = jax.ffi.ffi_call("mtp_jax_drafts", jax.ShapeDtypeStruct((B, M), jnp.int32))
    return call(
        *(z, scores, first, embedding, table, w[0].panels, w[1].panels, bias, scale, shift),
        *(w[2].panels, second_bias, second_scale, second_shift),
        candidates=np.int64(candidates),
        residual=residual,
    )


def look_up(x: Float[Array, "B D"], table: Float[Array, "V D"], ids: Int[Array, "B C"]) -> Float[Array, "B C"]:
    """x by its own rows `ids` of a table."""
    return jax.ffi.ffi_call("mtp_jax_lookup", jax.ShapeDtypeStruct(ids.shape, jnp.float32))(x, table, ids)


def largest(x: Float[Array, "... V"], count: int) -> Int[Array, "... C"]:
    """Indices, in order, of the `count` largest numbers; of equal ones the first."""
    rows = x.reshape(-1, x.shape[-1])
    out = jax.ShapeDtypeStruct((len(rows), count), jnp.int32)
    return jax.ffi.ffi_call("mtp_jax_largest", out)(rows).reshape(*x.shape[:-1], count)


def native() -> bool:
    """Whether the C++ product is at hand: on CPU, with a compiler or a library that one has built before."""
    return jax.default_backend() == "cpu" and os.environ.get("MTP_JAX_NATIVE") != "0" and _library() is not None


def native_build() -> str:
    """Which build of the C++ is at hand; empty where none is."""
    library = _library() if native() else None
    return "" if library is None else Path(library._name).stem


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
