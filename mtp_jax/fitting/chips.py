"""Accelerators that a program can be compiled for without having one, and what each offers."""

import importlib.util
import os
import re
from typing import Any, NamedTuple

import jax

from mtp_jax.errors import UserError, reason
from mtp_jax.training.flops import PEAK

# Share of peak arithmetic, memory bandwidth and link bandwidth that expected times assume. A choice, not a measurement.
EFFICIENCY = 0.4


class Chip(NamedTuple):
    """What a kind of chip has, by the vendor's data sheets; rates are per second."""

    memory: int  # bytes
    flops: float  # bfloat16
    bandwidth: float  # of memory, in bytes
    links: float  # between chips, in bytes and one direction
    axes: int  # of its topologies


CHIPS = {
    "v4": Chip(32 << 30, PEAK["TPU v4"], 1.228e12, 300e9, 3),
    "v5e": Chip(16 << 30, PEAK["TPU v5 lite"], 0.819e12, 200e9, 2),
    "v5p": Chip(95 << 30, PEAK["TPU v5"], 2.765e12, 600e9, 3),
    "v6e": Chip(32 << 30, PEAK["TPU v6 lite"], 1.64e12, 400e9, 2),
}


def without_chip() -> None:
    """Let JAX start on a machine that has libtpu but no TPU; call before JAX is first used.

    libtpu's messages while it looks for a TPU are silenced, and two processes may compile at the same time.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_STDERR_LOG_LEVEL": "3"}
    for name, value in {**quiet, "TPU_MIN_LOG_LEVEL": "3", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items():
        os.environ.setdefault(name, value)


def parse_topology(name: str) -> Chip:
    """The chip of a topology such as v5e:4x4.

    Raises:
        UserError: a malformed name, or an unknown chip.
    """
    kind, _, sizes = name.partition(":")
    chip = CHIPS.get(kind)
    if chip is None:
        raise UserError(f"--topology {name}: unknown chip {kind!r}; known are {', '.join(CHIPS)}, as in v5e:4x4.")
    form = "x".join("2" * chip.axes)
    if not re.fullmatch(r"[1-9]\d*" + r"x[1-9]\d*" * (chip.axes - 1), sizes):
        raise UserError(f"--topology {name}: {kind} has {chip.axes} axes; the form is {kind}:{form}.")
    return chip


def topology_devices(name: str) -> list[Any]:
    """The devices of a topology, to compile for; none of them is attached.

    Raises:
        UserError: the TPU compiler is not installed, or does not know the topology.
    """
    chip = parse_topology(name)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("--topology needs the TPU compiler, which is not installed: pip install 'mtp_jax[preflight]'.")
    from jax.experimental import topologies

    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # the library reports its search for a TPU
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        least = "2x2" if chip.axes == 2 else "2x2x1"
        raise UserError(
            f"--topology {name}: the TPU compiler does not have it ({reason(error)[:200]}); the smallest is {least}."
        ) from error
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def local_chip(device: Any) -> Chip | None:
    """What is known about an attached device; None for a CPU."""
    kinds = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e"}
    if device.device_kind in kinds:
        return CHIPS[kinds[device.device_kind]]
    return None
