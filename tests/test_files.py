"""Homes that are missing or cannot be written: caches are optional; JSON is read as people's editors save it."""

import json
import os

import pytest

from mtp_jax.errors import UserError
from mtp_jax.files import cache_folder, expanded, read_json, write_whole

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("name", ["~nobody-of-that-name/x", "~", "plain", "a/~/b", ""])
def test_every_name_is_some_path(name, monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    assert isinstance(str(expanded(name)), str)


def test_a_cache_that_cannot_be_written_is_said_once(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for _ in range(2):
        assert cache_folder(str(tmp_path / "file" / "cache")) is None
    assert capsys.readouterr().err.count("cannot be written") == 1
    assert cache_folder(str(tmp_path / "new" / "cache")).is_dir()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"[1]", "not a list"),
        (b"{", "cannot be read as JSON"),
        ('{"a": "é"}'.encode("latin-1"), "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        ('{"a": 1}'.encode("utf-16"), "cannot be read as JSON"),
        (None, "cannot be read as JSON"),
    ],
)
def test_what_is_no_json_object_is_refused(tmp_path, data, says):
    if data is not None:
        (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(UserError, match=says):
        read_json(tmp_path / "x.json")


def test_a_byte_order_mark_is_no_part_of_it(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": 1}).encode())
    assert read_json(tmp_path / "x.json") == {"a": 1}


def test_a_file_stays_as_it_was_until_the_new_one_is_whole(tmp_path, monkeypatch):
    file = tmp_path / "x.md"
    write_whole(file, b"old")

    def full(_):
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_whole(file, b"new")
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]
    monkeypatch.undo()
    write_whole(file, b"new")
    assert file.read_bytes() == b"new" and list(tmp_path.iterdir()) == [file]
