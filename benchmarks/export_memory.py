"""`python benchmarks/export_memory.py [--megabytes N]`: memory that exporting a sharded model takes.

A random checkpoint with one file per layer is exported in fresh processes: copied beside an adapter, and converted to
bfloat16 like a run's own model. Each line gives the peak memory above the process's floor (everything imported) and the
largest file written. The exit code is 1 if that memory exceeds 1.5 times the file.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from load_memory import write_checkpoint

BOUND, MB = 1.5, 1e6


def measure(folder: Path, out: Path, kind: str) -> dict[str, float]:
    """Export, and return bytes above the floor."""
    import jax.numpy as jnp
    import numpy as np

    import mtp_jax.exporting.folder as exporting
    from mtp_jax.exporting.source import Source, find_source
    from mtp_jax.model.base import open_base
    from mtp_jax.mtp.adapter import AdapterShape, adapter_table
    from mtp_jax.mtp.adapter_folder import write_adapter

    base = open_base(str(folder))
    if kind == "copy":
        from flax.traverse_util import unflatten_dict

        shape = AdapterShape(2, 1, 2.0, ("q",), "none")
        tree = unflatten_dict({w.path: np.zeros(w.shape, np.float32) for w in adapter_table(base.g, shape)})
        pointer = {"name": str(folder), "fingerprint": base.fingerprint}
        write_adapter(out / "adapter", base.g, shape, tree, pointer, {})
    np.asarray(jnp.ones(8) + 1)
    floor = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    source = find_source(None, str(out / "adapter"), None) if kind == "copy" else Source(base, None, "m", None)
    exporting.write_export(source, out / "out", dtype=None if kind == "copy" else jnp.dtype("bfloat16"))
    above = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - floor) * 1024
    largest = max(file.stat().st_size for file in (out / "out").glob("*.safetensors"))
    return {"above": above, "largest": largest, "floor": floor * 1024}


def main() -> None:
    """Write, export, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=2000, metavar="N", help="size of the model on disk")
    parser.add_argument("--measure", nargs=3, metavar=("FOLDER", "OUT", "KIND"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.measure:
        print(json.dumps(measure(Path(a.measure[0]), Path(a.measure[1]), a.measure[2])))
        return
    broken = False
    print("export    floor MB  above MB  largest file MB  ratio")
    for kind in ("copy", "convert"):
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as out:
            write_checkpoint(Path(folder), a.megabytes, "float32")
            command = [sys.executable, __file__, "--measure", folder, out, kind]
            environment = os.environ | {"JAX_PLATFORMS": "cpu"}
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
            found = json.loads(done.stdout.splitlines()[-1])
        ratio = found["above"] / found["largest"]
        broken |= ratio > BOUND
        figures = (found["floor"] / MB, found["above"] / MB, found["largest"] / MB, ratio)
        print("{:8} {:9.0f} {:9.0f} {:16.0f} {:6.2f}".format(kind, *figures), flush=True)
    if broken:
        sys.exit(f"error: an export took more than {BOUND} times its largest file.")


if __name__ == "__main__":
    main()
