"""Records of a dataset as documents: from the Hugging Face hub, a folder or data files, stored or streamed."""

import glob
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mtp_jax.config import FORMATS, FORMS, Source, chosen_forms
from mtp_jax.data.documents import Completion, Content, Conversation, Document, Documents, Text
from mtp_jax.errors import UserError
from mtp_jax.storage import local

_SHUFFLED = 1000  # records of a stream that are held to change their order
_HEAD = 10_000  # records at the beginning of a stream that are searched for held-out ones


@dataclass(frozen=True, eq=False)
class Columns:
    """Which columns of a dataset make a document."""

    form: str  # of FORMS
    names: tuple[str, ...]  # the dataset's names, in the order of FORMS

    def content(self, values: dict[str, Any], name: str) -> Content:
        """What a record holds; raises UserError with its name where a column holds something else."""
        given: list[Any] = [values.get(column) for column in self.names]
        if self.form == "conversation":
            return Conversation(_messages(given[0], f"{name}: column {self.names[0]!r}"))
        for column, value in zip(self.names, given, strict=True):
            if not isinstance(value, str):
                raise UserError(f"{name}: column {column!r} should hold text, not {type(value).__name__}.")
        return Text(*given) if self.form == "text" else Completion(*given)


def _messages(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(m, dict) and m.get("role") for m in value):
        raise UserError(f"{where} should hold a list of messages, each with a role and a content.")
    # A table has the same keys in every message: those that a message does not use are null there.
    return [{key: part for key, part in message.items() if part is not None} for message in value]


# ---- stored


@dataclass(frozen=True, eq=False)
class Table:
    """A memory-mapped dataset."""

    data: Any  # datasets.Dataset
    name: str
    columns: Columns


@dataclass(frozen=True, slots=True)
class Record(Document):
    """One record of a table, looked up when its content is asked for."""

    table: Table
    number: int

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.table.name}#{self.number}"

    def content(self) -> Content:
        return self.table.columns.content(self.table.data[self.number], self.name)


# ---- streamed


class StreamedRecord(Document):
    """One record of a stream, held until it is used."""

    __slots__ = ("name", "number", "to_content", "values")

    def __init__(self, stream: "Stream", number: int, values: dict[str, Any]):
        self.name, self.number, self.values = stream.record_name(number), number, values
        self.to_content = stream.to_content

    def content(self) -> Content:
        return self.to_content(self.values, self.name)


class Stream:
    """Records in a fixed order, numbered from 0, that are not stored; those held out by their name are skipped."""

    def __init__(
        self,
        opened: Callable[[], Iterable[dict[str, Any]]],
        name: str,
        to_content: Callable[[dict[str, Any], str], Content],
        held_out: float = 0.0,
    ):
        """`opened` gives each reader its own records, from the first one on."""
        self.opened, self.name, self.to_content, self.held_out = opened, name, to_content, held_out

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
                raise UserError(f"{self.name}: cannot be read after record {number} ({first_line(error)}).") from error
            if values is None:
                return
            yield StreamedRecord(self, number, values)
            number += 1

    def split(self, held_out: float) -> tuple["Stream", list[Document]]:
        """The stream without its held-out records, and those of them that are near its beginning."""
        stream = Stream(self.opened, self.name, self.to_content, held_out)
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


def dataset_records(source: Source, key: str) -> Documents | Stream:
    """All records of a dataset source, in its order; `key` is the source's place in the config.

    Raises:
        UserError: no such dataset or split, a broken file, no records, or none of the columns that are needed.
    """
    data, name = _load(source, key)
    found = data.column_names
    if source.streaming:
        try:
            first = next(iter(data), None)
        except Exception as error:  # whatever the library raises, the dataset is at fault
            raise _cannot_be_loaded(source, key, error) from error
        found = first if found is None else found
        count = 0 if first is None else 1
    else:
        count = len(data)
    if not count:
        raise UserError(f"{key}: {source.name or source.path} has no records.")
    columns = _columns(source, list(found), f"{key}.columns")
    wanted = list(columns.names)
    if source.streaming:
        # The library notes in a dataset how far it was read, so readers that share one would disturb each other.
        return Stream(lambda: _load(source, key)[0].select_columns(wanted), name, columns.content)
    table = Table(data.select_columns(wanted), name, columns)
    return Documents(count, lambda number: Record(table, number))


def _load(source: Source, key: str) -> tuple[Any, str]:
    """The dataset, and what its records are named after."""
    from datasets import DatasetDict, load_dataset, load_from_disk

    split, streaming = source.split or "train", source.streaming
    try:
        # The library runs no code of a dataset: loading scripts are gone from it since its version 4.
        if source.path is None:
            data, name = load_dataset(source.name, split=split, streaming=streaming), str(source.name)
        else:
            path = local(source.path)
            name = path.resolve().name
            if files := data_files(source.path, f"{key}.path"):
                kind = FORMATS[files[0].suffix]
                data = load_dataset(kind, data_files=[str(file) for file in files], split=split, streaming=streaming)
            elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
                data = load_from_disk(str(path))
                if isinstance(data, DatasetDict):
                    if split not in data:
                        has = ", ".join(data)
                        raise UserError(f"{key}.path: {source.path} has no split {split!r}; it has {has}.")
                    data = data[split]
                data = data.to_iterable_dataset() if streaming else data
            else:
                data = load_dataset(str(path), split=split, streaming=streaming)
    except UserError:
        raise
    except Exception as error:  # whatever the library raises, the dataset or its name is at fault
        raise _cannot_be_loaded(source, key, error) from error
    return data, name if source.split is None else f"{name}:{split}"


def data_files(given: str, key: str) -> list[Path]:
    """The data files that a path or glob names, of one format; empty where it names a folder.

    Raises:
        UserError: nothing there, or a format that is not one of FORMATS.
    """
    path = local(given)
    if path.is_dir():
        return []
    files = [path] if path.is_file() else sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207
    files = [file for file in files if file.is_file()]
    if not files:
        raise UserError(f"{key}: {given}: no such file or folder, and no file matches it as a glob.")
    for file in files:
        if file.suffix not in FORMATS:
            raise UserError(
                f"{key}: {file}: unknown format {file.suffix!r}; a dataset is a folder, or files that end in "
                f"{', '.join(FORMATS)}."
            )
    if len(kinds := sorted({FORMATS[file.suffix] for file in files})) > 1:
        raise UserError(
            f"{key}: {given}: matches files of several formats ({', '.join(kinds)}); make each format its own source."
        )
    return files


def first_line(error: Exception) -> str:
    """What an error says in its first line, or else what it is called."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _cannot_be_loaded(source: Source, key: str, error: Exception) -> UserError:
    reason = first_line(error)
    if source.path is None:
        return UserError(f"{key}.name: {source.name}: cannot be loaded ({reason}).")
    path = local(source.path)
    files = sorted(path.rglob("*")) if path.is_dir() else data_files(source.path, f"{key}.path")
    for file in (file for file in files if FORMATS.get(file.suffix) == "json"):
        if broken := next(_broken_lines(file), None):
            reason = f"{file.name}, {broken}"
            break
    return UserError(f"{key}.path: {source.path}: cannot be loaded ({reason}).")


def _broken_lines(file: Path) -> Iterator[str]:
    """What is wrong with each line of a JSON Lines file: no JSON, no record, or a value of another type than above."""
    types: dict[str, tuple[type, int]] = {}
    with file.open("rb") as lines:
        if lines.read(1) == b"[":  # one list, not lines
            try:
                json.loads(file.read_bytes())
            except json.JSONDecodeError as error:
                yield f"line {error.lineno}: not valid JSON: {error}"
            return
        lines.seek(0)
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line) if line.strip() else {}
            except ValueError as error:
                yield f"line {number}: not valid JSON: {error}"
                continue
            if not isinstance(record, dict):
                yield f"line {number}: should be an object of columns, not {type(record).__name__}"
                continue
            for column, value in record.items():
                before, where = types.setdefault(column, (type(value), number)) if value is not None else (None, 0)
                if before is not None and not isinstance(value, before):
                    yield (
                        f"line {number}: column {column!r} holds {type(value).__name__}, and {before.__name__} in line "
                        f"{where}"
                    )


def _columns(source: Source, found: list[str], key: str) -> Columns:
    """The form of the records, and the dataset's columns for it."""
    chosen = chosen_forms(source.columns)
    for form in chosen or FORMS:
        columns = tuple(source.columns.get(ours, ours) for ours in FORMS[form])
        if set(columns) <= set(found):
            return Columns(form, columns)
    if chosen:
        missing = sorted(set(columns) - set(found))
        wanted = f"has no column {' and no column '.join(repr(column) for column in missing)}"
    else:
        wanted = "has neither a column 'messages', nor 'prompt' and 'completion', nor 'text'"
    raise UserError(f"{key}: {source.name or source.path} {wanted}; its columns are {', '.join(found)}.")
