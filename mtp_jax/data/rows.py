"""Examples that are rows of a dataset: of the Hugging Face hub, of a JSON file, or of a local folder."""

from dataclasses import dataclass
from typing import Any

from mtp_jax.config import Source
from mtp_jax.data.examples import Completion, Content, Conversation, Example, Text
from mtp_jax.data.source_rules import FORMS, chosen_forms
from mtp_jax.errors import UserError
from mtp_jax.storage import local

_JSON = (".jsonl", ".json")


@dataclass(frozen=True, eq=False)
class Table:
    """A memory-mapped dataset and which of its columns make an example."""

    data: Any  # datasets.Dataset
    name: str
    form: str  # of FORMS
    columns: tuple[str, ...]  # the dataset's names, in the order of FORMS


@dataclass(frozen=True, slots=True)
class Row(Example):
    """One row of a table."""

    table: Table
    number: int

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.table.name}#{self.number}"

    def content(self) -> Content:
        row = self.table.data[self.number]
        values = [row[column] for column in self.table.columns]
        if self.table.form == "conversation":
            return Conversation(_messages(values[0], f"{self.name}: column {self.table.columns[0]!r}"))
        for column, value in zip(self.table.columns, values, strict=True):
            if not isinstance(value, str):
                raise UserError(f"{self.name}: column {column!r} should hold text, not {type(value).__name__}.")
        return Text(*values) if self.table.form == "text" else Completion(*values)


def _messages(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(m, dict) and m.get("role") for m in value):
        raise UserError(f"{where} should hold a list of messages, each with a role and a content.")
    # A table has the same keys in every message: those that a message does not use are null there.
    return [{key: part for key, part in message.items() if part is not None} for message in value]


def dataset_rows(source: Source, key: str) -> list[Example]:
    """All rows of a dataset source, in its order; `key` is the source's place in the config.

    Raises:
        UserError: no such dataset or split, or none of the columns that are needed.
    """
    data, name = _load(source, key)
    form, columns = _columns(source, list(data.column_names), f"{key}.columns")
    if not len(data):
        raise UserError(f"{key}: {source.name or source.path} has no rows.")
    table = Table(data.select_columns(list(columns)), name, form, columns)
    return [Row(table, number) for number in range(len(data))]


def _load(source: Source, key: str) -> tuple[Any, str]:
    """The dataset, and what its rows are named after."""
    from datasets import DatasetDict, load_dataset, load_from_disk

    split = source.split or "train"
    path = None if source.path is None else local(source.path)
    if path is not None:
        key = f"{key}.path"
        if not path.exists():
            raise UserError(f"{key}: {source.path}: no such file or folder.")
        if path.is_file() and path.suffix not in _JSON:
            raise UserError(f"{key}: {source.path}: a dataset is a .jsonl or .json file, or a folder.")
    else:
        key = f"{key}.name"
    try:
        # The library runs no code of a dataset: loading scripts are gone from it since its version 4.
        if path is None:
            data = load_dataset(source.name, split=split)
        elif path.is_file():
            data = load_dataset("json", data_files=str(path), split=split)
        elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            data = load_from_disk(str(path))
        else:
            data = load_dataset(str(path), split=split)
    except Exception as error:  # whatever the library raises, the dataset or its name is at fault
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{key}: {source.name or source.path}: cannot be loaded ({reason}).") from error
    if isinstance(data, DatasetDict):
        if split not in data:
            raise UserError(f"{key}: {source.path} has no split {split!r}; it has {', '.join(data)}.")
        data = data[split]
    name = str(source.name) if path is None else path.resolve().name
    return data, name if source.split is None else f"{name}:{split}"


def _columns(source: Source, found: list[str], key: str) -> tuple[str, tuple[str, ...]]:
    """Which form the rows take, and the dataset's columns for it."""
    chosen = chosen_forms(source.columns)
    for form in chosen or FORMS:
        columns = tuple(source.columns.get(ours, ours) for ours in FORMS[form])
        if set(columns) <= set(found):
            return form, columns
    if chosen:
        missing = sorted(set(columns) - set(found))
        wanted = f"has no column {' and no column '.join(repr(column) for column in missing)}"
    else:
        wanted = "has neither a column 'messages', nor 'prompt' and 'completion', nor 'text'"
    raise UserError(f"{key}: {source.name or source.path} {wanted}; its columns are {', '.join(found)}.")
