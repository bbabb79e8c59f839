"""Datasets as sources: where they are loaded from, which columns are taken, how rows are named."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from mtp_jax.data.examples import Completion, Conversation, Text
from mtp_jax.data.pipeline import Anchors, training_batches

from mtp_jax.config import Data, Source
from mtp_jax.config_file import validate
from mtp_jax.data.sources import documents, read_sources
from mtp_jax.errors import UserError

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def contents(source):
    return [row.content() for row in documents(source)]


@pytest.mark.parametrize(
    ("row", "columns", "content"),
    [
        ({"text": "a b"}, {}, Text("a b")),
        ({"messages": CHAT}, {}, Conversation(CHAT)),
        ({"prompt": "a", "completion": "b"}, {}, Completion("a", "b")),
        ({"question": "a", "answer": "b"}, {"prompt": "question", "completion": "answer"}, Completion("a", "b")),
        ({"prompt": "a", "answer": "b"}, {"completion": "answer"}, Completion("a", "b")),
        ({"messages": CHAT, "text": "t", "prompt": "hi"}, {}, Conversation(CHAT)),
        ({"messages": CHAT, "text": "t"}, {"text": "text"}, Text("t")),
    ],
)
def test_columns_decide_what_a_row_is(jsonl, row, columns, content):
    assert contents(jsonl([row, row], columns=columns)) == [content, content]


@pytest.mark.parametrize(
    ("row", "columns", "says"),
    [
        ({"body": "a", "id": 3}, {}, "neither a column 'messages', nor 'prompt' and 'completion', nor 'text'"),
        ({"prompt": "a", "id": 3}, {}, "neither a column"),
        ({"text": "a", "id": 3}, {"messages": "turns"}, "has no column 'turns'; its columns are text, id."),
        ({"text": "a", "id": 3}, {"prompt": "q"}, "has no column 'completion' and no column 'q'"),
    ],
)
def test_missing_columns_are_one_fault_that_names_what_there_is(jsonl, row, columns, says):
    with pytest.raises(UserError) as caught:
        read_sources(Data(sources=[jsonl([row], columns=columns)], held_out=0.0))
    (fault,) = caught.value.faults
    assert fault.startswith("data.sources.0.columns: ") and says in fault
    assert f"its columns are {', '.join(row)}." in fault


@pytest.mark.parametrize("row", [{"text": 5}, {"messages": "hi"}, {"messages": [{"content": "hi"}]}])
def test_a_column_of_another_type_is_named_with_its_row(jsonl, row):
    with pytest.raises(UserError, match=rf"^rows\.jsonl#0: column '{next(iter(row))}' should hold"):
        contents(jsonl([row]))


def test_messages_lose_the_keys_that_only_others_have(jsonl):
    more = [{"role": "user", "content": "x", "name": "Ann"}]
    assert contents(jsonl([{"messages": CHAT}, {"messages": more}])) == [Conversation(CHAT), Conversation(more)]


def test_rows_are_named_after_the_file_alone(jsonl, tmp_path):
    source = jsonl([{"text": str(i)} for i in range(3)])
    assert [row.name for row in documents(source)] == ["rows.jsonl#0", "rows.jsonl#1", "rows.jsonl#2"]
    (tmp_path / "deep").mkdir()
    moved = shutil.move(source.path, tmp_path / "deep" / "rows.jsonl")
    again = documents(Source(kind="dataset", path=str(moved)))
    assert [row.name for row in again] == ["rows.jsonl#0", "rows.jsonl#1", "rows.jsonl#2"]
    part = documents(Source(kind="dataset", path=str(moved), split="train[1:]"))
    assert [(row.name, row.text()) for row in part] == [
        ("rows.jsonl:train[1:]#0", "1"),
        ("rows.jsonl:train[1:]#1", "2"),
    ]


@pytest.mark.parametrize("how", ["files", "saved", "saved splits"])
def test_a_folder_is_a_dataset(jsonl, tmp_path, how):
    import datasets

    folder = tmp_path / "folder"
    folder.mkdir()
    source = jsonl([{"text": "a"}, {"text": "b"}], "train.jsonl")
    if how == "files":
        shutil.copy(source.path, folder)
    else:
        data = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
        (datasets.DatasetDict(train=data) if how == "saved splits" else data).save_to_disk(folder)
    found = documents(Source(kind="dataset", path=str(folder)))
    assert [(row.name, row.text()) for row in found] == [("folder#0", "a"), ("folder#1", "b")]


@pytest.mark.parametrize(
    ("keys", "key", "says"),
    [
        ({"path": "missing.jsonl"}, "path", "no such file or folder"),
        ({"path": "rows.csv"}, "path", "unknown format '.csv'; a dataset is a folder, or files that end in .jsonl, "),
        ({"path": "*.nothing"}, "path", "no glob that matches one"),
        ({"path": "torn.jsonl"}, "path", "cannot be loaded (torn.jsonl, line 2: no valid JSON"),
        ({"path": "torn.jsonl", "streaming": True}, "path", "cannot be loaded (torn.jsonl, line 2: no valid JSON"),
        ({"path": "unlike.jsonl"}, "path", "(unlike.jsonl, line 3: column 'text' holds dict, and str in line 1"),
        ({"path": "torn.json"}, "path", "cannot be loaded (torn.json, line 2: no valid JSON"),
        ({"path": "list.jsonl"}, "path", "line 1: should be an object of columns, not str"),
        ({"path": "torn.parquet"}, "path", "cannot be loaded ("),
        ({"path": "torn.arrow"}, "path", "cannot be loaded ("),
        ({"path": "empty.jsonl"}, "path", "cannot be loaded ("),
        ({"path": "torn.*"}, "path", "matches files of several formats (arrow, json, parquet)"),
        ({"path": "rows.jsonl", "split": "test"}, "path", "cannot be loaded ("),
        ({"name": "nobody/nothing"}, "name", "cannot be loaded ("),
    ],
)
def test_a_dataset_that_cannot_be_had_is_named(jsonl, tmp_path, keys, key, says):
    for name in ("rows.csv", "torn.jsonl", "torn.parquet", "torn.arrow"):
        (tmp_path / name).write_text('{"text": "a"}\n{"te')
    (tmp_path / "unlike.jsonl").write_text('{"text": "a"}\n\n{"text": {"b": 1}}\n')
    (tmp_path / "torn.json").write_text('[{"text": "a"},\n{"te')
    (tmp_path / "list.jsonl").write_text('"a"\n')
    (tmp_path / "empty.jsonl").write_text("")
    jsonl([{"text": "a"}])
    where = keys.get("name") or str(tmp_path / keys["path"])
    source = Source(kind="dataset", **{**keys, key: where})
    with pytest.raises(UserError) as caught:
        read_sources(Data(sources=[source], held_out=0.0))
    (fault,) = caught.value.faults
    assert fault.startswith(f"data.sources.0.{key}: {where}: ") and says in fault


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "arrow", "folder of parquet"])
def test_formats_of_files(jsonl, tmp_path, kind, streaming):
    import datasets

    rows = [{"text": f"t{i}", "id": i} for i in range(5)]
    data, path = datasets.Dataset.from_list(rows), tmp_path / "files" / f"rows.{kind.split()[-1]}"
    path.parent.mkdir()
    jsonl(rows)  # caches nothing outside this test
    if kind == "jsonl":
        shutil.copy(tmp_path / "rows.jsonl", path)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "arrow":
        data.save_to_disk(tmp_path / "saved")
        shutil.copy(next((tmp_path / "saved").glob("*.arrow")), path)
    else:
        data.to_parquet(path)
    given = path.parent if kind.startswith("folder") else path
    found = documents(Source(kind="dataset", path=str(given), streaming=streaming))
    assert [(row.name, row.text()) for row in found] == [(f"{given.name}#{i}", f"t{i}") for i in range(5)]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_glob_is_one_dataset(jsonl, tmp_path, streaming):
    for name in ("b", "a", "c"):
        jsonl([{"text": f"{name}{i}"} for i in range(2)], f"part-{name}.jsonl")
    found = documents(Source(kind="dataset", path=str(tmp_path / "part-*.jsonl"), streaming=streaming))
    assert [row.text() for row in found] == ["a0", "a1", "b0", "b1", "c0", "c1"]
    assert [row.name for row in found][:2] == ["part-*.jsonl#0", "part-*.jsonl#1"]


def test_rows_are_small_and_read_from_the_mapped_file(jsonl):
    rows = documents(jsonl([{"text": str(i), "unused": "x"} for i in range(50)]))
    assert not hasattr(rows[0], "__dict__") and len({id(row.table) for row in rows}) == 1
    assert rows[0].table.data.cache_files and rows[0].table.data.column_names == ["text"]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda row: row.text(), rows)) == [str(i) for i in range(50)]


def test_texts_of_rows_give_the_batches_of_text_files(jsonl, small_tokenizer, tmp_path):
    texts = [f"the cat {i} sat on the mat" * (1 + i % 5) for i in range(20)]
    (tmp_path / "rows.jsonl").write_text(
        "§".join(texts), encoding="utf-8"
    )  # so that names agree, and anchors with them
    files = documents(Source(kind="text", path=str(tmp_path / "rows.jsonl"), separator="§"))
    batches = [training_batches([files], [1.0], small_tokenizer, 2, 16, 3, Anchors(4, 3))[0]]
    before = [next(batches[0]) for _ in range(5)]
    rows = documents(jsonl([{"text": text} for text in texts]))
    after = training_batches([rows], [1.0], small_tokenizer, 2, 16, 3, Anchors(4, 3))[0]
    for a, b in zip(before, after, strict=False):
        assert a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("source", "start"),
    [
        ({"kind": "dataset"}, "data.sources.0: a dataset source takes exactly one of name"),
        ({"kind": "dataset", "name": "a/b", "path": "c"}, "data.sources.0: a dataset source takes exactly one of"),
        ({"kind": "dataset", "name": "a/b", "separator": "x"}, "data.sources.0.separator: the rows"),
        ({"kind": "dataset", "name": "a/b", "columns": {"test": "x"}}, "data.sources.0.columns.test is not one"),
        (
            {"kind": "dataset", "name": "a/b", "columns": {"text": "x", "messages": "y"}},
            "data.sources.0.columns: a row",
        ),
        ({"kind": "text", "path": "a", "name": "a/b"}, "data.sources.0.name belongs to a dataset source"),
        ({"kind": "python-stdlib", "split": "test"}, "data.sources.0.split belongs to a dataset source"),
        ({"kind": "text", "path": "a", "streaming": True}, "data.sources.0.streaming belongs to a dataset source"),
        (
            {"kind": "dataset", "name": "a/b", "streaming": True, "split": "train[:9]"},
            "data.sources.0.split: a part of a split cannot be streamed",
        ),
    ],
)
def test_keys_that_do_not_go_together(tree, source, start):
    with pytest.raises(UserError) as caught:
        validate({**tree, "data": {"sources": [source]}}, "c.yaml")
    (fault,) = caught.value.faults
    assert fault.startswith(f"c.yaml: {start}")
