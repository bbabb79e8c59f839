"""Interrupt a small run in every way and compare what it leaves, byte by byte, with an undisturbed run.

    python benchmarks/interruptions.py --kills 20 --terms 5

Kills strike at random moments, every third as soon as a checkpoint is begun; a run that ends before its turn is started
again in an empty folder. The damage drill then truncates, empties, deletes and changes a file of each kind of
the newest checkpoint, and of all of them, and resumes. The exit code is 1 where anything differs.
"""

import argparse
import contextlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from mtp_jax.errors import run_command
from mtp_jax.runs.manifest import MANIFEST

STEPS, EVERY = 48, 6
DAMAGES = ("deleted", "emptied", "halved", "flipped")
LIMIT = 300  # seconds that a run may take


def tree(folder: Path) -> dict:
    """The config of a small run beside the bundled model."""
    return {
        "objective": "multi_token",
        "output_dir": str(folder / "run"),
        "model": {"path": "bundled:stdlib-5m"},
        "data": {"sources": [{"kind": "text", "path": str(folder / "corpus")}], "held_out": 0.2},
        "lora": {"rank": 4},
        "mtp": {"masks": 2},
        "train": {"steps": STEPS, "batch_size": 4, "sequence_length": 32, "anchors": 4, "learning_rate": 2e-3},
        "evaluation": {"every": 16, "batches": 2, "prompts": 4, "prompt_tokens": 8, "new_tokens": 16},
        "checkpoints": {"every": EVERY},
        "compilation_cache": str(folder / "compiled"),
    }


def start(config: Path) -> subprocess.Popen:
    """The train command, as a user starts it."""
    quick = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    command = [sys.executable, "-m", "mtp_jax.train", "--config", str(config)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **quick}
    )


def result(run: Path) -> tuple[bytes, bytes]:
    """What must not depend on interruptions."""
    return (run / "metrics.jsonl").read_bytes(), (run / "adapter" / "adapter.safetensors").read_bytes()


class Drill:
    """Interrupts runs and records what became of them."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.run, self.config = folder, folder / "run", folder / "config.yaml"
        self.rng = random.Random(seed)
        self.table = Table("interruption", "at step", "exit code", "what it left")
        self.begun = time.monotonic()
        self.faults = self.completed = 0

    def note(self, *row: str) -> None:
        """Add a line to the table, and print it at once."""
        print(f"{time.monotonic() - self.begun:6.0f} s  " + ", ".join(row), file=sys.stderr, flush=True)
        self.table.add_row(*row)

    def reference(self) -> float:
        """Run undisturbed twice; returns how long the second took, with everything compiled."""
        for _ in range(2):
            shutil.rmtree(self.run, ignore_errors=True)
            begun = time.monotonic()
            self.to_the_end()
        seconds = time.monotonic() - begun
        self.expected = result(self.run)
        shutil.copytree(self.run, self.folder / "reference")
        return seconds

    def to_the_end(self) -> str:
        """Let the run finish; returns its output."""
        _, said = (process := start(self.config)).communicate(timeout=LIMIT)
        if process.returncode:
            raise SystemExit(f"the run failed:\n{said}")
        return said

    def step(self) -> int:
        """The last step with a line of metrics."""
        metrics = self.run / "metrics.jsonl"
        return metrics.read_bytes().count(b'"loss"') if metrics.exists() else 0

    def interrupt(self, number: signal.Signals, seconds: float, into_checkpoint: bool) -> None:
        """One signal, after some time or as soon as a checkpoint is begun."""
        while True:
            process, begun = start(self.config), time.monotonic()
            wait = self.rng.uniform(0.3, 1.0) * seconds
            after = self.rng.randrange(1, 4)  # which checkpoint of this process
            seen: set[Path] = set(self.run.glob("checkpoints/*"))
            while process.poll() is None:
                if into_checkpoint:
                    new = {path for path in self.run.glob("checkpoints/*") if path.name.isdecimal()} - seen
                    if len(new) >= after and any(not (path / MANIFEST).exists() for path in new):
                        break
                elif time.monotonic() - begun > wait and (number == signal.SIGKILL or self.step() > 0):
                    break
                time.sleep(0.002)
            if process.poll() is None:
                break
            self.check("ended before its turn", process.communicate()[1])
            shutil.rmtree(self.run)
        process.send_signal(number)
        _, said = process.communicate(timeout=LIMIT)
        what = number.name + (" into a checkpoint" if into_checkpoint else "")
        unfinished = [path.name for path in self.run.glob("checkpoints/[0-9]*") if not (path / MANIFEST).exists()]
        left = ["a checkpoint half written"] if unfinished else []
        codes = (-9,) if number == signal.SIGKILL else (143, -15)  # before the first step there is nothing to save
        if process.returncode not in codes or "Traceback" in said:
            self.faults += 1
            left.append(f"WRONG: {said[-300:]}")
        if number == signal.SIGTERM and process.returncode == 143:
            left.append("step saved" if (self.run / "checkpoints" / str(self.step()) / MANIFEST).exists() else "LOST")
            self.faults += left[-1] == "LOST"
        self.note(what, str(self.step()), str(process.returncode), ", ".join(left))

    def check(self, what: str, said: str) -> None:
        """Compare a finished run with the undisturbed one."""
        self.completed += 1
        same = result(self.run) == self.expected and "Traceback" not in said
        self.faults += not same
        self.note(what, str(self.step()), "0", "equal to the undisturbed run" if same else "DIFFERENT")

    def damage(self) -> None:
        """Damage a file of each kind of the newest checkpoint, and of all checkpoints, in every way, and resume."""
        newest = self.folder / "reference" / "checkpoints" / str(STEPS)
        kinds: dict[str, Path] = {}
        for path in sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file()):
            kinds[str(path.parent / "*") if len(path.name) == 32 else str(path)] = path
        for kind, path in kinds.items():
            for how in DAMAGES:
                for everywhere in (False, True):
                    if everywhere and not (kind == MANIFEST or kind.startswith("data")):
                        continue  # starting afresh takes long, and looks the same for every file
                    shutil.rmtree(self.run, ignore_errors=True)
                    shutil.copytree(self.folder / "reference", self.run)
                    steps = self.run.glob("checkpoints/*") if everywhere else [self.run / "checkpoints" / str(STEPS)]
                    if all([spoil(step / path, how) for step in steps]):
                        self.resume(f"{kind} {how}{' in all checkpoints' if everywhere else ''}")

    def resume(self, what: str) -> None:
        """Resume after damage, in this process."""
        from mtp_jax import train

        said, code = io.StringIO(), 0
        sys.argv = ["train", "--config", str(self.config)]
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            try:
                run_command(train.main)
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
            except Exception as error:
                said.write(f"Traceback: {error!r}")
                code = 1
        afresh = "starts afresh" in said.getvalue()
        resumed = "afresh" if afresh else said.getvalue().partition("from step ")[2].split()[0]
        same = code == 0 and result(self.run) == self.expected and "Traceback" not in said.getvalue()
        warned = "warning: " in said.getvalue()
        self.faults += not (same and warned)
        verdict = "equal to the undisturbed run" if same else "DIFFERENT"
        self.note(what, f"resumes from {resumed}", str(code), verdict + ("" if warned else ", NOT REPORTED"))


def spoil(path: Path, how: str) -> bool:
    """Damage a file; False where it is empty, so that it cannot be damaged in this way."""
    whole = path.read_bytes()
    if how == "deleted":
        path.unlink()
        return True
    if how == "flipped":
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :] if whole else b"")
    else:
        os.truncate(path, 0 if how == "emptied" else len(whole) // 2)
    return bool(whole)


def main() -> None:
    """Interrupt, damage, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--terms", type=int, default=5)
    parser.add_argument("--no-damage", action="store_true", help="leave the damage drill out")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "corpus").mkdir()
        for module in sorted(Path(os.__file__).parent.glob("[a-f]*.py"))[:40]:
            shutil.copy(module, folder / "corpus" / f"{module.stem}.txt")
        (folder / "config.yaml").write_text(yaml.safe_dump(tree(folder)))
        drill = Drill(folder, a.seed)
        seconds = drill.reference()
        print(f"an undisturbed run of {STEPS} steps takes {seconds:.1f} s")
        shutil.rmtree(drill.run)
        signals = [signal.SIGKILL] * a.kills + [signal.SIGTERM] * a.terms
        drill.rng.shuffle(signals)
        for i, number in enumerate(signals):
            drill.interrupt(number, seconds, into_checkpoint=number == signal.SIGKILL and i % 3 == 0)
        if signals:
            drill.check("allowed to finish", drill.to_the_end())
        if not a.no_damage:
            drill.damage()
        Console(width=140).print(drill.table)
        print(f"{drill.completed} runs completed among the interruptions; {drill.faults} faults")
    sys.exit(1 if drill.faults else 0)


if __name__ == "__main__":
    main()
