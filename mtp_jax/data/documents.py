"""What training sees: documents, each with a name, a place in the split, and content that is read on demand."""

import codecs
import glob
import hashlib
import mmap
import operator
import sysconfig
import threading
import tokenize
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mtp_jax.config import Source
from mtp_jax.errors import BadRecord, UserError
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
    tools: list[dict[str, Any]] | None = None  # JSON schemas, for the chat template
    context: int = 0  # so many messages at the beginning are a prompt: none of their tokens is supervised


Content = Text | Completion | Tokens | Conversation


class BadRecords:
    """The documents that cannot be trained on, which are skipped up to a limit."""

    def __init__(self, limit: int = 0, advice: str = ""):
        """`advice` ends the fault that is raised beyond the limit."""
        self.limit, self.advice, self.lock = limit, advice, threading.Lock()
        self.faults: dict[str, str] = {}  # by the document's name, so that a later epoch counts none again

    def skip(self, name: str, error: BadRecord) -> None:
        """Count a document; raises UserError beyond the limit."""
        with self.lock:
            self.faults.setdefault(name, str(error))
            if len(self.faults) > self.limit:
                raise UserError(str(error) + self.advice) from error

    def summary(self) -> str:
        """How many there were and the first, as the rest of a sentence; empty where there was none."""
        first = next(iter(self.faults.values()), "")
        return f"; {len(self.faults):,} bad records skipped, such as {first}" if first else ""


class Document(ABC):
    """One document of a source: cheap to hold, and read anew each time."""

    __slots__ = ()

    name: str  # independent of the machine
    bad_records = BadRecords()  # of its source; here none may be skipped

    @abstractmethod
    def content(self) -> Content:
        """What is trained on; raises UserError where it cannot be read, BadRecord where it is at fault itself."""

    def text(self) -> str:
        """All of its text, without any template."""
        content: Any = self.content()
        if isinstance(content, Conversation):
            return "\n".join(str(message.get("content") or "") for message in content.messages)
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
    bad_records: BadRecords = field(default=Document.bad_records, compare=False)

    def text(self) -> str:
        try:
            with self.path.open("rb") as file:
                file.seek(self.start or 0)
                data = file.read(-1 if self.end is None else self.end - (self.start or 0))
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror}).") from error
        try:
            return _decode(self.path, data) if self.start is None else decode(data)
        except ValueError as error:
            piece = "" if self.start is None else f" ({self.name})"
            raise BadRecord(f"{self.path}{piece}: {error}.") from error

    def content(self) -> Content:
        return Text(self.text())


def _decode(path: Path, data: bytes) -> str:
    if path.suffix == ".py":  # source files may declare an encoding of their own
        try:
            with tokenize.open(path) as file:
                return file.read()
        except (SyntaxError, UnicodeDecodeError):
            pass
    return decode(data)


# Longest first: the mark of UTF-32 begins as that of UTF-16 does.
_MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF8: "utf-8-sig"}
_MARKS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def encoding_of(head: bytes) -> str:
    """The encoding that a byte order mark at the beginning of a file states; UTF-8 where there is none."""
    return next((encoding for mark, encoding in _MARKS.items() if head.startswith(mark)), "utf-8")


def decode(data: bytes) -> str:
    """Bytes as text without a byte order mark; raises ValueError where they are no text."""
    encoding = encoding_of(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{NO_UTF8} ({error.reason} at byte {error.start})") from error
    if "\0" in text:
        raise ValueError(f"{NO_UTF8} (it holds zero bytes)")
    return text


NO_UTF8 = "is neither UTF-8 nor begins with a byte order mark; convert it, with iconv -f LATIN1 -t UTF-8 for instance"


def find_files(given: Path) -> tuple[list[Path], Path]:
    """The files that a path or a glob names, in order, and a folder that they are in.

    Brackets and the like are literal in the name of a file or folder that exists.
    """
    if given.is_file():
        return [given], given.parent
    folder = next(parent for parent in given.parents if parent.is_dir())
    pattern = Path(glob.escape(str(folder))) / given.relative_to(folder)
    found = (Path(path) for path in glob.glob(str(pattern), recursive=True))  # noqa: PTH207
    return sorted(path for path in found if path.is_file()), folder


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


def text_files(source: Source, key: str, bad_records: BadRecords = Document.bad_records) -> Documents:
    """The documents of a text source: files, or the pieces between separators.

    Raises:
        UserError: no such path, or no text there; `key` is where the path stands in the config.
    """
    assert source.path is not None
    base = local(source.path)
    if base.is_dir():
        paths, root = sorted(path for path in base.rglob("*.txt") if path.is_file()), base
    else:
        paths, root = find_files(base)
    if not paths:
        what = "holds no .txt file" if base.is_dir() else "no such file or folder, and no file matches it as a glob"
        raise UserError(f"{key}: {source.path}: {what}.")
    paths = [path for path in paths if path.stat().st_size]
    names = [path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name for path in paths]
    if source.separator is None:
        found = Documents(len(paths), lambda n: FileDocument(names[n], paths[n], bad_records=bad_records))
    else:
        found = _pieces(paths, names, source.separator.encode(), bad_records)
    if not found:
        raise UserError(f"{key}: {source.path}: every file is empty.")
    return found


def _pieces(paths: list[Path], names: list[str], separator: bytes, bad_records: BadRecords) -> Documents:
    spans = [np.array(list(_spans(path, separator)), np.int64).reshape(-1, 2) for path in paths]
    ends = np.cumsum([len(of_file) for of_file in spans])

    def make(number: int) -> FileDocument:
        file = int(np.searchsorted(ends, number, side="right"))
        place = number - int(ends[file]) + len(spans[file])
        start, end = map(int, spans[file][place])
        return FileDocument(f"{names[file]}#{place}", paths[file], start, end, bad_records)

    return Documents(int(ends[-1]) if len(ends) else 0, make)


def _spans(path: Path, separator: bytes) -> Iterator[tuple[int, int]]:
    """First byte and end of each piece of a file; pieces of white space alone are skipped."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        encoding = encoding_of(data[:4])
        if encoding not in ("utf-8", "utf-8-sig"):
            raise UserError(f"{path}: is {encoding.upper()}, and a separator parts files in UTF-8 alone; convert it.")
        start = 0 if encoding == "utf-8" else len(codecs.BOM_UTF8)
        while start <= len(data):
            end = data.find(separator, start)
            end = len(data) if end < 0 else end
            if data[start:end].strip():
                yield start, end
            start = end + len(separator)
