"""The optional engine for CPUs: the few rows of a float32 decoding step in C++, which reads each weight once.

It is compiled on first use with the system's C++ compiler and kept in ~/.cache/mtp_jax/native. MTP_JAX_NATIVE=0 turns
it off; without a compiler, or where the build fails, XLA computes.
"""

import os

import jax
import jax.numpy as jnp

from mtp_jax.cpu import native
from mtp_jax.decoding.forward import Forward, XlaForward
from mtp_jax.errors import warn
from mtp_jax.model.decoder import Decoder
from mtp_jax.mtp.adapter import AdapterShape


def fastest_forward(model: Decoder, shape: AdapterShape | None, whole: bool = True) -> Forward:
    """The forward pass for decoding here: in C++ on a CPU, where weights are `whole` on one device, else XLA's.

    Families with other layers than Llama's, Mistral's and Qwen's are XLA's too.
    """
    fits = whole and model.g.plain and model.dtype == jnp.float32 and jax.default_backend() == "cpu"
    if fits and os.environ.get("MTP_JAX_NATIVE") != "0":
        try:
            build = native.library().build
        except native.BuildError as error:
            warn(f"decoding runs in XLA, which is slower on a CPU: {error}. MTP_JAX_NATIVE=0 silences this.")
        else:
            from mtp_jax.cpu.forward import CpuForward

            return CpuForward(model, shape, build)
    return XlaForward(model, shape, joined=whole)
