"""Fixtures of datasets."""

import json

import pytest

from mtp_jax.config import Source


@pytest.fixture
def jsonl(tmp_path, monkeypatch):
    """A function that writes rows to a .jsonl file and returns a source of it; nothing is cached outside this test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def write(rows, name="rows.jsonl", **keys):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return Source(kind="dataset", path=str(tmp_path / name), **keys)

    return write
