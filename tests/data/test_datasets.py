"""Datasets as sources: where they are loaded from, which columns are used, how records are named and streamed."""

import itertools
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mtp_jax.config import Data, Source
from mtp_jax.config_file import validate
from mtp_jax.data.batches import training_batches
from mtp_jax.data.datasets import Stream
from mtp_jax.data.documents import Completion, Conversation, Text
from mtp_jax.data.sources import check_supervision, read_sources, source_documents
from mtp_jax.errors import UserError
from mtp_jax.mtp.blocks import Anchors

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def contents(source):
    return [record.content() for record in source_documents(source)]


@pytest.mark.parametrize(
    ("record", "columns", "content"),
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
def test_columns_decide_what_a_record_is(jsonl, record, columns, content):
    assert contents(jsonl([record, record], columns=columns)) == [content, content]


@pytest.mark.parametrize(
    ("record", "columns", "says"),
    [
        ({"body": "a", "id": 3}, {}, "neither a column 'messages', nor 'prompt' and 'completion', nor 'text'"),
        ({"prompt": "a", "id": 3}, {}, "neither a column"),
        ({"text": "a", "id": 3}, {"messages": "turns"}, "has no column 'turns'; its columns are text, id."),
        ({"text": "a", "id": 3}, {"prompt": "q"}, "has no column 'completion' and no column 'q'"),
    ],
)
def test_missing_columns_are_one_fault_that_names_what_there_is(jsonl, record, columns, says):
    with pytest.raises(UserError) as caught:
        read_sources(Data(sources=[jsonl([record], columns=columns)], held_out=0.0))
    (fault,) = caught.value.faults
    assert fault.startswith("data.sources.0.columns: ") and says in fault
    assert f"its columns are {', '.join(record)}." in fault


@pytest.mark.parametrize("record", [{"text": 5}, {"messages": "hi"}, {"messages": [{"content": "hi"}]}])
def test_a_column_of_another_type_is_named_with_its_record(jsonl, record):
    with pytest.raises(UserError, match=rf"^rows\.jsonl#0: column '{next(iter(record))}' should hold"):
        contents(jsonl([record]))


def test_messages_lose_the_keys_that_only_others_have(jsonl):
    more = [{"role": "user", "content": "x", "name": "Ann"}]
    assert contents(jsonl([{"messages": CHAT}, {"messages": more}])) == [Conversation(CHAT), Conversation(more)]


def test_records_are_named_after_the_file_alone(jsonl, tmp_path):
    source = jsonl([{"text": str(i)} for i in range(3)])
    assert [record.name for record in source_documents(source)] == ["rows.jsonl#0", "rows.jsonl#1", "rows.jsonl#2"]
    (tmp_path / "deep").mkdir()
    moved = shutil.move(source.path, tmp_path / "deep" / "rows.jsonl")
    again = source_documents(Source(kind="dataset", path=str(moved)))
    assert [record.name for record in again] == ["rows.jsonl#0", "rows.jsonl#1", "rows.jsonl#2"]
    part = source_documents(Source(kind="dataset", path=str(moved), split="train[1:]"))
    assert [(record.name, record.text()) for record in part] == [
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
    found = source_documents(Source(kind="dataset", path=str(folder)))
    assert [(record.name, record.text()) for record in found] == [("folder#0", "a"), ("folder#1", "b")]


@pytest.mark.parametrize(
    ("keys", "key", "says"),
    [
        ({"path": "missing.jsonl"}, "path", "no such file or folder"),
        ({"path": "rows.txt"}, "path", "unknown format '.txt'; a dataset is a folder, or files that end in .jsonl, "),
        ({"path": "*.nothing"}, "path", "no file matches it as a glob"),
        ({"path": "torn.json"}, "path", "cannot be loaded (torn.json, line 2: not valid JSON"),
        ({"path": "list.jsonl"}, "path", "cannot be loaded (should be an object of columns, not str"),
        ({"path": "torn.parquet"}, "path", "cannot be loaded ("),
        ({"path": "torn.arrow"}, "path", "cannot be loaded ("),
        ({"path": "torn.*"}, "path", "matches files of several formats (arrow, json, parquet)"),
        ({"path": "rows.jsonl", "split": "test"}, "path", "cannot be loaded ("),
        ({"name": "nobody/nothing"}, "name", "cannot be loaded ("),
    ],
)
def test_a_dataset_that_cannot_be_had_is_named(jsonl, tmp_path, keys, key, says):
    for name in ("rows.txt", "torn.jsonl", "torn.parquet", "torn.arrow"):
        (tmp_path / name).write_text('{"text": "a"}\n{"te')
    (tmp_path / "torn.json").write_text('[{"text": "a"},\n{"te')
    (tmp_path / "list.jsonl").write_text('"a"\n')
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

    records = [{"text": f"t{i}", "id": i} for i in range(5)]
    data, path = datasets.Dataset.from_list(records), tmp_path / "files" / f"rows.{kind.split()[-1]}"
    path.parent.mkdir()
    jsonl(records)  # caches nothing outside this test
    if kind == "jsonl":
        shutil.copy(tmp_path / "rows.jsonl", path)
    elif kind == "json":
        path.write_text(json.dumps(records))
    elif kind == "arrow":
        data.save_to_disk(tmp_path / "saved")
        shutil.copy(next((tmp_path / "saved").glob("*.arrow")), path)
    else:
        data.to_parquet(path)
    given = path.parent if kind.startswith("folder") else path
    found = source_documents(Source(kind="dataset", path=str(given), streaming=streaming))
    assert [(record.name, record.text()) for record in found] == [(f"{given.name}#{i}", f"t{i}") for i in range(5)]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_glob_is_one_dataset(jsonl, tmp_path, streaming):
    for name in ("b", "a", "c"):
        jsonl([{"text": f"{name}{i}"} for i in range(2)], f"part-{name}.jsonl")
    found = source_documents(Source(kind="dataset", path=str(tmp_path / "part-*.jsonl"), streaming=streaming))
    assert [record.text() for record in found] == ["a0", "a1", "b0", "b1", "c0", "c1"]
    assert [record.name for record in found][:2] == ["part-*.jsonl#0", "part-*.jsonl#1"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_records_are_small_and_read_from_the_file(jsonl, tmp_path, kind):
    import datasets

    rows = [{"text": str(i), "unused": "x"} for i in range(50)]
    source = jsonl(rows)
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
        source = Source(kind="dataset", path=str(tmp_path / "rows.parquet"))
    records = source_documents(source)
    assert not hasattr(records[0], "__dict__") and len({id(record.table) for record in records}) == 1
    if kind == "parquet":
        assert records[0].table.data.cache_files and records[0].table.data.column_names == ["text"]
    else:
        ((_, starts),) = records[0].table.data.parts
        assert starts.nbytes == 8 * 51
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda record: record.text(), records)) == [str(i) for i in range(50)]


def test_texts_of_records_give_the_batches_of_text_files(jsonl, small_tokenizer, tmp_path):
    texts = [f"the cat {i} sat on the mat" * (1 + i % 5) for i in range(20)]
    (tmp_path / "rows.jsonl").write_text(
        "§".join(texts), encoding="utf-8"
    )  # so that names agree, and anchors with them
    files = source_documents(Source(kind="text", path=str(tmp_path / "rows.jsonl"), separator="§"))
    batches = [training_batches([files], [1.0], small_tokenizer, 2, 16, 3, Anchors(4, 3))[0]]
    before = [next(batches[0]) for _ in range(5)]
    records = source_documents(jsonl([{"text": text} for text in texts]))
    after = training_batches([records], [1.0], small_tokenizer, 2, 16, 3, Anchors(4, 3))[0]
    for a, b in zip(before, after, strict=False):
        assert a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("source", "start"),
    [
        ({"kind": "dataset"}, "data.sources.0: a dataset source takes exactly one of name"),
        ({"kind": "dataset", "name": "a/b", "path": "c"}, "data.sources.0: a dataset source takes exactly one of"),
        ({"kind": "dataset", "name": "a/b", "separator": "x"}, "data.sources.0.separator: the records"),
        ({"kind": "dataset", "name": "a/b", "columns": {"test": "x"}}, "data.sources.0.columns.test is not one"),
        (
            {"kind": "dataset", "name": "a/b", "columns": {"text": "x", "messages": "y"}},
            "data.sources.0.columns: a record",
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


# ---- streams


@pytest.fixture
def streamed(jsonl):
    """A function from texts to a streaming source of them."""
    return lambda texts, **keys: jsonl([{"text": text, "id": 1} for text in texts], streaming=True, **keys)


TEXTS = [f"the cat {i} sat on the mat" * (1 + i % 5) for i in range(60)]


def test_held_out_records_are_skipped(streamed):
    source = streamed(TEXTS)
    every = {record.name: record.text() for record in source_documents(source)}
    (training,), held = read_sources(Data(sources=[source], held_out=0.3))
    train = {record.name: record.text() for record in training}
    assert {**train, **{record.name: record.text() for record in held}} == every and len(every) == 60
    assert all(record.draw < 0.3 for record in held) and held and not {record.name for record in held} & train.keys()
    assert read_sources(Data(sources=[source], held_out=0.0))[1] == []


def test_held_out_records_are_those_that_a_stored_dataset_holds_out(streamed):
    source = streamed(TEXTS)
    _, held = read_sources(Data(sources=[source], held_out=0.3))
    stored = source.model_copy(update={"streaming": False})
    _, expected = read_sources(Data(sources=[stored], held_out=0.3))
    assert {record.name for record in held} == {record.name for record in expected}


def test_every_record_once_per_epoch_in_another_order(streamed):
    stream = source_documents(streamed(TEXTS))
    drawn = list(itertools.islice(stream.endless(0), 180))
    epochs = [[record.number for epoch, record in drawn if epoch == number] for number in range(3)]
    assert all(sorted(epoch) == list(range(60)) for epoch in epochs)
    assert epochs[0] != epochs[1] != list(range(60)) != epochs[0]


def test_a_stream_longer_than_the_buffer_gives_every_record_once(monkeypatch, streamed):
    monkeypatch.setattr("mtp_jax.data.datasets._SHUFFLED", 10)
    drawn = [record.number for _, record in itertools.islice(source_documents(streamed(TEXTS)).endless(0), 60)]
    assert sorted(drawn) == list(range(60)) and drawn != list(range(60))


def test_a_stream_that_breaks_says_where():
    def records():
        yield {"text": "a"}
        raise OSError("connection reset\nand more")

    with pytest.raises(UserError, match=r"^org/data: cannot be read after record 1 \(connection reset\)\.$"):
        list(Stream(records, "org/data", lambda values, _: values["text"]))


@pytest.mark.parametrize(
    ("texts", "columns", "says"),
    [
        ([], {}, "rows.jsonl has no records."),
        (["a"], {"messages": "turns"}, "data.sources.0.columns: "),
        ([5], {}, "rows.jsonl#0: column 'text' should hold text, not int"),
    ],
)
def test_faults_of_streams_are_one_line(streamed, small_tokenizer, texts, columns, says):
    with pytest.raises(UserError) as caught:
        training, _ = read_sources(Data(sources=[streamed(texts, columns=columns)], held_out=0.0))
        check_supervision(training, small_tokenizer)
    (fault,) = caught.value.faults
    assert fault.startswith("data.sources.0") and says in fault
