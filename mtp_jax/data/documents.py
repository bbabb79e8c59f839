"""What training sees: documents, each with a name, a place in the split, and content that is read on demand."""

import glob
import hashlib
import mmap
import operator
import sysconfig
import tokenize
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mtp_jax.config import Source
from mtp_jax.errors import UserError
from mtp_jax.storage import local

# The library's own tests, and what is not part of the library.
_NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class Text(NamedTuple):
    """Every token is supervised."""

    text: str


class Completion(NamedTuple):
    """The tokens of the completion are supervised."""

    prompt: str
    completion: str
    whole: bool = True  # the text ends here; otherwise it was cut off, or contains its own end


class Tokens(NamedTuple):
    """Token ids; those of the completion are supervised, and nothing is added."""

    prompt: list[int]
    completion: list[int]


class Conversation(NamedTuple):
    """The tokens of the assistant's turns are supervised."""

    messages: list[dict[str, Any]]


Content = Text | Completion | Tokens | Conversation


class Document(ABC):
    """One document of a source: cheap to hold, and read anew each time."""

    __slots__ = ()

    name: str  # independent of the machine

    @abstractmethod
    def content(self) -> Content:
        """What is trained on; raises UserError where it cannot be read."""

    def text(self) -> str:
        """All of its text, without any template."""
        content: Any = self.content()
        if isinstance(content, Conversation):
            return "\n".join(str(message.get("content", "")) for message in content.messages)
        return "".join(content[:2])

    @property
    def draw(self) -> float:
        """A number in [0, 1) that depends on the name alone; the documents with the smallest ones are held out."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "big") / 2**64


class Documents(Sequence[Document]):
    """Documents that are made on access, so that a list of millions takes no memory."""

    def __init__(self, length: int, make: Callable[[int], Document]):
        self.length, self.make = length, make

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return self.part(np.arange(self.length)[number])
        number = operator.index(number)
        if not -self.length <= number < self.length:
            raise IndexError(number)
        return self.make(number % self.length)

    def part(self, numbers: np.ndarray) -> "Documents":
        """The documents of the given numbers."""
        return Documents(len(numbers), lambda n: self.make(int(numbers[n])))


# ---- of files


@dataclass(frozen=True)
class FileDocument(Document):
    """A file or a piece of one, named independently of where the file lies on this machine."""

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


def python_stdlib() -> list[Document]:
    """The source files of the running Python's standard library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files: list[Document] = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not _NOT_STDLIB.intersection(relative.parts) and path.stat().st_size > 0:
            files.append(FileDocument(relative.as_posix(), path))
    if not files:
        raise UserError(f"python-stdlib: this Python keeps no source files in {root}.")
    return files


def text_files(source: Source, key: str) -> Documents:
    """The documents of a text source: files, or the pieces between separators.

    Raises:
        UserError: no such path, or no text there; `key` is where the path stands in the config.
    """
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
        what = "holds no .txt file" if base.is_dir() else "no such file or folder, and no file matches it as a glob"
        raise UserError(f"{key}: {source.path}: {what}.")
    paths = [path for path in paths if path.stat().st_size]
    names = [path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name for path in paths]
    if source.separator is None:
        found = Documents(len(paths), lambda n: FileDocument(names[n], paths[n]))
    else:
        found = _pieces(paths, names, source.separator.encode())
    if not found:
        raise UserError(f"{key}: {source.path}: every file is empty.")
    return found


def _pieces(paths: list[Path], names: list[str], separator: bytes) -> Documents:
    spans = [np.array(list(_spans(path, separator)), np.int64).reshape(-1, 2) for path in paths]
    ends = np.cumsum([len(of_file) for of_file in spans])

    def make(number: int) -> FileDocument:
        file = int(np.searchsorted(ends, number, side="right"))
        place = number - int(ends[file]) + len(spans[file])
        return FileDocument(f"{names[file]}#{place}", paths[file], *map(int, spans[file][place]))

    return Documents(int(ends[-1]) if len(ends) else 0, make)


def _spans(path: Path, separator: bytes) -> Iterator[tuple[int, int]]:
    """First byte and end of each piece of a file; pieces of white space alone are skipped."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = 0
        while start <= len(data):
            end = data.find(separator, start)
            end = len(data) if end < 0 else end
            if data[start:end].strip():
                yield start, end
            start = end + len(separator)
