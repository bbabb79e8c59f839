"""A pod in small: machines are folders, workers are processes, and one of them is killed with its slice."""

import os
import shutil
import signal
import socket
import sys
import time
from contextlib import suppress

import pytest
import yaml
from fake_cloud import ROOT, Cloud, git, make_repository

WORDS = (
    *("--name", "n", "--accelerator-type", "v5litepod-16", "--zone", "us-central1-a", "--project", "p", "--run", "r"),
    *("--store", "gs://b/f", "--config", "configs/tiny.yaml", "--spot", "--force", "--poll", "1", "--keep"),
)
# Instead of downloading anything: the Python that runs the tests.
UV = """#!/usr/bin/env bash
for to; do :; done
if [[ $1 == venv ]]; then
  mkdir -p "$to/bin"
  printf '#!/usr/bin/env bash\\nPYTHONPATH=%q exec %q "$@"\\n' "$HOME/mtp_jax" "$PYTHON" >"$to/bin/python"
  chmod +x "$to/bin/python"
fi
"""
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    "MTP_JAX_HEARTBEAT_SECONDS": "3",
    "MTP_JAX_LOCK_SECONDS": "3",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture
def pod(tmp_path, make_tree):
    """A cloud whose machines run what they are told, and a repository with a tiny config."""
    repository = make_repository(tmp_path)
    unwanted = shutil.ignore_patterns("__pycache__", "*.safetensors")
    shutil.copytree(ROOT / "mtp_jax", repository / "mtp_jax", ignore=unwanted)
    tree = make_tree("") | {"mesh": {"data": 2, "fsdp": 2}, "checkpoints": {"every": 2}}
    tree["train"]["steps"] = 40
    for key in ("output_dir", "compilation_cache"):  # the scripts say these
        del tree[key]
    (repository / "configs/tiny.yaml").write_text(yaml.safe_dump(tree))
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "--message=tiny")
    git(repository, "push", "--quiet", "origin", "main")
    cloud = Cloud(tmp_path, repository)
    (tmp_path / "uv").write_text(UV)
    (tmp_path / "uv").chmod(0o755)
    cloud.environment |= {"FAKE_UV": str(tmp_path / "uv"), "PYTHON": sys.executable, **ENVIRONMENT}
    yield cloud
    for file in cloud.folder.glob("machine*/mtp_jax_runs/*/pid"):
        with suppress(ProcessLookupError):
            os.killpg(os.getpgid(int(file.read_text())), signal.SIGKILL)


def steps_saved(bucket):
    """Of whole checkpoints in the bucket."""
    names = (name.split("/") for name in bucket.names("b", "f/r/checkpoints/"))
    return [int(parts[3]) for parts in names if parts[4:] == ["manifest.json"] and parts[3].isdigit()]


@pytest.mark.slow
def test_a_slice_lost_in_mid_run_changes_nothing(pod, bucket, start, finish, tmp_path):
    babysit = pod.start("tpu_babysit.sh", *WORDS, **bucket.environment)
    until = time.monotonic() + 200
    while max(steps_saved(bucket), default=0) < 8 and babysit.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    assert babysit.poll() is None and steps_saved(bucket), pod.finish(babysit, 1)
    assert max(steps_saved(bucket)) < 40  # in mid-run
    line = (pod.folder / "tpu").read_text()
    (pod.folder / "tpu").write_text(line.replace("READY", "PREEMPTED"))
    os.kill(int((pod.folder / "machine1/mtp_jax_runs/r/pid").read_text()), signal.SIGKILL)
    outcome = pod.finish(babysit, timeout=300)
    assert outcome.code == 0 and "run r is done" in outcome.err, outcome
    assert sum("tpu-vm" in call and "create" in call for call in outcome.calls) == 2
    assert "resuming gs://b/f/r from step" in (pod.folder / "machine0/mtp_jax_runs/r/log").read_text()

    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        address = f"localhost:{listener.getsockname()[1]}"
    quiet = tmp_path / "quiet"
    started = [
        start(
            *("train", "--config", pod.repository / "configs/tiny.yaml", f"output_dir={quiet}"),
            *(f"compilation_cache={tmp_path / 'compiled'}",),
            **(ENVIRONMENT | {"JAX_COORDINATOR_ADDRESS": address}),
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(i),
        )
        for i in range(2)
    ]
    assert [finish(process).code for process in started] == [0, 0]
    for name in ("metrics.jsonl", "best.json", "model/model.safetensors", "best/model/model.safetensors"):
        assert bucket.content("b", f"f/r/{name}") == (quiet / name).read_bytes(), name
