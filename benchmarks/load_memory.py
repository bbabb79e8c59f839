"""`python benchmarks/load_memory.py [--megabytes N]`: host memory that loading a Hugging Face folder takes.

A random Llama checkpoint of several files is written to a temporary folder and loaded in fresh processes: on one
device, and sharded over eight simulated ones (mesh 2, 2, 2). Each line gives the peak resident memory above the
process's floor (jax imported, devices touched) beside the bound that loading promises: 1.3 times the largest stacked
weight, plus the target itself, replicas included. The exit code is 1 if the promise is broken.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

CASES = [  # stored, loaded, devices
    ("float32", "float32", 1),
    ("float32", "float32", 8),
    ("bfloat16", "bfloat16", 1),
    ("bfloat16", "bfloat16", 8),
    ("bfloat16", "float32", 1),
    ("bfloat16", "float32", 8),
]
SLACK = 1.3
MB = 1e6


def config(stored_bytes: float, itemsize: int) -> dict:
    """A Llama of about `stored_bytes` with layers of the proportions of a 1B model."""
    width = 2048 if stored_bytes > 1e9 else 512
    sizes = {
        "model_type": "llama",
        "vocab_size": 32000 if stored_bytes > 1e9 else 4000,
        "hidden_size": width,
        "intermediate_size": width * 11 // 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": width // 16,
        "max_position_embeddings": 2048,
    }
    layer = width * width * (3 + 3 * 11 / 4)
    rest = 2 * sizes["vocab_size"] * width
    return {**sizes, "num_hidden_layers": max(1, round((stored_bytes / itemsize - rest) / layer))}


def write_checkpoint(folder: Path, megabytes: float, dtype: str) -> None:
    """Random weights, a file for each layer and one for the rest, one file at a time in memory."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    from mtp_jax.model.folder import INDEX, read_geometry
    from mtp_jax.model.weights import weight_table

    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    (folder / "config.json").write_text(json.dumps(config(megabytes * MB, kind.itemsize)))
    g = read_geometry(folder)
    draw = np.random.default_rng(0)
    weight_map = {}
    for part in range(g.L + 1):
        keys = {}
        for weight in weight_table(g):
            if weight.stacked == (part < g.L):
                keys[weight.stored_keys()[part if weight.stacked else 0]] = weight.stored_shape
        name = f"model-{part + 1:05d}-of-{g.L + 1:05d}.safetensors"
        save_file({key: draw.random(shape, np.float32).astype(kind) for key, shape in keys.items()}, folder / name)
        weight_map |= dict.fromkeys(keys, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def resident() -> int:
    """Resident bytes of this process, mapped pages of files included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure(folder: Path, dtype: str) -> dict:
    """Load a folder onto all devices of this process; bytes above the process's own, and what was promised."""
    import jax
    import jax.numpy as jnp

    from mtp_jax.config import Mesh
    from mtp_jax.model.base import open_base
    from mtp_jax.model.weights import weight_table
    from mtp_jax.sharding import make_mesh, weight_sharding

    base, shardings = open_base(str(folder)), None
    if jax.device_count() > 1:
        mesh = make_mesh(Mesh(data=2, fsdp=2, tensor=2))
        shardings = lambda weight: weight_sharding(mesh, weight)  # noqa: E731
    for device in jax.devices():
        jax.block_until_ready(jax.device_put(jnp.ones(8), device) + 1)

    floor = highest = resident()
    loaded = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not loaded.wait(0.001):
            highest = max(highest, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    params = base.load(jnp.dtype(dtype), shardings)
    seconds = time.perf_counter() - begin
    loaded.set()
    watcher.join()
    highest = max(highest, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    itemsize = jnp.dtype(dtype).itemsize
    largest = itemsize * max(math.prod(weight.shape) for weight in weight_table(base.g))
    target = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
    return {"above": highest - floor, "target": target, "largest": largest, "floor": floor, "seconds": seconds}


def in_fresh_process(folder: Path, dtype: str, devices: int) -> dict:
    """`measure` in a process of its own."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, __file__, "--measure", str(folder), dtype]
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    """Write, load, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=2000, metavar="N", help="size of the checkpoint on disk")
    parser.add_argument("--stored", choices=["float32", "bfloat16"], help="only checkpoints of this dtype")
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(Path(arguments.measure[0]), arguments.measure[1])))
        return

    print("stored    loaded    devices  target MB  largest MB  peak MB  bound MB  over target  seconds")
    broken = False
    for stored in dict.fromkeys(case[0] for case in CASES if arguments.stored in (None, case[0])):
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder), arguments.megabytes, stored)
            for _, loaded, devices in (case for case in CASES if case[0] == stored):
                found = in_fresh_process(Path(folder), loaded, devices)
                bound = SLACK * found["largest"] + found["target"]
                over = (found["above"] - found["target"]) / found["largest"]
                broken |= found["above"] > bound
                print(
                    f"{stored:9} {loaded:9} {devices:7} {found['target'] / MB:10.0f} {found['largest'] / MB:11.0f}"
                    f" {found['above'] / MB:8.0f} {bound / MB:9.0f} {over:10.2f}x {found['seconds']:9.1f}"
                    f"{'  EXCEEDED' if found['above'] > bound else ''}",
                    flush=True,
                )
    if broken:
        sys.exit("error: loading took more memory than load_params promises.")


if __name__ == "__main__":
    main()
