"""Records reach training as they were written, in every format; what does not is named."""

import codecs
import csv
import gzip
import json
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from chats import letters, turns, with_template

from mtp_jax.config import Data, Source
from mtp_jax.data.documents import Completion, Conversation, Text
from mtp_jax.data.sources import check_supervision, read_sources, source_documents
from mtp_jax.data.tokens import Encoder
from mtp_jax.errors import UserError

pytestmark = pytest.mark.quick

# Shows all that a template is given.
SHOWS = "{{ tools | tojson }}\n{% for m in messages %}{{ m | tojson }}\n{% endfor %}"


def call(name, arguments, **more):
    return {"role": "assistant", **more, "tool_calls": [{"type": "function", "function": {"name": name, **arguments}}]}


def tool(name, **properties):
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


TOOLS = [tool("count", basin={"type": "integer"}), tool("tide", place={"type": "string", "enum": ["pier", "bay"]})]
ASK = {"role": "user", "content": "how many?"}
RECORDS = {
    "unlike arguments": [
        {"messages": [ASK, call("count", {"arguments": {"basin": 0}}, content=""), ASK], "tools": TOOLS},
        {
            "messages": [ASK, call("tide", {"arguments": {"place": "pier", "at": {"day": 1}}}, content="")],
            "tools": TOOLS,
        },
        {"messages": [ASK, {"role": "assistant", "content": "3", "name": "Ann"}], "tools": TOOLS[:1]},
    ],
    "tools as JSON": [
        {"messages": [ASK, call("count", {"arguments": '{"basin": 0}'}, content="")], "tools": json.dumps(TOOLS)},
        {"messages": [ASK, {"role": "assistant", "content": "3"}], "tools": json.dumps(TOOLS[1:])},
        {"messages": [ASK, {"role": "assistant", "content": "4"}], "tools": None},
    ],
    "dates and parts": [
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "2020-01-01"}]},
                call("a", {"on": "2021-02-03"}),
            ]
        },
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "url": "2021-02-03T04:05:06"}, {"type": "text", "text": "7"}],
                },
                call("b", {"on": "2021-02-03T00:00:00Z"}),
            ]
        },
    ],
}


def write(records, folder, how):
    """A source of the records in one of the formats."""
    import datasets

    lines = "".join(json.dumps(record) + "\n" for record in records)
    if how == "saved":
        datasets.Dataset.from_list(records).save_to_disk(folder / "saved")
        return Source(kind="dataset", path=str(folder / "saved"))
    name = folder / f"rows.{how.removesuffix(' stream')}"
    if "parquet" in how:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), name)
    else:
        text = json.dumps(records, indent=1) if how == "json" else lines
        name.write_bytes(packed(text.encode(), name.suffix))
    return Source(kind="dataset", path=str(name), streaming="stream" in how)


def packed(data, suffix):
    half = len(data) // 2
    pack = {".gz": gzip.compress, ".zst": lambda part: bytes(pyarrow.Codec("zstd").compress(part))}
    parts = (data[:half], data[half:])  # a file may hold several streams
    return b"".join(map(pack.get(suffix, bytes), parts))


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


FORMATS = [
    "jsonl",
    "jsonl stream",
    "json",
    "jsonl.gz",
    "jsonl.zst",
    "json.gz stream",
    "parquet",
    "parquet stream",
    "saved",
]


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("kind", RECORDS)
def test_a_template_gets_what_the_record_holds(tmp_path, kind, how):
    tokenizer = with_template(letters(), SHOWS)
    documents = source_documents(write(RECORDS[kind], tmp_path, how))
    for document, record in zip(documents, RECORDS[kind], strict=True):
        tools = record.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        expected = tokenizer.apply_chat_template(record["messages"], tools=tools)["input_ids"]
        assert Encoder(tokenizer)(document).tokens.tolist() == expected


@pytest.mark.parametrize("how", ["jsonl", "jsonl stream", "json", "jsonl.zst"])
def test_a_null_that_was_written_stays(tmp_path, how):
    messages = [ASK, call("tide", {"arguments": {"day": None, "places": [None, {"a": None}]}}, content=None)]
    tokenizer = with_template(letters(), SHOWS)
    (document,) = source_documents(write([{"messages": messages, "tools": [tool("tide", day=None)]}], tmp_path, how))
    expected = tokenizer.apply_chat_template(messages, tools=[tool("tide", day=None)])["input_ids"]
    assert Encoder(tokenizer)(document).tokens.tolist() == expected


@pytest.mark.parametrize("how", ["jsonl", "jsonl stream", "json", "jsonl.gz", "parquet", "saved"])
@pytest.mark.parametrize(
    "texts", [["2020-01-01", "2021-02-03"], ["2020-01-01T00:00:00", "2020-01-01T00:00:00Z"], ["007", "1e5"]], ids=str
)
def test_a_text_stays_as_it_was_written(tmp_path, texts, how):
    found = source_documents(write([{"text": text, "id": 1} for text in texts], tmp_path, how))
    assert [document.text() for document in found] == texts


@pytest.mark.parametrize("late", [{"id": "x"}, {"id": {"a": 1}}, {"id": [1], "more": 5}, {"id": 2**70}], ids=str)
def test_columns_that_nobody_asked_for_may_hold_anything(tmp_path, late):
    rows = [{"text": "a" * (11 << 20), "id": 1}, {"text": "b", **late}]  # beyond what a library looks at
    found = source_documents(write(rows, tmp_path, "jsonl"))
    assert [document.text()[-1:] for document in found] == ["a", "b"]


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_files_of_unlike_types_are_one_dataset(tmp_path, streaming):
    rows = RECORDS["unlike arguments"]
    for number, row in enumerate(rows):
        table = pyarrow.Table.from_pylist([{**row, "id": number if number else "none"}])
        pyarrow.parquet.write_table(table, tmp_path / f"part-{number}.parquet")
    source = Source(kind="dataset", path=str(tmp_path / "part-*.parquet"), streaming=streaming)
    found = list(source_documents(source))
    assert [document.content() for document in found] == [Conversation(row["messages"], row["tools"]) for row in rows]
    assert [document.name for document in found] == [f"part-*.parquet#{i}" for i in range(3)]


@pytest.mark.parametrize("how", ["saved", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_nobody_asked_for_are_not_decoded(tmp_path, how, streaming):
    import datasets

    kinds = datasets.Features({"text": datasets.Value("string"), "picture": datasets.Image()})
    rows = {"text": ["a", "b"], "picture": [{"bytes": b"no picture", "path": None}] * 2}
    data = datasets.Dataset.from_dict(rows, features=kinds)
    path = tmp_path / f"rows.{how}"
    data.save_to_disk(path) if how == "saved" else data.to_parquet(path)
    found = source_documents(Source(kind="dataset", path=str(path), streaming=streaming))
    assert [document.text() for document in found] == ["a", "b"]


# ---- CSV


@pytest.mark.parametrize("how", ["csv", "csv stream", "csv.gz", "csv.zst", "csv utf-16", "csv utf-8-sig", "folder"])
def test_csv_is_text(tmp_path, how):
    rows = ["007", "2020-01-01", "NA", "", "1.0", "True", 'a, "b"\nc', " x "]
    path = tmp_path / "files" / ("rows.csv" if how == "folder" else f"rows.{how.split()[0]}")
    path.parent.mkdir()
    with (tmp_path / "plain").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "text"], *([i, text] for i, text in enumerate(rows))])
    encoding = how.split()[1] if "utf" in how else "utf-8"
    data = (tmp_path / "plain").read_bytes().decode().encode(encoding)
    path.write_bytes(packed(data, path.suffix))
    given = path.parent if how == "folder" else path
    found = source_documents(Source(kind="dataset", path=str(given), streaming="stream" in how))
    assert [document.text() for document in found] == rows


def test_a_row_of_another_length_is_named(tmp_path):
    (tmp_path / "rows.csv").write_text("id,text\n1,a\n2,b,c\n3\n")
    good, *bad = source_documents(Source(kind="dataset", path=str(tmp_path / "rows.csv")))
    assert good.text() == "a"
    for document in bad:
        with pytest.raises(UserError, match=r"^rows\.csv#[12]: should be an object of columns, not list"):
            document.content()


# ---- forms


SHARED = [{"from": "system", "value": "be kind"}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
HI = [{"role": "system", "content": "be kind"}, *turns("hi", "yes")]


@pytest.mark.parametrize("how", ["jsonl", "parquet", "jsonl stream"])
@pytest.mark.parametrize(
    ("record", "columns", "content"),
    [
        ({"conversations": SHARED}, {}, Conversation(HI)),
        ({"conversations": HI, "id": 1}, {}, Conversation(HI)),
        ({"messages": SHARED}, {}, Conversation(HI)),
        ({"talk": SHARED}, {"messages": "talk"}, Conversation(HI)),
        ({"talk": SHARED}, {"conversations": "talk"}, Conversation(HI)),
        ({"messages": json.dumps(HI)}, {}, Conversation(HI)),
        ({"prompt": HI[:2], "completion": HI[2:]}, {}, Conversation(HI, None, 2)),
        ({"prompt": HI, "completion": HI[1:], "tools": json.dumps(TOOLS)}, {}, Conversation(HI + HI[1:], TOOLS, 3)),
        ({"q": HI[:2], "a": SHARED[2:]}, {"prompt": "q", "completion": "a"}, Conversation(HI, None, 2)),
        ({"messages": HI, "functions": TOOLS}, {"tools": "functions"}, Conversation(HI, TOOLS)),
        ({"messages": HI, "tools": []}, {"messages": "messages"}, Conversation(HI, [])),
        ({"prompt": "a", "completion": "b", "tools": "[]"}, {}, Completion("a", "b")),
        ({"text": "a", "tools": 5}, {}, Text("a")),
    ],
)
def test_forms_of_records(tmp_path, record, columns, content, how):
    source = write([record], tmp_path, how).model_copy(update={"columns": columns})
    assert [document.content() for document in source_documents(source)] == [content]


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"instruction": "a", "output": "b"}, "columns: {prompt: instruction, completion: output}."),
        ({"body": "a", "id": 3}, "columns: {text: body}."),
        ({"dialog": HI, "title": "b"}, "columns: {messages: dialog}."),
    ],
)
def test_other_columns_are_refused_with_a_mapping_that_works(tmp_path, record, says):
    source = write([record], tmp_path, "jsonl")
    with pytest.raises(UserError) as caught:
        source_documents(source)
    (fault,) = caught.value.faults
    assert fault.endswith(says)
    mapping = dict(pair.split(": ") for pair in says[len("columns: {") : -2].split(", "))
    assert [d.content() for d in source_documents(source.model_copy(update={"columns": mapping}))]


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"messages": None}, "column 'messages' should hold a list of messages"),
        ({"messages": []}, "column 'messages' holds no message"),
        ({"messages": [{"role": None, "content": "a"}]}, "message 0 has no role"),
        ({"messages": [ASK, {"role": "user", "content": 5}]}, "message 1: content should be text, not int"),
        ({"messages": [{"from": "narrator", "value": "x"}]}, "message 0: from 'narrator' is none of human, gpt"),
        ({"messages": [ASK], "tools": "[1]"}, "column 'tools' should hold a list of tools"),
        ({"messages": [ASK], "tools": "what?"}, "column 'tools' should hold a list of tools"),
        (
            {"messages": [ASK, {"role": "assistant", "content": "\ud83d and"}]},
            r"holds '\ud83d' (half a surrogate pair)",
        ),
        ([1], "should be an object of columns, not list"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_record_is_named(tmp_path, record, says):
    good = {"messages": [ASK], "tools": "[]"}
    for how in ("jsonl", "jsonl stream", "json"):
        _, bad = source_documents(write([good, record], tmp_path, how))
        with pytest.raises(UserError) as caught:
            bad.content()
        place = "" if "stream" in how else " (rows.json"
        assert str(caught.value).startswith(f"rows.{how.split()[0]}#1: ")
        assert says in str(caught.value) and place in str(caught.value)


@pytest.mark.parametrize(
    "record",
    [{"text": "\udea4 boat"}, {"prompt": "a", "completion": "\ud83d"}, {"prompt": "\ud83d", "completion": "a"}],
)
def test_half_a_surrogate_pair_is_named(tmp_path, record):
    whole = {key: "\U0001f6a4" for key in record}
    good, bad = source_documents(write([whole, record], tmp_path, "jsonl"))
    assert set(good.content()[:2]) == {"\U0001f6a4"}
    with pytest.raises(
        UserError, match=r"^rows\.jsonl#1: holds '\\ud.*' \(half a surrogate pair\), .* \(rows\.jsonl, line 2\)\.$"
    ):
        bad.content()


def test_a_date_in_a_table_is_no_text(tmp_path):
    import datetime

    rows = [{"messages": [ASK, call("tide", {"on": datetime.datetime(2020, 1, 1)})]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (document,) = source_documents(Source(kind="dataset", path=str(tmp_path / "rows.parquet")))
    with pytest.raises(UserError, match=r"^rows\.parquet#0: column 'messages' should hold text, not datetime"):
        document.content()


# ---- files


@pytest.mark.parametrize(
    "data",
    [
        codecs.BOM_UTF8 + '{"text": "é1"}\n{"text": "é2"}\n'.encode(),
        '{"text": "é1"}\n{"text": "é2"}'.encode("utf-16"),
        codecs.BOM_UTF16_BE + '{"text": "é1"}\r\n\r\n{"text": "é2"}\r\n'.encode("utf-16-be"),
        codecs.BOM_UTF8 + '\n [{"text": "é1"},\n{"text": "é2"}]'.encode(),
        '  \n{"text": "é1"}\n\t\n{"text": "é2"}\n \n'.encode(),
        '{"text": "é1"}\u2028\n{"text": "é2"}'.encode().replace("\u2028".encode(), b" "),
    ],
    ids=["mark", "utf-16", "utf-16 big", "list with mark", "blank lines", "no end"],
)
@pytest.mark.parametrize("suffix", ["jsonl", "json.gz"])
@pytest.mark.parametrize("streaming", [False, True])
def test_encodings_and_blank_lines(tmp_path, data, suffix, streaming):
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(packed(data, path.suffix))
    found = list(source_documents(Source(kind="dataset", path=str(path), streaming=streaming)))
    assert [document.text() for document in found] == ["é1", "é2"]
    assert [document.name for document in found] == [f"{path.name}#0", f"{path.name}#1"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": "é"}'.encode("latin-1"), "not UTF-8: invalid continuation byte at byte 10"),
        (b'{"text": ', "not valid JSON: Expecting value"),
        (b'{"text": "a"} {"text": "b"}', "not valid JSON: Extra data"),
        (b'{"text": {"b": 1}}', "column 'text' should hold text, not dict"),
    ],
    ids=["latin-1", "torn", "two", "another type"],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_broken_line_is_named_at_the_start(tmp_path, line, says, streaming, small_tokenizer):
    good = [b'{"text": "a %d"}' % i for i in range(300)]
    (tmp_path / "rows.jsonl").write_bytes(b"\n\n".join([*good, line, *good]))
    source = Source(kind="dataset", path=str(tmp_path / "rows.jsonl"), streaming=streaming)
    with pytest.raises(UserError) as caught:
        training, held = read_sources(Data(sources=[source], held_out=0.0))
        check_supervision(training, small_tokenizer, held_out=held)
    (fault,) = caught.value.faults
    assert fault.startswith(f"data.sources.0: rows.jsonl#300: {says}")
    assert streaming or "(rows.jsonl, line 601)" in fault
    assert fault.endswith("Set data.bad_records: skip to leave such records out. Bad among the 601 checked: 1.")


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("rows.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)[:-9], "rows.jsonl.gz, Compressed file ended"),
        ("rows.jsonl.gz", b'{"text": "a"}\n', "rows.jsonl.gz, Not a gzipped file"),
        ("rows.jsonl.zst", packed(b'{"text": "a"}\n' * 9, ".zst")[:-9], "rows.jsonl.zst, "),
        ("rows.csv", b'id,text\n1,"a\n', "rows.csv, line 2: unexpected end of data"),
        ("rows.csv", "id,text\n1,é\n".encode("latin-1"), "rows.csv, 'utf-8' codec can't decode byte 0xe9"),
        ("rows.json", b'[{"text": "a"},\n{"te', "rows.json, line 2: not valid JSON"),
        ("rows.parquet", b"PAR1 and more that is not Parquet", "Parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_cause(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_sources(Data(sources=[Source(kind="dataset", path=str(tmp_path / name))], held_out=0.0))
    (fault,) = caught.value.faults
    assert fault.startswith(f"data.sources.0.path: {tmp_path / name}: cannot be loaded (") and says in fault
    assert not list((tmp_path / "cache").rglob("*.jsonl"))


@pytest.mark.parametrize("how", ["jsonl", "json", "csv", "parquet", "saved", "folder", "folder of parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_brackets_and_spaces_in_paths_are_literal(tmp_path, how, streaming):
    folder = tmp_path / "a [b] (c) *d" / "e[1]"
    folder.mkdir(parents=True)
    (tmp_path / "a b (c) d").mkdir()  # what a pattern would match
    if how == "csv":
        (folder / "rows.csv").write_text("text\nx\n")
        path = folder / "rows.csv"
    else:
        path = write([{"text": "x"}], folder, {"folder": "jsonl", "folder of parquet": "parquet"}.get(how, how)).path
    given = folder if how.startswith("folder") else path
    found = source_documents(Source(kind="dataset", path=str(given), streaming=streaming))
    assert [document.text() for document in found] == ["x"]


@pytest.mark.parametrize(("pattern", "names"), [("[ab]", "ab"), ("*", "abc"), ("[!a]*", "bc")])
def test_a_pattern_below_a_folder_with_brackets(tmp_path, pattern, names):
    folder = tmp_path / "in [x]"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
        (folder / f"{name}.txt").write_text(name)
    found = source_documents(Source(kind="dataset", path=str(folder / f"{pattern}.jsonl")))
    assert [document.text() for document in found] == list(names)
    files = source_documents(Source(kind="text", path=str(folder / f"{pattern}.txt")))
    assert [document.name for document in files] == [f"{name}.txt" for name in names]


@pytest.mark.parametrize(
    ("split", "texts"), [("train", "abc"), ("train[1:]", "bc"), ("train[-1:]", "c"), ("train[:34%]+test", "ad")]
)
def test_parts_of_splits(tmp_path, split, texts):
    for name, rows in {"train-0.jsonl": "ab", "train-1.jsonl": "c", "test.jsonl": "de"}.items():
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    found = source_documents(Source(kind="dataset", path=str(tmp_path), split=split))
    expected = texts + "e" if "test" in split else texts
    assert [document.text() for document in found] == list(expected)
    assert found[0].name == f"{tmp_path.name}:{split}#0"


@pytest.mark.parametrize("streaming", [False, True])
def test_json_of_the_hub_is_read_as_it_was_written(tmp_path, monkeypatch, streaming):
    import datasets

    write(RECORDS["unlike arguments"], tmp_path, "jsonl.gz")

    config = SimpleNamespace(data_files={"train": [f"file://{tmp_path}/rows.jsonl.gz"]})
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: SimpleNamespace(config=config))
    found = list(source_documents(Source(kind="dataset", name="org/data", streaming=streaming)))
    assert [d.content().messages for d in found] == [row["messages"] for row in RECORDS["unlike arguments"]]
    assert [d.name for d in found] == ["org/data#0", "org/data#1", "org/data#2"]
