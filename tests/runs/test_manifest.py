"""A manifest reveals every kind of damage to a checkpoint."""

import os

import pytest

from mtp_jax.runs.manifest import MANIFEST, digests, fault_of, write_manifest

pytestmark = pytest.mark.quick


@pytest.fixture
def checkpoint(tmp_path):
    """The folder of a small checkpoint with its manifest."""
    folder = tmp_path / "7"
    (folder / "state" / "d").mkdir(parents=True)
    (folder / "data").mkdir()
    for i, name in enumerate(("state/d/aa", "state/_METADATA", "data/0.json", "data/1.json", "empty")):
        (folder / name).write_bytes(bytes([i]) * 100 * min(i, 3))
    write_manifest(folder, 7, digests(folder))
    return folder


def test_an_undamaged_checkpoint_has_no_fault(checkpoint):
    assert fault_of(checkpoint) is None
    assert not [path for path in checkpoint.parent.rglob("*.part")]


@pytest.mark.parametrize("how", ["deleted", "emptied", "halved", "longer", "flipped"])
def test_damage_to_any_file_is_reported(checkpoint, how):
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        if not whole and how != "deleted" and how != "longer":
            continue
        if how == "deleted":
            path.unlink()
        elif how == "emptied":
            os.truncate(path, 0)
        elif how == "halved":
            os.truncate(path, len(whole) // 2)
        elif how == "longer":
            path.write_bytes(whole + b"x")
        else:
            path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        fault = fault_of(checkpoint)
        if not (path.name == MANIFEST and how == "flipped"):  # its last byte is a line's end
            assert fault is not None and path.name in fault, path
        path.write_bytes(whole)
        assert fault_of(checkpoint) is None


def test_no_flipped_bit_of_the_manifest_goes_unnoticed(checkpoint):
    path = checkpoint / MANIFEST
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        if whole[at] not in b" \n":  # space beside a token may become another
            assert fault_of(checkpoint) is not None, at


def test_a_checkpoint_under_the_name_of_another_is_reported(checkpoint):
    assert fault_of(checkpoint.rename(checkpoint.with_name("9"))) == "it is the checkpoint of step 7"
