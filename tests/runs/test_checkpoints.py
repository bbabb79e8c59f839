"""Which checkpoints exist, which are kept, and which one a run resumes from."""

import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.config import Checkpoints as Section
from mtp_jax.errors import UserError
from mtp_jax.runs import checkpoints as module
from mtp_jax.runs.checkpoints import Checkpoints
from mtp_jax.runs.folder import RunFolder
from mtp_jax.training.program import abstract
from mtp_jax.training.step import TrainState


class Counter:
    """An iterator of batches that remembers how many it gave."""

    def __init__(self, given=0):
        self.given = given

    def get_state(self):
        return {"lanes": {"0": self.given}}

    def set_state(self, state):
        self.given = state["lanes"]["0"]


def state(step):
    return TrainState(jnp.int32(step), {"w": jnp.arange(2000.0) * step}, {"m": jnp.full(3, step)})


def save(folder, steps, best=None, **section):
    with Checkpoints(RunFolder(str(folder.parent)), Section(**section)) as checkpoints:
        for step in steps:
            checkpoints.save(state(step), Counter(step), best)
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def restore(folder):
    """The step that a run would resume from, with its weights and its iterator's place."""
    with Checkpoints(RunFolder(str(folder.parent)), Section()) as checkpoints:
        step = checkpoints.latest()
        if step is None:
            return None
        like = state(0)
        like = abstract(like, jax.tree.map(lambda leaf: leaf.sharding, like))
        batches = Counter()
        restored = checkpoints.restore(step, like, batches)
        assert int(restored.step) == batches.given == step
        assert np.array_equal(restored.trained["w"], np.arange(2000.0) * step)
        return step


@pytest.mark.parametrize(("keep", "best", "kept"), [(2, None, ["4", "5"]), (1, 2, ["2", "5"]), (3, 4, ["3", "4", "5"])])
def test_the_newest_and_the_best_are_kept(tmp_path, keep, best, kept):
    assert names(save(tmp_path / "checkpoints", [1, 2, 3, 4, 5], best, keep=keep)) == kept
    assert restore(tmp_path / "checkpoints") == 5


def test_hashing_does_not_hold_up_the_next_save(tmp_path, monkeypatch):
    write = module.write_manifest

    def slowly(*arguments):
        time.sleep(2)
        write(*arguments)

    monkeypatch.setattr(module, "write_manifest", slowly)
    with Checkpoints(RunFolder(str(tmp_path)), Section()) as checkpoints:
        checkpoints.save(state(1), Counter(1))
        begun = time.monotonic()
        checkpoints.save(state(2), Counter(2))
        assert time.monotonic() - begun < 1.5
        assert not (tmp_path / "checkpoints" / "1" / "manifest.json").exists()
    assert (tmp_path / "checkpoints" / "2" / "manifest.json").exists()


def kinds(folder):
    """A file of each kind of a checkpoint: those whose names are digests stand for each other."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        hashed = len(path.name) == 32
        found[path.parent if hashed else path] = path
    return list(found.values())


@pytest.mark.parametrize("how", ["deleted", "emptied", "halved", "flipped"])
def test_whatever_is_damaged_the_one_before_is_used(tmp_path, capsys, how):
    count = len(kinds(save(tmp_path / "pristine" / "checkpoints", [1, 2]) / "2"))
    assert count >= 8
    for i in range(count):
        folder = save(tmp_path / f"c{i}" / "checkpoints", [1, 2])
        path = kinds(folder / "2")[i]
        whole = path.read_bytes()
        if how == "deleted":
            path.unlink()
        elif how == "emptied" and whole:
            os.truncate(path, 0)
        elif how == "halved" and whole:
            os.truncate(path, len(whole) // 2)
        elif whole:
            middle = len(whole) // 2
            path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :])
        else:
            continue
        capsys.readouterr()
        assert restore(folder) == 1, path
        said = capsys.readouterr().err
        aside = "2.unfinished" if path.name == "manifest.json" and how == "deleted" else "2.damaged"
        assert path.name in said and f"set aside as {aside}" in said
        assert names(folder) == ["1", aside]


def test_without_a_whole_checkpoint_the_run_starts_afresh(tmp_path, capsys):
    folder = save(tmp_path / "checkpoints", [1, 2])
    for step in ("1", "2"):
        (folder / step / "data" / "0.json").write_text("{}")
    assert restore(folder) is None
    assert "starts afresh from step 0" in capsys.readouterr().err
    assert names(folder) == ["1.damaged", "2.damaged"]


def test_what_is_set_aside_twice_keeps_two_names_and_the_unfinished_goes(tmp_path):
    folder = save(tmp_path / "checkpoints", [1, 2])
    for _ in range(2):
        (folder / "2" / "data" / "0.json").unlink()
        assert restore(folder) == 1
        save(folder, [2])
    (folder / "2" / "manifest.json").unlink()
    assert restore(folder) == 1 and names(folder) == ["1", "2.damaged", "2.damaged-2", "2.unfinished"]
    save(folder, [2])
    assert names(folder) == ["1", "2", "2.damaged", "2.damaged-2"]


def test_the_iterators_of_several_processes_are_handed_over_together(tmp_path, monkeypatch):
    for sequence in (0, 8):
        with Checkpoints(RunFolder(str(tmp_path)), Section(), first_sequence=sequence) as checkpoints:
            checkpoints._write_data(tmp_path / "checkpoints" / "3" / "data", {"lanes": {str(sequence): 1}})
    with Checkpoints(RunFolder(str(tmp_path)), Section()) as checkpoints:
        checkpoints.save(state(3), Counter(3))
        checkpoints.finish()
        handed = []
        monkeypatch.setattr(module, "merge_states", lambda states: handed.append(states) or states[0])
        like = state(0)
        checkpoints.restore(3, abstract(like, jax.tree.map(lambda leaf: leaf.sharding, like)), Counter())
    assert handed == [[{"lanes": {"0": 3}}, {"lanes": {"8": 1}}]]
    assert json.loads((tmp_path / "checkpoints" / "3" / "data" / "8.json").read_text()) == {"lanes": {"8": 1}}


def test_a_checkpoint_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("mine")
    with (
        Checkpoints(RunFolder(str(tmp_path)), Section()) as checkpoints,
        pytest.raises(UserError, match="cannot be written"),
    ):
        checkpoints.latest()
