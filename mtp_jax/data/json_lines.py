"""Records of JSON and CSV files, each read by itself and exactly as written: no types are inferred, none is converted.

What is not JSON lines in UTF-8 (compressed files, lists, other encodings, CSV) is copied once into lines of JSON.
"""

import codecs
import csv
import gzip
import hashlib
import io
import json
import os
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mtp_jax.config import FORMATS
from mtp_jax.data.documents import encoding_of
from mtp_jax.files import cache_folder, scratch_folder

_COMPRESSED = (".gz", ".zst")
_CHUNK = 16 << 20  # bytes of a file that are searched at a time
_BLANK = b" \t\r\n"


class DataFile(NamedTuple):
    """A data file; where it is a copy from the hub, its name is that on the hub."""

    path: str  # or an address that fsspec opens
    name: str


def format_of(name: str) -> str:
    """The format that a file's name states, of FORMATS; empty where it is none of them."""
    plain = name.removesuffix(".gz").removesuffix(".zst")
    found = FORMATS.get(Path(plain).suffix, "")
    return found if plain == name or found in ("json", "csv") else ""


def parse(line: bytes) -> dict[str, Any]:
    """The record in a line of JSON; raises ValueError where there is none."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}; convert the file") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"should be an object of columns, not {type(record).__name__}")
    return record


def read_lines(file: DataFile) -> Iterator[bytes]:
    """Each record of a file as a line of JSON, which is valid only if it was in the file.

    Raises:
        ValueError, OSError, EOFError, zlib.error: a file that cannot be read, or a list or CSV that is broken.
    """
    with _decompressed(file) as stream:
        encoding = _begin(stream)
        if format_of(file.name) == "csv":
            csv.field_size_limit(sys.maxsize)
            rows = csv.reader(io.TextIOWrapper(stream, encoding, newline=""), strict=True)
            try:
                names = next(rows, [])
                for row in filter(None, rows):  # one with more or fewer fields than names is no record
                    yield json.dumps(dict(zip(names, row, strict=True)) if len(row) == len(names) else row).encode()
            except csv.Error as error:
                raise ValueError(f"line {rows.line_num}: {error}") from error
            return
        lines: Iterator[bytes] = iter(stream)
        if encoding != "utf-8":
            lines = (line.encode() for line in io.TextIOWrapper(stream, encoding, newline="\n"))
        whole = (line for line in lines if line.strip())
        first = next(whole, b"")
        if first.lstrip().startswith(b"["):
            try:
                yield from (json.dumps(record).encode() for record in json.loads(first + b"".join(whole)))
            except json.JSONDecodeError as error:
                raise ValueError(f"line {error.lineno}: not valid JSON: {error}") from error
            return
        yield from chain([first] if first else [], whole)


def _begin(stream: io.BufferedReader) -> str:
    """The encoding of a stream, from which the byte order mark of UTF-8 is taken."""
    encoding = encoding_of(stream.peek(4))
    if encoding == "utf-8-sig":
        stream.read(len(codecs.BOM_UTF8))
    return encoding.removesuffix("-sig")


def _decompressed(file: DataFile) -> io.BufferedReader:
    if "://" in file.path:
        import fsspec

        raw: Any = fsspec.open(file.path, "rb").open()
    else:
        raw = Path(file.path).open("rb")  # noqa: SIM115
    if file.name.endswith(".gz"):
        raw = gzip.GzipFile(fileobj=raw)
    elif file.name.endswith(".zst"):
        import pyarrow

        raw = pyarrow.CompressedInputStream(raw, "zstd")
    return raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw)


class JsonLines(Sequence[bytes]):
    """The records of stored files, found by their places; only the places are in memory, 8 bytes each."""

    def __init__(self, parts: list[tuple[DataFile, np.ndarray]]):
        """Each part is a file of JSON lines with the first byte of each of its records and the end of the last."""
        self.parts = parts
        self.ends = np.cumsum([len(starts) - 1 for _, starts in parts], dtype=np.int64)

    @classmethod
    def of_files(cls, files: list[DataFile]) -> "JsonLines":
        """All records; raises ValueError with the file's name where one cannot be read."""
        parts = []
        for file in files:
            try:
                path = _as_lines(file)
                parts.append((DataFile(str(path), file.name), _line_starts(path)))
            except (ValueError, EOFError, OSError, zlib.error) as error:
                raise ValueError(f"{file.name}, {error}") from error
        return cls(parts)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, number: Any) -> Any:
        """A record as a line of JSON, valid or not."""
        file, start, end = self._find(number)
        with Path(file.path).open("rb") as stream:
            stream.seek(start)
            return stream.read(end - start)

    def _find(self, number: int) -> tuple[DataFile, int, int]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        part = int(np.searchsorted(self.ends, number, side="right"))
        file, starts = self.parts[part]
        place = number - int(self.ends[part]) + len(starts) - 1
        return file, int(starts[place]), int(starts[place + 1])

    def place(self, number: int) -> str:
        """Where a person finds a record."""
        file, start, _ = self._find(number)
        with Path(file.path).open("rb") as stream:
            above = stream.read(start).count(b"\n")
        return f"{file.name}, line {above + 1}"

    def part(self, start: int, stop: int) -> "JsonLines":
        """The records from `start` to before `stop`."""
        parts, begin = [], 0
        for file, starts in self.parts:
            inside = starts[max(start - begin, 0) : max(stop - begin, -1) + 1]
            parts += [(file, inside)] if len(inside) > 1 else []
            begin += len(starts) - 1
        return JsonLines(parts)


def _as_lines(file: DataFile) -> Path:
    """The file itself where its records are lines, else a copy in the cache of the `datasets` library."""
    path = Path(file.path)
    with _decompressed(file) as stream:
        encoding, first = _begin(stream), next(filter(bytes.strip, stream), b"")
    lines = format_of(file.name) != "csv" and not file.name.endswith(_COMPRESSED)
    if lines and encoding == "utf-8" and not first.lstrip().startswith(b"["):
        return path
    from datasets import config

    known = json.dumps([str(path.resolve()), file.name, path.stat().st_size, path.stat().st_mtime_ns])
    folder = cache_folder(f"{config.HF_DATASETS_CACHE}/mtp_jax") or scratch_folder()
    copy = folder / f"{hashlib.sha256(known.encode()).hexdigest()[:20]}.jsonl"
    if not copy.exists():
        descriptor, part = tempfile.mkstemp(dir=folder)
        try:
            with open(descriptor, "wb") as out:  # noqa: PTH123
                out.writelines(line.rstrip() + b"\n" for line in read_lines(file))
            os.replace(part, copy)  # noqa: PTH105
        finally:
            Path(part).unlink(missing_ok=True)
    return copy


def _line_starts(path: Path) -> np.ndarray:
    """First byte of each line that is not blank, and the end of the file."""
    if not (size := path.stat().st_size):
        return np.zeros(1, np.int64)
    data = np.memmap(path, np.uint8, "r")
    skipped = len(codecs.BOM_UTF8) if data[:3].tobytes() == codecs.BOM_UTF8 else 0
    found = [np.array([skipped])]
    found += [np.flatnonzero(data[at : at + _CHUNK] == ord("\n")) + at + 1 for at in range(0, size, _CHUNK)]
    starts = np.append(np.concatenate(found), size).astype(np.int64)
    starts = starts[: len(starts) - (starts[-2] == size)]
    maybe = np.flatnonzero(np.isin(data[starts[:-1]], list(_BLANK)))
    blank = [n for n in maybe if not data[starts[n] : starts[n + 1]].tobytes().strip()]
    return np.delete(starts, blank)
