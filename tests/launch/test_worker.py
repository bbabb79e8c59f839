"""What runs on each machine: one run at a time, its end noted, a checkpoint before it is stopped."""

import time

import pytest

PYTHON = """#!/usr/bin/env bash
echo "$*" >>~/started
trap 'exit 143' TERM
for ((i = 0; i < 500; i++)); do
  if [[ -e ~/end ]]; then exit "$(<~/end)"; fi
  sleep 0.02
done
"""


@pytest.fixture
def worker(cloud):
    """A machine whose Python only waits until it is told how to end."""
    python = cloud.home / "mtp_jax_venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    yield cloud
    (cloud.home / "end").write_text("0")


def state(cloud):
    """What the worker says of the run."""
    return cloud.run("worker.sh", "status", "r").out.split(" run=r ")[1].strip()


def reached(cloud, wanted):
    """Whether the run comes to be as it should within some seconds."""
    deadline = time.monotonic() + 10
    while state(cloud) != wanted and time.monotonic() < deadline:
        time.sleep(0.02)
    return state(cloud) == wanted


def started(cloud, wanted=1):
    """Wait for the process itself, which comes after the script that started it has ended."""
    deadline = time.monotonic() + 10
    path = cloud.home / "started"
    while (not path.exists() or len(path.read_text().splitlines()) < wanted) and time.monotonic() < deadline:
        time.sleep(0.02)
    return path.read_text().splitlines()


def test_a_run_is_started_once_and_its_exit_code_noted(worker):
    assert state(worker) == "state=absent code=-"
    worker.run("worker.sh", "train", "r", "none", "--config", "c", "a=b c")
    again = worker.run("worker.sh", "train", "r", "none", "--config", "c")
    assert state(worker) == "state=running code=-" and "already under way" in again.err
    assert started(worker) == ["-m mtp_jax.train --config c a=b c"]
    (worker.home / "end").write_text("2")
    assert reached(worker, "state=exited code=2")


def test_stop_asks_first_and_the_same_command_starts_again(worker):
    worker.run("worker.sh", "train", "r", "none")
    started(worker)
    stopped = worker.run("worker.sh", "stop", "r", "5")
    assert "ended on" in stopped.err and reached(worker, "state=exited code=143")
    worker.run("worker.sh", "train", "r", "none")
    assert len(started(worker, 2)) == 2


def test_setup_does_not_change_the_code_of_a_run_that_is_under_way(worker):
    worker.run("worker.sh", "train", "r", "none")
    setup = worker.run("tpu_vm.sh", "setup", "--name", "n", "--zone", "us-central1-a", "--project", "p", "--dry-run")
    bootstrap = next(line for line in setup.out.splitlines() if "worker.sh install" in line)
    import shlex
    import subprocess

    command = shlex.split(bootstrap)[-1].removeprefix("--command=")
    outcome = subprocess.run(["bash", "-c", command], env=worker.environment, capture_output=True, text=True)
    assert outcome.returncode == 1 and "a run is under way here" in outcome.stderr


def test_a_preset_and_secrets_reach_the_run(worker):
    (worker.home / "mtp_jax_venv/bin/python").write_text(
        '#!/usr/bin/env bash\necho "$LIBTPU_INIT_ARGS $HF_TOKEN" >~/seen\n'
    )
    (worker.home / ".config/mtp_jax").mkdir(parents=True)
    (worker.home / ".config/mtp_jax/secrets").write_text("HF_TOKEN=secret\n")
    worker.run("worker.sh", "train", "r", "tpu-v6e-vmem-96m")
    assert reached(worker, "state=exited code=0")
    assert (worker.home / "seen").read_text() == "--xla_tpu_scoped_vmem_limit_kib=98304 secret\n"
