"""What the input pipeline costs.

    python benchmarks/data.py pack --examples 100000 --format parquet
    python benchmarks/data.py wait RUN_FOLDER

`pack` writes a file of records of mixed length, then tokenises and packs each of them once in a process of its own. It
prints the time, the share of padding and the peak memory. `wait` reads the timing.jsonl of a finished run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

_WARMUP = 5  # steps of a run that are skipped: they compile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    pack = commands.add_parser("pack")
    pack.add_argument("--examples", type=int, default=100_000, metavar="N", help="records of the file")
    pack.add_argument("--format", choices=["parquet", "jsonl"], default="parquet")
    pack.add_argument("--streaming", action="store_true")
    pack.add_argument("--model", default="bundled:stdlib-5m", help="whose tokenizer is used")
    pack.add_argument("--sequence-length", type=int, default=2048)
    pack.add_argument("--batch-size", type=int, default=8)
    pack.add_argument("--inner", metavar="FILE", help=argparse.SUPPRESS)
    wait = commands.add_parser("wait")
    wait.add_argument("run", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "wait":
        print_waits(arguments.run)
    elif arguments.inner:
        measure(arguments)
    else:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"examples.{arguments.format}"  # documents are named after it, and drawn by name
            write_records(file, arguments.examples)
            print(f"{arguments.examples:,} records in {file.stat().st_size / 1e6:,.0f} MB of {arguments.format}")
            cache = {**os.environ, "HF_DATASETS_CACHE": folder, "HF_HUB_OFFLINE": "1"}
            subprocess.run([sys.executable, *sys.argv, "--inner", str(file)], check=True, env=cache)


def write_records(file: Path, count: int) -> None:
    """Prompts with completions: mostly of about a hundred words, a few of thousands."""
    import pyarrow
    import pyarrow.parquet

    draw = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlu"))
    words = np.array(["".join(draw.choice(letters, draw.integers(2, 9))) for _ in range(5000)])
    schema = pyarrow.schema({"prompt": pyarrow.string(), "completion": pyarrow.string()})
    writer = pyarrow.parquet.ParquetWriter(file, schema) if file.suffix == ".parquet" else file.open("w")
    with writer:
        for start in range(0, count, 1000):
            records = []
            for _ in range(min(1000, count - start)):
                n, m = np.clip(draw.lognormal(np.log([20, 80]), 1.0), 1, 3000).astype(int)
                text = words[draw.integers(0, len(words), n + m)]
                records.append({"prompt": " ".join(text[:n]), "completion": " " + " ".join(text[n:])})
            if isinstance(writer, pyarrow.parquet.ParquetWriter):
                writer.write_table(pyarrow.Table.from_pylist(records, schema))
            else:
                writer.writelines(json.dumps(record) + "\n" for record in records)


def measure(a: argparse.Namespace) -> None:
    """Read, tokenise and pack every record once."""
    from mtp_jax.config import Data, Source
    from mtp_jax.data.batches import training_batches
    from mtp_jax.data.sources import read_sources
    from mtp_jax.model.base import open_base
    from mtp_jax.mtp.blocks import Anchors

    tokenizer = open_base(a.model).tokenizer
    before = memory()
    print(f"memory before: {before['VmRSS']:,.0f} MB (Python, JAX and the tokenizer)")
    clock = time.perf_counter()
    source = Source(kind="dataset", path=a.inner, streaming=a.streaming)
    training, held_out = read_sources(Data(sources=[source], held_out=0.01))
    loaded = memory()
    print(f"opened in {time.perf_counter() - clock:.1f} s, {len(held_out):,} held out, {loaded['VmRSS']:,.0f} MB")
    total = a.examples - sum(1 for _ in held_out)
    clock = time.perf_counter()
    batches, _ = training_batches(training, [1.0], tokenizer, a.batch_size, a.sequence_length, 0, Anchors(256, 0))
    rows = padding = anonymous = 0
    for batch in batches:
        rows += batch["segments"].size
        padding += int((batch["segments"] == 0).sum())
        anonymous = max(anonymous, memory()["RssAnon"])
        if batches.counts()["documents"] >= total:
            break
    seconds, counts, after = time.perf_counter() - clock, batches.counts(), memory()
    print(f"{counts['documents']:,} documents, {rows - padding:,} tokens in {seconds:.1f} s: ", end="")
    print(f"{counts['documents'] / seconds:,.0f} documents/s, {(rows - padding) / seconds:,.0f} tokens/s")
    print(f"sequences of {a.sequence_length}: {rows // a.sequence_length:,}, padding {padding / rows:.2%}; ", end="")
    print(f"{counts['too_long']:,} documents were longer and split")
    print(f"peak RSS {after['VmHWM']:,.0f} MB, of which {anonymous:,.0f} MB are not pages of mapped files", flush=True)


def memory() -> dict[str, float]:
    """Figures of /proc/self/status in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) / 1e3 for line in lines if line.endswith(" kB")}


def print_waits(run: Path) -> None:
    """The share of a run's time in which the devices waited for data, and its throughput."""
    records = [json.loads(line) for line in (run / "timing.jsonl").read_text().splitlines()][_WARMUP:]
    seconds = np.array([record["seconds"] for record in records])
    waits = np.array([record["input_wait_seconds"] for record in records])
    print(f"{len(records)} steps, {np.median(seconds):.3f} s each (median); ", end="")
    print(f"input waits {waits.sum() / seconds.sum():.3%} of the time, at most {waits.max() * 1e3:.1f} ms; ", end="")
    print(f"{np.median([record['tokens_per_second'] for record in records]):,.0f} tokens/s")


if __name__ == "__main__":
    main()
