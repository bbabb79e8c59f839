"""A run that is killed, or that fills its disk, and is started again ends as if nothing had happened."""

import random
import subprocess
import time
from pathlib import Path

import disturbed
import numpy as np
import pytest
from conftest import read_lines
from disturbed import BALLAST
from safetensors.numpy import load_file

DISTURBED = Path(disturbed.__file__)
SIGKILLED = -9


def outcome_of_run(folder):
    """What must not depend on disturbances."""
    return (folder / "metrics.jsonl").read_bytes(), load_file(folder / "model" / "model.safetensors")


def assert_same(a, b):
    assert a[0] == b[0]
    assert a[1].keys() == b[1].keys()
    assert all(np.array_equal(a[1][key].view(np.uint32), b[1][key].view(np.uint32)) for key in a[1])


def assert_complete(folder, steps=12):
    metrics = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in metrics if "loss" in line] == list(range(1, steps + 1))
    assert [line["step"] for line in metrics if "held_out_loss" in line] == list(range(4, steps + 1, 4))
    assert [line["step"] for line in read_lines(folder / "timing.jsonl")] == list(range(1, steps + 1))
    assert not [path for path in folder.rglob("*") if ".part" in path.name or "tmp" in path.name]


@pytest.fixture(scope="module")
def undisturbed(finished):
    assert_complete(finished)
    return outcome_of_run(finished)


@pytest.fixture
def start_disturbed(start):
    """A function that starts a train command that disturbs itself: (config, point, count, action) -> Popen."""

    def popen(config, point, count, action):
        return start("train", "--config", config, script=[str(DISTURBED), point, str(count), str(action)])

    return popen


def test_a_killed_run_ends_like_an_undisturbed_one(tree, write_config, start_disturbed, finish, command, undisturbed):
    config, folder, resumed = write_config(tree), Path(tree["output_dir"]), []
    # Lines of metrics: a line per step, and one more at steps 4, 8 and 12. Checkpoints: at steps 3, 6, 9 and 12, and at
    # 4 and 8, which are the best so far. A save waits until all but one before it are sealed: that of step 3 is at
    # the ninth line of a run, however slow the disk.
    for point, count in [
        ("tokenizer", 1),
        ("torn", 2),
        ("begun", 1),
        ("manifest", 1),
        ("line", 9),
        ("cut", 1),
        ("model", 1),
    ]:
        sealed = max((int(path.parent.name) for path in folder.glob("checkpoints/*/manifest.json")), default=0)
        ended = finish(start_disturbed(config, point, count, "kill"))
        assert ended.code == SIGKILLED, ended
        if point != "cut":  # which comes before anything is said
            assert ("resuming" in ended.err) == (sealed > 0), ended
            assert sealed == 0 or f"from step {sealed}\n" in ended.err, ended
        resumed.append(sealed)
    assert resumed[-1] in (3, 4, 6, 8, 9), resumed
    assert not (folder / "model").exists()
    ended = command("train", "--config", config)
    assert ended.code == 0 and "resuming" in ended.err and "from step 12" in ended.err
    assert_complete(folder)
    assert_same(outcome_of_run(folder), undisturbed)


@pytest.mark.slow
def test_a_run_killed_at_every_step_ends_like_an_undisturbed_one(
    tree, write_config, start, start_disturbed, finish, undisturbed
):
    tree["checkpoints"]["every"] = 1
    config, folder = write_config(tree), Path(tree["output_dir"])
    for _ in range(30):
        ended = finish(start_disturbed(config, "line", 2, "kill"))
        if ended.code == 0:
            break
        assert ended.code == SIGKILLED, ended
    assert finish(start("train", "--config", config)).code == 0
    assert_complete(folder)
    assert_same(outcome_of_run(folder), undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_at_random_moments_ends_like_an_undisturbed_one(
    tree, write_config, start, finish, undisturbed, seed
):
    config, folder, rng = write_config(tree), Path(tree["output_dir"]), random.Random(seed)
    begun = time.monotonic()
    finish(start("train", "--config", write_config({**tree, "output_dir": str(folder) + "-timed"}, "timed.yaml")))
    usual = time.monotonic() - begun
    for _ in range(8):
        process = start("train", "--config", config)
        time.sleep(rng.uniform(0.2, 1.0) * usual)
        process.kill()
        finish(process)
    assert finish(start("train", "--config", config)).code == 0
    assert_complete(folder)
    assert_same(outcome_of_run(folder), undisturbed)


# ---- a full disk


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own, of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def assert_full_disk(ended, points=""):
    assert ended.code == 2, (points, ended)
    assert len(ended.errors) == 1 and "the disk is full" in ended.errors[0], (points, ended)
    assert "Traceback" not in ended.err and "Exception ignored" not in ended.err, (points, ended)


def test_a_run_on_a_full_disk_says_so_and_resumes_later(
    tree, write_config, small_disk, start_disturbed, finish, command, monkeypatch, undisturbed
):
    folder = small_disk / "run"
    config = write_config({**tree, "output_dir": str(folder)})
    for point, count in [("line", 2), ("save", 1), ("begun", 1), ("model", 1)]:
        if point == "begun":  # a save that fails in the background, also while the process ends
            ended = finish(start_disturbed(config, point, count, small_disk))
        else:
            with monkeypatch.context() as patched:
                disturbed.arrange(point, count, small_disk, patched.setattr)
                ended = command("train", "--config", config)
        if point == "begun" and ended.code == 0:
            continue  # the save was quicker than the filling of the disk
        assert_full_disk(ended, point)
        assert not (folder / "model").exists()
        (small_disk / BALLAST).unlink()
    assert command("train", "--config", config).code == 0
    assert_complete(folder)
    assert_same(outcome_of_run(folder), undisturbed)


@pytest.mark.slow
def test_a_disk_of_any_size_too_small_is_reported(tree, write_config, small_disk, start, finish, undisturbed):
    folder = small_disk / "run"
    config = write_config({**tree, "output_dir": str(folder)})
    for kib in [16, 64, 128, 256, 512, 768, 1024, 1536, 2048, 8192]:
        subprocess.run(["mount", "-o", f"remount,size={kib}k", str(small_disk)], check=True)
        ended = finish(start("train", "--config", config))
        if ended.code == 0:
            break
        assert_full_disk(ended, kib)
    assert ended.code == 0 and kib > 64
    assert_complete(folder)
    assert_same(outcome_of_run(folder), undisturbed)


# ---- a checkpoint that is damaged


def copy_of(finished, tree, tmp_path):
    folder = Path(tree["output_dir"])
    subprocess.run(["cp", "-a", str(finished), str(folder)], check=True)
    return folder


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_does(
    finished, undisturbed, tree, write_config, command, tmp_path
):
    folder = copy_of(finished, tree, tmp_path)
    config = write_config(tree)

    def damage(step):
        largest = max((folder / "checkpoints" / step).rglob("d/*"), key=lambda path: path.stat().st_size)
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)

    damage("12")
    ended = command("train", "--config", config)
    assert ended.code == 0 and "its sha256 differs. It is set aside as 12.damaged" in ended.err, ended
    assert "from step 9" in ended.err
    assert_complete(folder)
    assert_same(outcome_of_run(folder), undisturbed)

    damage("9")
    damage("12")
    ended = command("train", "--config", config)
    assert ended.code == 0 and "starts afresh from step 0" in ended.err and "resuming" not in ended.err, ended
    assert_complete(folder)
    assert_same(outcome_of_run(folder), undisturbed)
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {"9", "12", "9.damaged", "12.damaged", "12.damaged-2"}
