"""Where documents come from: each source of the config lists its documents, and a part of them is held out."""

import glob
import sysconfig
import tokenize
from dataclasses import dataclass
from pathlib import Path

from mtp_jax.config import Data, Source
from mtp_jax.data.continuations import read_continuations
from mtp_jax.data.examples import Content, Example, Text
from mtp_jax.data.rows import dataset_rows
from mtp_jax.errors import UserError
from mtp_jax.storage import local

# Of the library's own test packages, and of what is not the library.
_NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Document(Example):
    """A piece of a file, named independently of where the file lies on this machine."""

    name: str
    path: Path
    start: int | None = None  # span in bytes; the whole file when None
    end: int | None = None

    def text(self) -> str:
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror}).") from error
        if self.start is None:
            return _decode(self.path, data)
        return data[self.start : self.end].decode("utf-8", errors="replace")

    def content(self) -> Content:
        return Text(self.text())


def _decode(path: Path, data: bytes) -> str:
    if path.suffix == ".py":  # source files may declare an encoding of their own
        try:
            with tokenize.open(path) as file:
                return file.read()
        except (SyntaxError, UnicodeDecodeError):
            pass
    return data.decode("utf-8", errors="replace")


def python_stdlib() -> list[Example]:
    """The source files of the running Python's standard library, its test packages left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files: list[Example] = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not _NOT_STDLIB.intersection(relative.parts) and path.stat().st_size > 0:
            files.append(Document(relative.as_posix(), path))
    if not files:
        raise UserError(f"python-stdlib: this Python keeps no source files in {root}.")
    return files


def text_files(source: Source, key: str) -> list[Example]:
    """The documents of a text source: files, or pieces of files between separators."""
    assert source.path is not None
    base = local(source.path)
    if base.is_dir():
        paths, root = sorted(path for path in base.rglob("*.txt") if path.is_file()), base
    elif base.is_file():
        paths, root = [base], base.parent
    else:
        paths = sorted(Path(p) for p in glob.glob(str(base), recursive=True) if Path(p).is_file())  # noqa: PTH207
        root = next(folder for folder in base.parents if not glob.has_magic(str(folder)))
    if not paths:
        what = "holds no .txt file" if base.is_dir() else "no such file or folder, and no glob that matches one"
        raise UserError(f"{key}: {source.path}: {what}.")
    documents: list[Example] = []
    for path in paths:
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
        if source.separator is None:
            documents += [Document(name, path)] if path.stat().st_size else []
        else:
            documents += _pieces(path, name, source.separator.encode())
    if not documents:
        raise UserError(f"{key}: {source.path}: every file is empty.")
    return documents


def _pieces(path: Path, name: str, separator: bytes) -> list[Document]:
    data, pieces, start = path.read_bytes(), [], 0
    while start <= len(data):
        end = data.find(separator, start)
        end = len(data) if end < 0 else end
        if data[start:end].strip():
            pieces.append(Document(f"{name}#{len(pieces)}", path, start, end))
        start = end + len(separator)
    return pieces


def documents(source: Source, key: str = "data.sources.0.path") -> list[Example]:
    """All documents of a source, in a fixed order; `key` is where its path stands.

    Raises:
        UserError: a missing path, a source without text, a dataset that cannot be had or lacks the columns.
    """
    if source.kind == "python-stdlib":
        return python_stdlib()
    if source.kind == "dataset":
        return dataset_rows(source, key.removesuffix(".path"))
    return text_files(source, key)


def split(found: list[Example], held_out: float) -> tuple[list[Example], list[Example]]:
    """Training and held-out documents, told apart by the hash of their name: alike on every machine."""
    train: list[Example] = []
    held: list[Example] = []
    for document in found:
        (held if document.draw < held_out else train).append(document)
    return train, held


def read_sources(data: Data, continuations: bool = True) -> tuple[list[list[Example]], list[Example]]:
    """Training documents of every source, and the held-out documents of all.

    Where `data.continuations` is set they stand in for the training documents, as one source, unless `continuations`
    is false.

    Raises:
        UserError: what a source lacks, nothing to train on.
    """
    training, held_out, faults = [], [], []
    for i, source in enumerate(data.sources):
        key = f"data.sources.{i}"
        try:
            train, held = split(documents(source, f"{key}.path"), data.held_out)
        except UserError as error:
            faults += error.faults
            continue
        if not train:
            faults.append(f"{key}: all {len(held)} documents fall to the held-out part; lower data.held_out.")
        training.append(train)
        held_out += held
    if data.continuations is not None and continuations:
        try:
            training = [read_continuations(data.continuations)]
        except UserError as error:
            faults += error.faults
    if faults:
        raise UserError(*faults)
    return training, held_out
