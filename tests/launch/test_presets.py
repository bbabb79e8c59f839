"""The compilers take every flag of every preset."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ENV = Path(__file__).resolve().parents[2] / "launch/env.sh"
TPU = """
import os
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
chips = topologies.get_topology_desc(platform="tpu", topology_name=os.environ["TOPOLOGY"]).devices
split = NamedSharding(Mesh(np.array(chips), ("fsdp",)), P("fsdp"))
x = jax.ShapeDtypeStruct((64, 256), jnp.float32, sharding=split)
w = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=split)
jax.jit(lambda x, w: jnp.tanh(x @ w).sum()).lower(x, w).compile()
"""
CPU = "import jax; jax.jit(lambda x: x + 1)(1)"  # XLA_FLAGS of all platforms are parsed by each of them
ROWS = [line.split("|") for line in ENV.read_text().splitlines() if line.count("|") == 4 and "INIT_ARGS|" in line]
CHECKED = [(row[0], topology) for row in ROWS for topology in row[2].rsplit(", ", 1)[1].split()]


def compiles(preset, program, **more):
    """Whether a process with a preset compiles."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    environment.pop("XLA_FLAGS", None)  # those of the CPU
    # Only compilation: no chip is opened, which is what libtpu's lock would guard.
    environment |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", **more}
    command = f'{f". {ENV} {preset} && " if preset else ""}exec "$0" -c "$1"'
    return subprocess.run(
        ["bash", "-c", command, sys.executable, program], env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(("preset", "topology"), CHECKED)
def test_the_tpu_compiler_takes_the_preset_where_it_says_so(preset, topology):
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install '.[tpu]'")
    ended = compiles(preset, TPU, TOPOLOGY=topology)
    assert ended.returncode == 0, ended.stderr


def test_the_tpu_compiler_refuses_a_flag_that_does_not_exist():
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install '.[tpu]'")
    assert (
        "Unknown command line flag"
        in compiles(None, TPU, TOPOLOGY="v6e:2x2", LIBTPU_INIT_ARGS="--xla_tpu_no_such_flag=1").stderr
    )


def test_xla_takes_the_preset_for_gpus():
    assert compiles("gpu-overlap", CPU).returncode == 0
    assert "Unknown flag" in compiles(None, CPU, XLA_FLAGS="--xla_gpu_no_such_flag=true").stderr


def test_a_preset_comes_behind_what_is_set_and_none_is_set_by_itself():
    show = 'import os; print(os.environ.get("LIBTPU_INIT_ARGS"))'
    assert compiles("tpu-v6e-vmem-96m", show, LIBTPU_INIT_ARGS="--a=1").stdout.split() == [
        "--a=1",
        "--xla_tpu_scoped_vmem_limit_kib=98304",
    ]
    assert (
        subprocess.run(["bash", ENV, "--list"], capture_output=True, text=True).stdout.count("checked on jax")
        == len(ROWS) + 1
    )
