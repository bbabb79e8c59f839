"""Signals end a run in good order, and it resumes as if there had been none."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import read_lines
from test_resume import assert_complete, assert_same, outcome_of_run

from mtp_jax.runs.records import Journal


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_and_the_run_resumes(tree, write_config, command, finished, monkeypatch, number, code):
    tree["checkpoints"]["every"] = 100
    config, folder, write = write_config(tree), Path(tree["output_dir"]), Journal.write

    def signalled(journal, record):
        write(journal, record)
        if journal.path.name == "metrics.jsonl" and record["step"] == 5:
            os.kill(os.getpid(), number)
            time.sleep(0.2)  # until the thread that listens has heard it

    before = signal.getsignal(number)
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "write", signalled)
        ended = command("train", "--config", config)
    assert ended.code == code and "Traceback" not in ended.err, ended
    assert f"{signal.Signals(number).name}: stopped after step 6 of 12, which is saved" in ended.err
    assert "rerun the command to continue from there" in ended.err and (folder / "checkpoints" / "6").exists()
    assert signal.getsignal(number) is before
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl") if "loss" in line] == [1, 2, 3, 4, 5, 6]
    ended = command("train", "--config", config)
    assert ended.code == 0 and "from step 6" in ended.err
    assert_complete(folder)
    assert_same(outcome_of_run(folder), outcome_of_run(finished))


TWICE = """
import os, signal, time
from mtp_jax.runs.interruption import Interruption
from mtp_jax.sharding import make_mesh
from mtp_jax.config import Mesh

with Interruption(make_mesh(Mesh()), print) as interruption:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
    print("requested", interruption.requested(), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(20)
"""


def test_a_second_signal_ends_at_once():
    begun = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, check=False)
    assert ended.returncode == 143 and "requested 15" in ended.stdout, ended
    assert "a second signal ends the run at once" in ended.stdout
    assert time.monotonic() - begun < 18
