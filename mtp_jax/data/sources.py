"""Where documents come from: each source of the config lists its documents, and a part of them is held out."""

import glob
import mmap
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mtp_jax.config import Data, Source
from mtp_jax.data.continuations import read_continuations
from mtp_jax.data.examples import Content, Example, Examples, Text
from mtp_jax.data.rows import dataset_rows
from mtp_jax.data.streams import Documents, Stream
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
            with self.path.open("rb") as file:
                file.seek(self.start or 0)
                data = file.read(-1 if self.end is None else self.end - (self.start or 0))
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror}).") from error
        return _decode(self.path, data) if self.start is None else data.decode("utf-8", errors="replace")

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


def text_files(source: Source, key: str) -> Sequence[Example]:
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
    paths = [path for path in paths if path.stat().st_size]
    names = [path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name for path in paths]
    if source.separator is None:
        found = Examples(len(paths), lambda n: Document(names[n], paths[n]))
    else:
        found = _pieces(paths, names, source.separator.encode())
    if not found:
        raise UserError(f"{key}: {source.path}: every file is empty.")
    return found


def _pieces(paths: list[Path], names: list[str], separator: bytes) -> Examples:
    spans = [np.array(list(_spans(path, separator)), np.int64).reshape(-1, 2) for path in paths]
    ends = np.cumsum([len(of_file) for of_file in spans])

    def make(number: int) -> Document:
        file = int(np.searchsorted(ends, number, side="right"))
        place = number - int(ends[file]) + len(spans[file])
        return Document(f"{names[file]}#{place}", paths[file], *map(int, spans[file][place]))

    return Examples(int(ends[-1]) if len(ends) else 0, make)


def _spans(path: Path, separator: bytes) -> Iterator[tuple[int, int]]:
    """From and to which byte each piece of a file stands; those of white space alone are left out."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = 0
        while start <= len(data):
            end = data.find(separator, start)
            end = len(data) if end < 0 else end
            if data[start:end].strip():
                yield start, end
            start = end + len(separator)


def documents(source: Source, key: str = "data.sources.0.path") -> Documents:
    """All documents of a source, in a fixed order; `key` is where its path stands.

    Raises:
        UserError: a missing path, a source without text, a dataset that cannot be had or lacks the columns.
    """
    if source.kind == "python-stdlib":
        return python_stdlib()
    if source.kind == "dataset":
        return dataset_rows(source, key.removesuffix(".path"))
    return text_files(source, key)


def split(found: Documents, held_out: float) -> tuple[Documents, Sequence[Example]]:
    """Training and held-out documents, told apart by the hash of their name: alike on every machine."""
    if isinstance(found, Stream):
        return found.split(held_out)
    held = np.fromiter((document.draw < held_out for document in found), bool, len(found))
    parts = np.flatnonzero(~held), np.flatnonzero(held)
    every = found if isinstance(found, Examples) else Examples(len(found), found.__getitem__)
    return every.part(parts[0]), every.part(parts[1])


def read_sources(data: Data, continuations: bool = True) -> tuple[list[Documents], list[Example]]:
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
        if not isinstance(train, Stream) and not train:
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
