"""Scripts, manifests and the Dockerfile are what their linters and schemas want."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"


def lint(*words):
    """The findings of a linter that comes with the `test` extra."""
    # It is installed beside this Python, whether or not that environment is activated.
    found = shutil.which(words[0], path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{words[0]} is not installed; it comes with the extra `test`")
    return subprocess.run([found, *words[1:]], cwd=ROOT, capture_output=True, text=True)


def test_shellcheck_finds_nothing():
    scripts = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch", ROOT / "tests/launch/fake.sh"]
    found = lint("shellcheck", "--external-sources", "--source-path=.", *map(str, scripts))
    assert found.returncode == 0, found.stdout


def test_hadolint_finds_nothing():
    found = lint("hadolint", "launch/Dockerfile")
    assert found.returncode == 0 and not found.stdout, found.stdout


@pytest.fixture(scope="module")
def jobset_schema():
    """The published schema of a JobSet."""
    root = Path(os.environ.get("MTP_JAX_SHARED") or ROOT.parent / "shared")
    path = root / "schemas/jobset/jobset.x-k8s.io_jobsets.yaml"
    if not path.is_file():
        pytest.skip(f"{path} is not there; MTP_JAX_SHARED names the folder that holds schemas/jobset")
    definition = yaml.load(path.read_text(), yaml.CSafeLoader)
    version = next(v for v in definition["spec"]["versions"] if v["name"] == "v1alpha2")
    return closed(version["schema"]["openAPIV3Schema"])


def closed(schema):
    """The schema with unknown keys refused, as `kubectl apply` refuses them in a strict field validation."""
    if isinstance(schema, dict):
        schema = {key: closed(value) for key, value in schema.items()}
        if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
            schema.setdefault("additionalProperties", False)
        if schema.get("x-kubernetes-int-or-string"):
            schema.pop("type", None)
    elif isinstance(schema, list):
        schema = [closed(value) for value in schema]
    return schema


def faults(manifest, schema):
    """Where a manifest breaks a schema; metadata is the API server's own and not described there."""
    from jsonschema import Draft202012Validator

    return [error.json_path for error in Draft202012Validator(schema).iter_errors({**manifest, "metadata": {}})]


def test_the_jobset_follows_its_schema_and_a_misspelt_one_does_not(jobset_schema):
    manifest = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and manifest["kind"] == "JobSet"
    assert faults(manifest, jobset_schema) == []
    pods = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    pods["containers"][0]["ressources"] = pods["containers"][0].pop("resources")
    assert faults(manifest, jobset_schema)


def test_the_jobset_signals_python_and_keeps_checkpoints_in_a_bucket():
    job = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())["spec"]
    spec = job["replicatedJobs"][0]["template"]["spec"]
    container = spec["template"]["spec"]["containers"][0]
    assert container["command"] == ["python", "-m", "mtp_jax.train"]
    assert any(a.startswith("output_dir=gs://") for a in container["args"])
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] >= 60 and job["failurePolicy"]["maxRestarts"] > 0
    chips = 1
    for side in spec["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(side)
    assert spec["parallelism"] == spec["completions"] == chips // container["resources"]["limits"]["google.com/tpu"]
    assert (ROOT / next(a for a in container["args"] if a.startswith("--config=")).split("=")[1]).is_file()


def test_the_skypilot_task_has_a_shell_that_parses_and_a_config_that_exists():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert (ROOT / task["envs"]["CONFIG"]).is_file()
    for part in ("setup", "run"):
        assert subprocess.run(["bash", "-n"], input=task[part], text=True).returncode == 0


def test_slurm_runs_one_step_and_goes_back_into_the_queue_when_asked_to_end(cloud):
    cloud.says("srun", "fail")
    words = ("--run", "r", "--store", "/s", "--config", "configs/quickstart.yaml", "--python", "python3", "a=1")
    failed = cloud.run("slurm.sbatch", *words, SLURM_JOB_ID="7")
    assert failed.code == 1 and [call[0] for call in failed.calls] == ["srun"]
    (cloud.binaries / "srun").unlink()
    (cloud.binaries / "srun").write_text("#!/usr/bin/env bash\nexit 143\n")
    (cloud.binaries / "srun").chmod(0o755)
    preempted = cloud.run("slurm.sbatch", *words, SLURM_JOB_ID="7")
    assert preempted.calls[-1] == ["scontrol", "requeue", "7"]
    bounded = cloud.run("slurm.sbatch", *words, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="50")
    assert bounded.code == 143 and len(bounded.calls) == len(preempted.calls)
