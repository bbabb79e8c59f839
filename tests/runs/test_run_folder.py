"""A run in a bucket resumes from the bucket alone, and leaves there what a local one leaves in its folder."""

import io
import json
from pathlib import Path

import disturbed
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load, load_file

from mtp_jax import storage
from mtp_jax.config import Checkpoints as Section
from mtp_jax.errors import UserError
from mtp_jax.runs import checkpoints as module
from mtp_jax.runs.checkpoints import Checkpoints
from mtp_jax.runs.folder import RunFolder
from mtp_jax.training.program import abstract
from mtp_jax.training.step import TrainState

DISTURBED = Path(disturbed.__file__)
RUN = "gs://b/runs/one"
SIGKILLED = -9


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that gives the environment of a machine on which nothing is yet."""
    monkeypatch.setenv(storage.LOCK_SECONDS, "2")

    def new(name):
        (tmp_path / name).mkdir()
        return {"HOME": str(tmp_path / name), "MTP_JAX_HEARTBEAT_SECONDS": "3"}

    return new


def newest(bucket, folder):
    """The object of a folder that was written last."""
    return max(bucket.names("b", folder), key=bucket.buckets["b"].generation).removeprefix(folder)


def files_of(home):
    return [path for path in Path(home["HOME"]).rglob("*") if path.is_file() and "mtp_jax" in str(path)]


def test_a_run_killed_while_it_saves_resumes_elsewhere_from_the_bucket_alone(
    tree, write_config, bucket, machine, start, finish, finished
):
    config = write_config(tree | {"output_dir": RUN})
    # Checkpoints come at steps 3, 4, 6, 8, 9 and 12: the third is there but for its manifest.
    ended = finish(
        start("train", "--config", config, script=[str(DISTURBED), "manifest", "3", "kill"], **machine("first"))
    )
    assert ended.code == SIGKILLED, ended
    names = bucket.names("b", "runs/one/checkpoints/")
    assert "runs/one/checkpoints/4/manifest.json" in names and "runs/one/checkpoints/6/manifest.json" not in names
    assert any(name.startswith("runs/one/checkpoints/6/state/") for name in names)

    home = machine("second")
    ended = finish(start("train", "--config", config, **home))
    assert ended.code == 0 and f"resuming {RUN} from step 4" in ended.err, ended
    assert f"{RUN}/checkpoints/6: this checkpoint was never finished" in ended.err
    assert "was not renewed for 2 s and is taken over" in ended.err
    assert ended.out.endswith(f"model: {RUN}/model\n")
    for name in ("metrics.jsonl", "best.json"):
        assert bucket.content("b", f"runs/one/{name}") == (finished / name).read_bytes()
    for name in ("model/model.safetensors", "best/model/model.safetensors"):
        ours, theirs = load(bucket.content("b", f"runs/one/{name}")), load_file(finished / name)
        assert all(np.array_equal(ours[key].view(np.uint32), theirs[key].view(np.uint32)) for key in theirs)

    objects = bucket.buckets["b"].objects
    assert {name.split("/")[3] for name in objects if "/checkpoints/" in name} == {
        path.name for path in (finished / "checkpoints").iterdir()
    }
    assert newest(bucket, "runs/one/model/") == "config.json"
    assert not [name for name in objects if ".part" in name or name.endswith(".lock")]
    assert files_of(home) == []


# ---- checkpoints


class Counter:
    def get_state(self):
        return {"lanes": {"0": 1}}

    def set_state(self, state):
        self.state = state


def state(step):
    return TrainState(jnp.int32(step), {"w": jnp.arange(2000.0) * step}, {"m": jnp.full(3, step)})


def save(steps, **section):
    run = RunFolder(RUN)
    run.begin()
    with run, Checkpoints(run, Section(**section)) as checkpoints:
        for step in steps:
            checkpoints.save(state(step), Counter())


def restore():
    """The step that a run would resume from, on a machine that has nothing."""
    run = RunFolder(RUN)
    run.begin()
    with run, Checkpoints(run, Section()) as checkpoints:
        step = checkpoints.latest()
        if step is not None:
            like = abstract(state(0), jax.tree.map(lambda leaf: leaf.sharding, state(0)))
            restored = checkpoints.restore(step, like, batches := Counter())
            assert np.array_equal(restored.trained["w"], np.arange(2000.0) * step)
            assert batches.state == {"lanes": {"0": 1}}
            assert [path.name for path in (run.path / "checkpoints" / str(step)).iterdir()] == ["manifest.json"]
        return step


def steps_of(bucket):
    return sorted({name.split("/")[3] for name in bucket.names("b", "runs/one/checkpoints/")})


def test_the_newest_checkpoints_are_kept_in_the_bucket_each_with_its_manifest_last(bucket):
    save([1, 2, 3, 4])
    assert steps_of(bucket) == ["3", "4"] and restore() == 4
    assert [newest(bucket, f"runs/one/checkpoints/{step}/") for step in (3, 4)] == ["manifest.json"] * 2


@pytest.mark.parametrize("how", ["flipped", "missing"])
def test_a_damaged_checkpoint_is_set_aside_in_the_bucket(bucket, how, capsys):
    save([1, 2])
    names = [name for name in bucket.names("b", "runs/one/checkpoints/2/state/") if "trained" in name]
    largest = max(names, key=lambda name: len(bucket.content("b", name)))
    content = bytearray(bucket.content("b", largest))
    content[len(content) // 2] ^= 1
    if how == "flipped":
        bucket.buckets["b"].put(largest, bytes(content), None)
    else:
        del bucket.buckets["b"].objects[largest]
    assert restore() == 1 and steps_of(bucket) == ["1", "2.damaged"]
    assert f"{RUN}/checkpoints/2: this checkpoint is damaged" in capsys.readouterr().err


def test_a_checkpoint_from_the_bucket_is_one_of_a_local_run(bucket, tmp_path):
    save([1])
    storage.download(f"{RUN}/checkpoints", storage.listing(f"{RUN}/checkpoints"), tmp_path / "checkpoints")
    with Checkpoints(RunFolder(str(tmp_path)), Section()) as checkpoints:
        assert checkpoints.latest() == 1
        like = abstract(state(0), jax.tree.map(lambda leaf: leaf.sharding, state(0)))
        assert int(checkpoints.restore(1, like).step) == 1


def test_files_of_all_processes_are_in_the_manifest_and_the_first_wins(bucket, monkeypatch):
    other = {"state/_METADATA": {"bytes": 1, "sha256": "other"}, "data/4.json": {"bytes": 2, "sha256": "theirs"}}
    monkeypatch.setattr(module.processes, "to_first", lambda about, files: [files, other])
    save([1])
    files = json.load(io.BytesIO(bucket.content("b", "runs/one/checkpoints/1/manifest.json")))["files"]
    assert files["data/4.json"]["sha256"] == "theirs" and files["state/_METADATA"]["sha256"] != "other"


# ---- faults


def test_a_second_run_on_a_folder_of_a_bucket_is_refused(tree, write_config, bucket, command, monkeypatch):
    monkeypatch.setenv(storage.LOCK_SECONDS, "1")
    with storage.BucketLock(RUN):
        ended = command("train", "--config", write_config(tree | {"output_dir": RUN}))
        assert ended.code == 2 and len(ended.errors) == 1, ended
        assert ended.errors[0].startswith(f"output_dir: {RUN} is in use by another run that has not ended (process ")
        assert bucket.names("b") == ["runs/one/.lock"]


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_bucket_that_may_not_be_used_is_one_line(tree, write_config, bucket, command, method):
    bucket.refuse = lambda asked, path: 403 if asked == method else 0
    ended = command("train", "--config", write_config(tree | {"output_dir": RUN}))
    assert ended.code == 2 and len(ended.errors) == 1, ended
    assert ended.errors[0].startswith(RUN) and "needs the role Storage Object Admin on the bucket" in ended.errors[0]
    assert "Traceback" not in ended.err


def test_a_bucket_that_does_not_exist_is_one_line(tree, write_config, bucket, command):
    ended = command("train", "--config", write_config(tree | {"output_dir": "gs://none/run"}))
    assert ended.code == 2 and len(ended.errors) == 1 and "there is no such object or bucket" in ended.errors[0], ended


def test_other_settings_for_a_run_in_a_bucket_are_refused(tree, bucket, write_config, command):
    from mtp_jax.config_file import dump, validate

    storage.write(f"{RUN}/config.yaml", dump(validate(tree | {"output_dir": RUN, "seed": 1}, "tree")).encode())
    ended = command("train", "--config", write_config(tree | {"output_dir": RUN}))
    assert ended.code == 2 and f"{RUN} holds a run with other values of seed" in ended.errors[0], ended


def test_what_was_recorded_reaches_the_bucket_when_a_run_fails(bucket):
    run = RunFolder(RUN)
    run.begin()
    with pytest.raises(UserError), run:
        (run.path / "metrics.jsonl").write_text("{}\n")
        raise UserError("not finite")
    assert bucket.content("b", "runs/one/metrics.jsonl") == b"{}\n" and not run.path.exists()


# ---- compiled programs


@pytest.mark.slow
def test_compiled_programs_are_kept_in_a_bucket(tree, write_config, bucket, machine, start, finish):
    tree["train"] |= {"steps": 3, "warmup_steps": 1}
    tree |= {"evaluation": {}, "compilation_cache": "gs://b/compiled"}
    for name, had in (("first", False), ("second", True)):
        config, asked = write_config(tree | {"output_dir": f"gs://b/{name}"}), len(bucket.requests)
        ended = finish(start("train", "--config", config, JAX_COMPILATION_CACHE_DIR="", **machine(name)))
        assert ended.code == 0 and "compilation cache" not in ended.err, ended
        calls = [(method, f"{path} {query}") for method, path, query in bucket.requests[asked:]]
        wrote = [words for method, words in calls if method == "POST" and "compiled" in words]
        assert bool(wrote) != had, wrote
    assert bucket.names("b", "compiled/")
