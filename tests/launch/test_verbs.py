"""Every verb asks the clouds for exactly what golden.txt says, and bad input gives one line that says what to run.

`python -m pytest tests/launch/test_verbs.py` compares; MTP_JAX_GOLDEN=write writes the file anew, to be read as a diff.
"""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from fake_cloud import ROOT, Cloud, git, make_repository

GOLDEN = Path(__file__).with_name("golden.txt")
PLACE = "--zone us-central1-a --project p"
RUN = "--run r --store gs://b/f --config configs/quickstart.yaml"
SCRIPTS = ("tpu_vm.sh", "tpu_babysit.sh", "gce_tpu.sh", "xpk.sh", "gpu.sh", "slurm.sbatch", "worker.sh", "env.sh")

VERBS = [
    f"tpu_vm.sh create --name n --accelerator-type v5litepod-16 {PLACE}",
    f"tpu_vm.sh create --name n --accelerator-type v6e-8 {PLACE} --spot --queued --config configs/quickstart.yaml a=1",
    f"tpu_vm.sh setup --name n {PLACE}",
    f"tpu_vm.sh setup --name n {PLACE} --upload --secrets secrets",
    f"tpu_vm.sh train --name n {PLACE} {RUN} --preset tpu-v5e-overlap train.steps=5 model.path='a b'",
    f"tpu_vm.sh logs --name n {PLACE} --run r --lines 7",
    f"tpu_vm.sh status --name n {PLACE} --run r",
    "tpu_vm.sh fetch --run r --store gs://b/f --to results",
    f"tpu_vm.sh fetch --name n {PLACE} --run r --store /shared --to results",
    f"tpu_vm.sh stop --name n {PLACE} --run r --grace 5",
    f"tpu_vm.sh delete --name n {PLACE}",
    f"tpu_vm.sh delete --name n {PLACE} --queued",
    f"gce_tpu.sh create --name n --accelerator-type v5p-32 {PLACE} --spot",
    f"gce_tpu.sh setup --name n {PLACE}",
    f"gce_tpu.sh train --name n --accelerator-type v5p-16 --explicit {PLACE} {RUN}",
    f"gce_tpu.sh logs --name n {PLACE} --run r",
    f"gce_tpu.sh status --name n {PLACE} --run r",
    "gce_tpu.sh fetch --run r --store gs://b/f",
    f"gce_tpu.sh stop --name n {PLACE} --run r",
    f"gce_tpu.sh delete --name n {PLACE}",
    "xpk.sh image --image host/p/mtp_jax",
    f"xpk.sh train --cluster c --tpu-type v5litepod-16 --slices 2 --image i {PLACE} {RUN} --preset tpu-multislice",
    f"xpk.sh logs --cluster c {PLACE} --run r",
    f"xpk.sh status --cluster c {PLACE} --run r",
    "xpk.sh fetch --run r --store gs://b/f",
    f"xpk.sh stop --cluster c {PLACE} --run r",
    f"xpk.sh delete --cluster c {PLACE} --run r",
    "gpu.sh setup --hosts me@a,me@b",
    f"gpu.sh train --hosts me@a,me@b {RUN}",
    "gpu.sh logs --hosts me@a,me@b --run r",
    "gpu.sh status --hosts me@a,me@b --run r",
    "gpu.sh fetch --hosts me@a,me@b --run r --store /shared",
    "gpu.sh stop --hosts me@a,me@b --run r",
    f"slurm.sbatch {RUN} --python python3",
]


def golden():
    """What each command line is to ask for."""
    blocks = GOLDEN.read_text().split("\n\n") if GOLDEN.exists() else []
    return {first: lines for first, *lines in (block.strip().splitlines() for block in blocks)}


@pytest.mark.parametrize("line", VERBS)
def test_a_verb_calls_what_its_golden_lines_say(cloud, line):
    script, *words = shlex.split(line)
    if " create " not in line:
        cloud.has("READY")
    (cloud.home / "secrets").write_text("HF_TOKEN=not-for-command-lines\n")
    words = [str(cloud.home / word) if word in ("secrets", "results") else word for word in words]
    outcome = cloud.run(script, *words)
    assert outcome.code == 0, outcome
    shown = []
    for call in outcome.calls:
        text = shlex.join(call).replace(str(cloud.home), "HOME").replace(str(cloud.repository.parent), "PARENT")
        shown.append(
            re.sub(r"\b[0-9a-f]{40}\b|(?<=:)[0-9a-f]{12}\b", "COMMIT", re.sub(r"/\S*/tmp\.\w+", "SCRATCH", text))
        )
    if line.startswith(("gpu.sh", "gce_tpu.sh")):
        shown.sort()  # machines are asked at the same time
    assert "not-for-command-lines" not in str(outcome.calls)
    if os.environ.get("MTP_JAX_GOLDEN") == "write":
        blocks = {**golden(), line: shown}
        GOLDEN.write_text("\n\n".join("\n".join([v, *blocks[v]]) for v in VERBS if v in blocks) + "\n")
    assert shown == golden()[line]


@pytest.mark.parametrize("line", [v for v in VERBS if v.split()[1] in ("create", "delete", "train", "setup")])
def test_a_dry_run_calls_nothing_and_prints_the_commands(cloud, line):
    script, *words = shlex.split(line.replace(" --secrets secrets", ""))
    outcome = cloud.run(script, *words, "--dry-run")
    assert outcome.code == 0, outcome
    assert not outcome.calls
    wanted = [call for call in golden()[line] if "secrets" not in call and "mkdir" not in call]
    changing = [call for call in wanted if not re.search(r"describe|list-instances", call)]
    said = [shlex.split(text)[0] for text in outcome.out.splitlines()]
    for program in {shlex.split(call)[0] for call in changing}:
        assert program in said


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_head_of_the_script(cloud, script):
    outcome = cloud.run(script, "--help")
    assert outcome.code == 0 and len(outcome.out.splitlines()) > 5 and not outcome.calls
    assert "#!" not in outcome.out


CREATE = f"tpu_vm.sh create --name n --accelerator-type v5litepod-16 {PLACE}"
TRAIN = f"tpu_vm.sh train --name n {PLACE} {RUN}"
BAD = [
    (CREATE, "create:quota", 1, "quota of project p is too small in us-central1-a: ask for more at https://"),
    (CREATE, "create:capacity", 1, "no capacity now: try later, another zone, or --queued"),
    (CREATE, "create:permission", 1, "no permission in project p"),
    (CREATE, "describe:login", 1, "run: gcloud auth login"),
    (CREATE, "create:invalid", 1, "see what a zone has with: gcloud compute tpus accelerator-types list"),
    (CREATE.replace("-16", "-17"), "", 2, "there is no such slice; v5litepod comes as v5litepod-{1,4,8,16,"),
    (CREATE.replace("v5litepod", "v9x"), "", 2, "should be v2-N, v3-N,"),
    (CREATE.replace("v5litepod-16", "tpu7x-8"), "", 2, "see launch/gce_tpu.sh"),
    (CREATE.replace("--zone us-central1-a", ""), "", 2, "run: gcloud config set compute/zone NAME"),
    (CREATE.replace("--project p", ""), "", 2, "run: gcloud config set project NAME"),
    (CREATE.replace("us-central1-a", "central"), "", 2, "should look like us-central1-a"),
    (CREATE.replace("--name n", "--name N_1"), "", 2, "should be 1 to 40 lower-case letters"),
    (CREATE + " --spott", "", 2, "unknown option --spott"),
    (CREATE + " --spot --reserved", "", 2, "--spot and --reserved exclude each other"),
    ("tpu_vm.sh crate", "", 2, "unknown verb crate"),
    (TRAIN, "", 1, "there is no slice n in us-central1-a; run: "),
    (TRAIN.replace("gs://b/f", "runs"), "", 2, "should be a bucket"),
    (TRAIN.replace("quickstart", "quickstop"), "", 2, "there is no such file"),
    (TRAIN + " output_dir=x", "", 2, "--store and --run together"),
    (TRAIN + " --preset fast", "", 2, "there is no preset fast; see: launch/env.sh --list"),
    (TRAIN, "tpu:READY bucket:permission", 2, "bucket of gs://b/f cannot be used"),
    (TRAIN, "tpu:READY bucket:absent-resource", 2, "for a new one run: gcloud storage buckets create gs://b"),
    (TRAIN, "tpu:PREEMPTED", 1, "is not ready (state PREEMPTED"),
    ("gpu.sh train --hosts -oProxyCommand=x " + RUN, "", 2, "should be names like me@host1"),
    (f"gce_tpu.sh create --name n --accelerator-type v2-8 {PLACE}", "", 2, "see launch/tpu_vm.sh"),
    (f"gce_tpu.sh create --name n --accelerator-type v5p-8 {PLACE}", "template:exists", 1, "delete it first"),
]


@pytest.mark.parametrize(("line", "answers", "code", "says"), BAD)
def test_bad_input_is_one_line_that_says_what_to_run(cloud, line, answers, code, says):
    for kind, word in (answer.split(":") for answer in answers.split()):
        if kind == "tpu":
            cloud.has(word)
        else:
            cloud.says(kind, word)
    outcome = cloud.run(*shlex.split(line))
    errors = [text for text in outcome.err.splitlines() if text.startswith("error: ")]
    assert outcome.code == code and len(errors) == 1, outcome
    assert says in errors[0].replace("$", ""), outcome
    assert cloud.slice is None or "tpu:" in answers


def test_gcloud_that_is_not_installed_is_named(cloud):
    (cloud.binaries / "gcloud").unlink()
    outcome = cloud.run(*shlex.split(CREATE))
    assert outcome.code == 2 and "gcloud is not installed" in outcome.err and "gcloud auth login" in outcome.err


def test_setup_refuses_what_workers_could_not_check_out(tmp_path):
    repository = make_repository(tmp_path)
    cloud = Cloud(tmp_path, repository)
    setup = shlex.split(f"tpu_vm.sh setup --name n {PLACE}")
    cloud.has("READY")
    (repository / "launch/README.md").write_text("changed")
    dirty = cloud.run(*setup)
    git(repository, "commit", "--all", "--quiet", "--message=more")
    unpushed = cloud.run(*setup)
    uploaded = cloud.run(*setup, "--upload")
    assert dirty.code == 2 and "run: git commit --all" in dirty.err and not dirty.calls
    assert unpushed.code == 2 and "run: git push origin main, or add --upload" in unpushed.err and not unpushed.calls
    assert uploaded.code == 0


def test_what_does_not_fit_is_refused_before_anything_is_created_unless_forced(tmp_path):
    repository = make_repository(tmp_path)
    (repository / "mtp_jax").mkdir()
    (repository / "mtp_jax/preflight.py").touch()
    cloud = Cloud(tmp_path, repository)
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\necho "needs 20 GB of 16 GB: $*"\nexit $(cat $FAKE/fits)\n')
    python.chmod(0o755)
    line = [*shlex.split(CREATE), "--config", "configs/quickstart.yaml", "train.steps=5"]
    outcomes = {}
    for code in (1, 2, 0):
        (cloud.folder / "fits").write_text(str(code))
        outcomes[code] = cloud.run(*line, PYTHON=str(python))
    assert outcomes[1].code == 2 and "does not fit v5e:4x4" in outcomes[1].err and "needs 20 GB" in outcomes[1].err
    assert "--config configs/quickstart.yaml train.steps=5 --topology v5e:4x4" in outcomes[1].err
    assert outcomes[2].code == 2 and not outcomes[2].calls and not outcomes[1].calls
    assert outcomes[0].code == 0 and cloud.slice.startswith("READY")
    (cloud.folder / "tpu").unlink()
    (cloud.folder / "fits").write_text("1")
    assert cloud.run(*line, "--force", PYTHON=str(python)).code == 0


def test_preflight_takes_the_words_it_is_called_with(tmp_path, command, monkeypatch):
    from mtp_jax.errors import UserError
    from mtp_jax.fitting import chips, fit

    repository, asked = make_repository(tmp_path), []
    (repository / "mtp_jax").mkdir()
    (repository / "mtp_jax/preflight.py").touch()
    line = [*shlex.split(CREATE), "--config", "configs/quickstart.yaml", "train.steps=77", "--dry-run"]
    printed = Cloud(tmp_path, repository).run(*line).out.splitlines()
    words = next(shlex.split(said) for said in printed if "mtp_jax.preflight" in said)

    def place(config, topology):
        asked.append((config.train.steps, topology))
        raise UserError("seen")

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(chips, "without_chip", lambda: None)
    monkeypatch.setattr(fit, "place_of", place)
    ended = command("preflight", *words[words.index("mtp_jax.preflight") + 1 :])
    assert ended.errors == ["seen"] and asked == [(77, "v5e:4x4")], ended


@pytest.mark.parametrize("kind", ["v2-8", "v3-32", "v5litepod-1"])
def test_a_slice_that_preflight_does_not_know_is_not_refused(tmp_path, kind):
    repository = make_repository(tmp_path)
    (repository / "mtp_jax").mkdir()
    (repository / "mtp_jax/preflight.py").touch()
    line = shlex.split(CREATE.replace("v5litepod-16", kind))
    outcome = Cloud(tmp_path, repository).run(*line, "--config", "configs/quickstart.yaml", PYTHON="/no/such/python")
    assert outcome.code == 0 and "it is not checked whether the run fits" in outcome.err, outcome


def test_printed_words_are_read_back_as_they_were():
    words = ["a", "x y", "it's", "--b=x y", "--c=it's", "--d=1", "", "$HOME", "a'b'--e=f g"]
    program = '. "$1/launch/lib.sh"; shift; quoted "$@"'
    said = subprocess.run(["bash", "-c", program, "-", str(ROOT), *words], capture_output=True, text=True).stdout
    assert shlex.split(said) == words


def test_a_call_that_hangs_is_ended(cloud):
    cloud.says("create", "hang")
    outcome = cloud.run(*shlex.split(CREATE), "--create-timeout", "1")
    assert outcome.code == 1 and "no answer within 1 seconds" in outcome.err
