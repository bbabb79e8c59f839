"""The optional engine for CPUs: the few rows of a float32 decoding step in C++, which reads each weight once.

It is compiled on first use with the system's C++ compiler and kept in ~/.cache/mtp_jax/native. MTP_JAX_NATIVE=0 turns
it off; without a compiler, or where the build fails, XLA computes.
"""

import os

import jax
import jax.numpy as jnp

from mtp_jax.cpu import native
from mtp_jax.decoding.forward import Forward, XlaForward
from mtp_jax.errors import UserError, warn
from mtp_jax.model.decoder import Decoder
from mtp_jax.mtp.adapter import AdapterShape


def fastest_forward(
    model: Decoder, shape: AdapterShape | None, whole: bool = True, activations: str = "float"
) -> Forward:
    """The forward pass for decoding here: in C++ on a CPU, where weights are `whole` on one device, else XLA's.

    Families with other layers than Llama's, Mistral's and Qwen's are XLA's too.

    Args:
        activations: "int8" rounds what meets an int8 base's matrices to whole numbers as well, in C++ alone.
    Raises:
        UserError: activations that cannot be had here.
    """
    fits = whole and model.g.plain and model.dtype == jnp.float32 and jax.default_backend() == "cpu"
    rounds = activations == "int8"
    if activations not in ("float", "int8"):
        raise UserError(f'activations={activations!r}: should be "float" or "int8".')
    if fits and os.environ.get("MTP_JAX_NATIVE") != "0":
        try:
            library = native.library()
        except native.BuildError as error:
            warn(f"decoding runs in XLA, which is slower on a CPU: {error}. MTP_JAX_NATIVE=0 silences this.")
        else:
            from mtp_jax.cpu.forward import CpuForward

            if not rounds:
                return CpuForward(model, shape, library.build)
            if model.g.int8 and library.rounds:
                return CpuForward(model, shape, f"{library.build}, activations int8", rounds)
    if rounds:
        raise UserError(
            "--activations int8: goes with --weights int8, in float32 on one CPU with AVX-512 VNNI, and with the C++ "
            "engine, which knows the layers of Llama, Mistral and Qwen; leave it out."
        )
    return XlaForward(model, shape, joined=whole)
