"""Records of a dataset as documents: from the Hugging Face hub, a folder or data files, stored or streamed."""

import bisect
import glob
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mtp_jax.config import FORMATS, FORMS, TOOLS, Source, chosen_forms
from mtp_jax.data.documents import BadRecords, Content, Document, Documents, find_files
from mtp_jax.data.json_lines import DataFile, JsonLines, format_of, parse, read_lines
from mtp_jax.data.records import Columns
from mtp_jax.errors import BadRecord, UserError, reason
from mtp_jax.storage import local

_SHUFFLED = 1000  # records of a stream that are held to change their order
_HEAD = 10_000  # records at the beginning of a stream that are searched for held-out ones
_LOOK = 100  # records of JSON or CSV in which columns are looked for


# ---- stored


@dataclass(frozen=True, eq=False)
class Table:
    """A stored dataset, which is not in memory."""

    data: Any  # datasets.Dataset or JsonLines
    name: str
    columns: Columns
    bad_records: BadRecords


@dataclass(frozen=True, slots=True)
class Record(Document):
    """One record of a table, looked up when its content is asked for."""

    table: Table
    number: int

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.table.name}#{self.number}"

    @property
    def bad_records(self) -> BadRecords:  # type: ignore[override]
        return self.table.bad_records

    def content(self) -> Content:
        data = self.table.data
        try:
            return self.table.columns.content(data[self.number], self.name)
        except BadRecord as error:
            if not isinstance(data, JsonLines):
                raise
            raise BadRecord(f"{str(error).removesuffix('.')} ({data.place(self.number)}).") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{self.name}: cannot be read ({reason(error)}).") from error


# ---- streamed


class StreamedRecord(Document):
    """One record of a stream, held until it is used."""

    __slots__ = ("bad_records", "name", "number", "to_content", "values")

    def __init__(self, stream: "Stream", number: int, values: Any):
        self.name, self.number, self.values = stream.record_name(number), number, values
        self.to_content, self.bad_records = stream.to_content, stream.bad_records

    def content(self) -> Content:
        return self.to_content(self.values, self.name)


class Stream:
    """Records in a fixed order, numbered from 0, that are not stored; those held out by their name are skipped."""

    def __init__(
        self,
        opened: Callable[[], Iterable[Any]],
        name: str,
        to_content: Callable[[Any, str], Content],
        held_out: float = 0.0,
        bad_records: BadRecords = Document.bad_records,
    ):
        """`opened` gives each reader its own records, from the first one on."""
        self.opened, self.name, self.to_content, self.held_out = opened, name, to_content, held_out
        self.bad_records = bad_records

    def record_name(self, number: int) -> str:
        """Independent of the machine."""
        return f"{self.name}#{number}"

    def __iter__(self) -> Iterator[StreamedRecord]:
        """The records to train on, once; raises UserError where one cannot be read."""
        return (record for record in self._records() if record.draw >= self.held_out)

    def _records(self) -> Iterator[StreamedRecord]:
        number, records = 0, iter(self.opened())
        while True:
            try:
                values = next(records, None)
            except Exception as error:  # of the network, or of a file
                raise UserError(f"{self.name}: cannot be read after record {number} ({reason(error)}).") from error
            if values is None:
                return
            yield StreamedRecord(self, number, values)
            number += 1

    def split(self, held_out: float) -> tuple["Stream", list[Document]]:
        """The stream without its held-out records, and those of them that are near its beginning."""
        stream = Stream(self.opened, self.name, self.to_content, held_out, self.bad_records)
        head = itertools.islice(self._records(), _HEAD if held_out else 0)
        return stream, [record for record in head if record.draw < held_out]

    def endless(self, seed: int) -> Iterator[tuple[int, StreamedRecord]]:
        """Epoch after epoch, each in an order of its own as far as a buffer of records can change it."""
        for epoch in itertools.count():
            draw, held = np.random.default_rng((seed, epoch)), []
            for record in self:
                if len(held) < _SHUFFLED:
                    held.append(record)
                    continue
                place = int(draw.integers(_SHUFFLED))
                yield epoch, held[place]
                held[place] = record
            if not held:
                raise UserError(f"{self.name}: no record is left to train on.")
            for place in draw.permutation(len(held)):
                yield epoch, held[place]


SourceDocuments = Sequence[Document] | Stream  # the documents of one source


# ---- opened


def dataset_records(source: Source, key: str, bad_records: BadRecords = Document.bad_records) -> Documents | Stream:
    """All records of a dataset source, in its order; `key` is the source's place in the config.

    Raises:
        UserError: no such dataset or split, a broken file, no records, or none of the columns that are needed.
    """
    given = str(source.name or source.path)
    name = given if source.path is None else local(given).resolve().name
    name = name if source.split is None else f"{name}:{source.split}"
    try:
        files = _data_files(source, f"{key}.path")
        formats = {format_of(file.name) for of_split in files.values() for file in of_split}
        # From JSON and CSV the library would infer types, and change what records hold.
        read = _read_lines if formats & {"json", "csv"} else _read_tables
        opened, columns = read(source, files, f"{key}.columns")
        data = opened()
        if next(iter(data), None) is None if source.streaming else not len(data):
            raise UserError(f"{key}: {given} has no records.")
    except UserError:
        raise
    except Exception as error:  # whatever the library raises, the dataset or its name is at fault
        where = f"{key}.{'name' if source.path is None else 'path'}"
        raise UserError(f"{where}: {given}: cannot be loaded ({reason(error)}).") from error
    if source.streaming:
        # The library notes in a dataset how far it was read: readers that share one would disturb each other.
        return Stream(opened, name, columns.content, bad_records=bad_records)
    table = Table(data, name, columns, bad_records)
    return Documents(len(data), lambda number: Record(table, number))


Opened = tuple[Callable[[], Any], Columns]  # what gives the records; those of a stream, to each reader anew


def _read_lines(source: Source, files: dict[str, list[DataFile]], key: str) -> Opened:
    from datasets import DownloadManager, ReadInstruction

    wanted = source.split or "train"
    if source.streaming:
        if wanted not in files:
            raise ValueError(f"there is no split {wanted!r}, but {', '.join(files)}")
        opened: Callable[[], Any] = lambda: itertools.chain.from_iterable(map(read_lines, files[wanted]))  # noqa: E731
    else:
        lines = {}
        for split in (split for split in files if split in wanted):  # it may be a part of one, or a sum
            names, paths = [file.name for file in files[split]], [file.path for file in files[split]]
            if "://" in paths[0]:
                paths = DownloadManager().download(paths)
            lines[split] = JsonLines.of_files(list(map(DataFile, paths, names)))
        lengths = {split: len(lines.get(split, ())) for split in files}
        parts = ReadInstruction.from_spec(wanted).to_absolute(lengths)
        data = JsonLines([p for part in parts for p in lines[part.splitname].part(part.from_, part.to).parts])
        opened = lambda: data  # noqa: E731
    records, fault = [], None
    for line in itertools.islice(opened(), _LOOK):
        try:
            records.append(parse(line))
        except ValueError as error:
            fault = fault or error
    if fault and not records:
        raise fault
    found = dict.fromkeys(column for record in records for column in record)
    # That there is no record at all is for the caller to say.
    return opened, _columns(source, list(found), records, key) if records else Columns("text", ())


def _read_tables(source: Source, files: dict[str, list[DataFile]], key: str) -> Opened:
    stored = [file.path for file in files.get(source.split or "train", []) if format_of(file.name) == "parquet"]
    parquet = bool(stored) and "://" not in stored[0]
    data = _load(source, files, source.streaming or parquet)
    found = data.column_names or list(next(iter(data), {}))
    columns = _columns(source, found, itertools.islice(data, 1), key, dict(data.features or {}))
    if not parquet:
        data = data.select_columns(columns.wanted)
        return lambda: _load(source, files, True).select_columns(columns.wanted) if source.streaming else data, columns
    # Other columns may have types that differ from file to file. Where those of ours do, as structs of tool calls may,
    # each file is a dataset of its own.
    from pyarrow.parquet import read_schema

    schemas = [read_schema(path) for path in stored]
    alike = all(schema.field(name).type == schemas[0].field(name).type for schema in schemas for name in columns.wanted)
    parts = [files] if alike else [{"train": [file]} for file in files[source.split or "train"]]

    def opened() -> Any:
        loaded = [_load(source, part, source.streaming, columns.wanted) for part in parts]
        return loaded[0] if len(loaded) == 1 else itertools.chain(*loaded) if source.streaming else Joined(loaded)

    return opened, columns


class Joined(Sequence[dict[str, Any]]):
    """Tables of different types one after another."""

    def __init__(self, tables: list[Any]):
        self.tables, self.ends = tables, list(itertools.accumulate(map(len, tables)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, number: Any) -> Any:
        table = bisect.bisect_right(self.ends, number)
        return self.tables[table][number - self.ends[table] + len(self.tables[table])]


def _load(source: Source, files: dict[str, list[DataFile]], streaming: bool, columns: list[str] | None = None) -> Any:
    """The dataset as the library loads it; of Parquet files perhaps some columns alone."""
    from datasets import DatasetDict, load_dataset, load_from_disk

    split = source.split or "train"
    split = re.split(r"[\[+]", split)[0] if streaming else split  # a part cannot be streamed
    # The library runs no code of a dataset: loading scripts are gone from it since its version 4.
    if source.path is None:
        return load_dataset(source.name, split=split, streaming=streaming)
    path = local(source.path)
    if files and format_of(next(iter(files.values()))[0].name):
        kind = format_of(next(iter(files.values()))[0].name)
        literal = {name: [glob.escape(file.path) for file in of_split] for name, of_split in files.items()}
        options = {} if columns is None else {"columns": columns}
        return load_dataset(kind, data_files=literal, split=split, streaming=streaming, **options)
    if files:
        return load_dataset(str(path), split=split, streaming=streaming)
    data = load_from_disk(str(path))
    if isinstance(data, DatasetDict):
        if split not in data:
            raise ValueError(f"there is no split {split!r}, but {', '.join(data)}")
        data = data[split]
    return data.to_iterable_dataset() if streaming else data


def _data_files(source: Source, key: str) -> dict[str, list[DataFile]]:
    """The data files of each split; none of a folder that `save_to_disk` wrote."""
    from datasets import load_dataset_builder

    path = local(source.path) if source.path is not None else None
    if path is not None and not path.is_dir():
        return {"train": [DataFile(str(file), file.name) for file in data_files(path, f"{key}: {source.path}")]}
    if path is not None and any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return {}
    if path is not None and glob.has_magic(str(path)):  # which the library would take for a pattern
        from datasets.data_files import DataFilesDict, get_data_patterns

        base = glob.escape(str(path.resolve()))
        found = DataFilesDict.from_patterns(get_data_patterns(base), base_path=base)
    else:
        found = load_dataset_builder(source.name if path is None else str(path)).config.data_files or {}
    files = {str(split): [DataFile(file, file.rsplit("/", 1)[-1]) for file in found[split]] for split in found}
    formats = Counter(format_of(file.name) for of_split in files.values() for file in of_split)
    most = max(formats, key=lambda kind: (kind != "", formats[kind]))
    return {split: [file for file in of_split if format_of(file.name) == most] for split, of_split in files.items()}


def data_files(path: Path, where: str) -> list[Path]:
    """The data files that a path or glob names, of one format.

    Raises:
        UserError: nothing there, or a format that is not one of FORMATS; `where` begins the fault.
    """
    files, _ = find_files(path)
    if not files:
        raise UserError(f"{where}: no such file or folder, and no file matches it as a glob.")
    for file in files:
        if not format_of(file.name):
            raise UserError(
                f"{where}: {file.name}: unknown format {file.suffix!r}; a dataset is a folder, or files that end in "
                f"{', '.join(FORMATS)}; those of JSON and CSV also with .gz or .zst."
            )
    if len(kinds := sorted({format_of(file.name) for file in files})) > 1:
        raise UserError(f"{where}: matches files of several formats ({', '.join(kinds)}); make each its own source.")
    return files


def _columns(
    source: Source,
    found: list[str],
    records: Iterable[dict[str, Any]],
    key: str,
    types: dict[str, Any] | None = None,
) -> Columns:
    """The form of the records, and those of the columns `found` that it takes; `records` are examples for a fault."""
    chosen = chosen_forms(source.columns)
    tools = source.columns.get(TOOLS, TOOLS)
    missing = {tools} - set(found) if TOOLS in source.columns else set()
    for form in chosen or FORMS:
        columns = tuple(source.columns.get(ours, ours) for ours in FORMS[form])
        if set(columns) <= set(found) and not missing:
            # Of lines of JSON the first may lack what a later one has.
            has_tools = form != "text" and (types is None or tools in found)
            return Columns(form, columns, tools if has_tools else None, types)
    if chosen:
        missing |= set(columns) - set(found)
    has = f"its columns are {', '.join(found)}."
    if missing:
        wanted = f"has no column {' and no column '.join(repr(column) for column in sorted(missing))}"
    else:
        wanted = "has neither a column 'messages', nor 'prompt' and 'completion', nor 'text', nor 'conversations'"
        has += _advice(next(iter(records), {}))
    raise UserError(f"{key}: {source.name or source.path} {wanted}; {has}")


def _advice(record: dict[str, Any]) -> str:
    """A mapping of columns that would work for a record."""
    chats = [name for name, value in record.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    texts = [name for name, value in record.items() if isinstance(value, str)]
    if chats:
        mapping = f"messages: {chats[0]}"
    elif len(texts) > 1:
        mapping = f"prompt: {texts[0]}, completion: {texts[1]}"
    else:
        mapping = f"text: {texts[0]}" if texts else ""
    return f" Name them, for instance columns: {{{mapping}}}." if mapping else ""
