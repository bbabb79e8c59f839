"""Buckets (`gs://`) where a local path may stand: copies to read from, objects written whole, and exclusion.

A bucket has no rename and no locks. An object appears whole or not at all, so a writer of several writes last the
one that says that they are all there. An object created only where there is none (generation-match) is a lock.
"""

import glob
import hashlib
import importlib.util
import json
import os
import secrets
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from mtp_jax.errors import Unreachable, UserError
from mtp_jax.files import cache_folder, expanded, scratch_folder

PREFIX = "gs://"
CACHE = "~/.cache/mtp_jax/buckets"
LOCK_SECONDS = "MTP_JAX_LOCK_SECONDS"
_AT_ONCE = 8  # objects under way
_SMALL = 5 << 20  # bytes; what is larger goes in several requests
_BEATS = 6  # renewals of a lock in the time after which one that was not renewed is stale

T = TypeVar("T")


def is_bucket(name: Any) -> bool:
    """Whether a path leads into a bucket."""
    return str(name).startswith(PREFIX)


@cache
def filesystem() -> Any:
    """The file system of buckets, which STORAGE_EMULATOR_HOST may move to a server of one's own.

    Raises:
        UserError: the extra `gcs` is not installed.
    """
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError("paths in buckets (gs://) need a package: pip install 'mtp_jax[gcs]'.")
    # What the package would do by default, also for those who ask fsspec for it (JAX's compilation cache does), needs
    # further permissions and a server that speaks gRPC.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    from gcsfs.core import GCSFileSystem

    # Other processes write too, so nothing that was listed may be remembered.
    anonymous = {"token": "anon"} if os.environ.get("STORAGE_EMULATOR_HOST") else {}
    return GCSFileSystem(use_listings_cache=False, **anonymous)


def _asked(name: str, ask: Callable[[], T]) -> T:
    """What a bucket answers, or its refusal in one line."""
    from aiohttp import ClientError
    from gcsfs.retry import HttpError
    from google.auth.exceptions import GoogleAuthError, TransportError

    try:
        return ask()
    except FileNotFoundError as error:
        raise UserError(f"{name}: there is no such object or bucket.") from error
    except FileExistsError:
        raise
    except (ClientError, GoogleAuthError, HttpError, OSError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        code, kind = str(getattr(error, "code", "")), UserError
        if code == "401" or (isinstance(error, GoogleAuthError) and not isinstance(error, TransportError)):
            remedy = "run: gcloud auth application-default login"
        elif "Forbidden" in str(error):
            remedy = "this account needs the role Storage Object Admin on the bucket."
        elif code.startswith("4"):
            remedy = "is the bucket's name right?"
        else:
            remedy, kind = "is the network up? The same command goes on when it is.", Unreachable
        raise kind(f"{name}: the bucket cannot be used ({reason}); {remedy}") from error


def local(name: str, skip: Iterable[str] = ("checkpoints/", "logs/", ".lock")) -> Path:
    """The path to read `name` from: its own, or that of a copy of what a bucket holds, made where there is none yet.

    In a bucket `name` is an object, a folder, or a pattern below a folder; of a folder all but `skip` is copied.

    Raises:
        UserError: a bucket that cannot be read, or holds nothing of that name.
    """
    if not is_bucket(name):
        return expanded(name)
    if glob.has_magic(name):
        parts = name.split("/")
        fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        return local("/".join(parts[:fixed]), skip).joinpath(*parts[fixed:])
    fs, key = filesystem(), name.removeprefix(PREFIX).rstrip("/")
    found = _asked(name, lambda: fs.find(key, detail=True))
    files = {
        path.removeprefix(key).lstrip("/"): entry
        for path, entry in sorted(found.items())
        if (path == key or path.startswith(key + "/")) and not path.endswith("/")
    }
    files = {path: entry for path, entry in files.items() if not path.startswith(tuple(skip))}
    if not files:
        raise UserError(f"{name}: there is no such object or folder in the bucket.")
    # Named by the generations it holds: a copy never changes, and is never taken for that of another state.
    state = json.dumps([key, *((path, entry.get("generation"), entry["size"]) for path, entry in files.items())])
    kept = (cache_folder(CACHE) or scratch_folder()) / hashlib.sha256(state.encode()).hexdigest()[:20]
    copy = kept / key.rsplit("/", 1)[-1]
    if not copy.exists():
        with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
            for path in files:
                to = Path(scratch, "copy", copy.name, path) if path else Path(scratch, "copy", copy.name)
                to.parent.mkdir(parents=True, exist_ok=True)
                _asked(name, partial(fs.get_file, f"{key}/{path}" if path else key, str(to)))
            with suppress(OSError):  # another process was first, with the same bytes
                Path(scratch, "copy").rename(kept)
    return copy


def listing(name: str) -> dict[str, int]:
    """Size of each object below a folder of a bucket, by its path there; `name` itself, if it is one, is "".

    Raises:
        UserError: a bucket that cannot be read.
    """
    fs, key = filesystem(), _key(name).rstrip("/")
    found = _asked(name, lambda: fs.find(key, detail=True))
    return {
        path.removeprefix(key).lstrip("/"): int(entry["size"])
        for path, entry in found.items()
        if (path == key or path.startswith(key + "/")) and not path.endswith("/")
    }


def _below(folder: str, path: str) -> str:
    return f"{folder}/{path}" if path else folder


def _each(do: Callable[[str], Any], paths: Iterable[str]) -> None:
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        list(threads.map(do, paths))


def download(folder: str, paths: Iterable[str], to: Path) -> None:
    """Copy objects below a folder of a bucket to where they stand below a local one; each is whole or absent.

    Raises:
        UserError: a bucket that cannot be read, or an object that is not there.
    """
    fs = filesystem()

    def get(path: str) -> None:
        whole = to / path
        whole.parent.mkdir(parents=True, exist_ok=True)
        part = whole.with_name(f".{whole.name}.part")
        _asked(folder, lambda: fs.get_file(_key(_below(folder, path)), str(part)))
        part.replace(whole)

    _each(get, paths)


def upload(folder: Path, paths: Iterable[str], to: str) -> None:
    """Copy files below a local folder to where they stand below a folder of a bucket.

    Raises:
        UserError: a bucket that cannot be written.
    """
    fs = filesystem()

    def put(path: str) -> None:
        file = folder / path
        if file.stat().st_size < _SMALL:
            write(f"{to}/{path}", file.read_bytes())
        else:
            _asked(to, lambda: fs.put_file(str(file), _key(f"{to}/{path}")))

    _each(put, paths)


def replace(folder: Path, to: str, last: str) -> None:
    """Make a folder of a bucket what a local one is; its file `last` says that the others are there, and comes last.

    Raises:
        UserError: a bucket that cannot be written.
    """
    new = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    remove(to, last, (path for path in listing(to) if path not in new))
    upload(folder, (path for path in new if path != last), to)
    upload(folder, [last], to)


def remove(folder: str, first: str, paths: Iterable[str]) -> None:
    """Delete objects below a folder of a bucket, the one that says that they are all there `first`.

    Raises:
        UserError: a bucket that cannot be written.
    """
    fs = filesystem()

    def delete(path: str) -> None:
        def ask() -> None:
            with suppress(FileNotFoundError):
                fs.rm_file(_key(_below(folder, path)))

        _asked(folder, ask)

    delete(first)
    _each(delete, (path for path in paths if path != first))


def move(folder: str, to: str, last: str) -> None:
    """Give a folder of a bucket another name, by copies; `last` says that all objects are there.

    Raises:
        UserError: a bucket that cannot be written.
    """
    fs, paths = filesystem(), list(listing(folder))
    for some in ([path for path in paths if path != last], [path for path in paths if path == last]):
        _each(lambda path: _asked(to, lambda: fs.cp_file(_key(f"{folder}/{path}"), _key(f"{to}/{path}"))), some)
    remove(folder, last, paths)


def write(name: str, content: bytes) -> None:
    """Write an object, whole or not at all.

    Raises:
        UserError: a bucket that cannot be written.
    """
    fs = filesystem()

    def ask() -> None:
        if len(content) < _SMALL:
            _put(name, content)
        else:
            fs.pipe_file(_key(name), content)

    _asked(name, ask)


def _put(name: str, content: bytes, **conditions: str) -> dict[str, Any]:
    """Write a small object in one request that is nothing but its content; gives its resource."""
    # The package sends a small object as a part between lines, where content may be taken for the end of a line.
    fs, (bucket, path) = filesystem(), _key(name).split("/", 1)
    address = fs._location + "/upload/storage/v1/b/{}/o"
    options = {"uploadType": "media", "name": path, **conditions}
    return fs.call("POST", address, bucket, data=content, json_out=True, **options)


def read(name: str) -> bytes | None:
    """An object's content, or None where there is none.

    Raises:
        UserError: a bucket that cannot be read.
    """
    fs = filesystem()

    def ask() -> bytes | None:
        with suppress(FileNotFoundError):
            return fs.cat_file(_key(name))
        return None

    return _asked(name, ask)


def _key(name: str) -> str:
    return name.removeprefix(PREFIX)


# ---- exclusion


class BucketLock:
    """Within: a folder of a bucket is this process's and no other's.

    The lock is an object that its holder renews. One that nobody renewed for a while belonged to a process that has
    gone: whoever wants it watches it for that long, by its own clock alone, and takes it.
    """

    def __init__(self, folder: str, say: Callable[[str], None] = lambda line: print(line, file=sys.stderr)):
        self.folder, self.say = folder, say
        self.bucket, self.name = _key(f"{folder}/.lock").split("/", 1)
        self.owner = {"host": socket.gethostname(), "process": os.getpid(), "token": secrets.token_hex(8)}
        self.seconds = float(os.environ.get(LOCK_SECONDS, "60"))
        self.generation = "0"
        self.ended = threading.Event()
        self.renewer = threading.Thread(target=self._renew_until_ended, name="lock", daemon=True)

    def __enter__(self) -> "BucketLock":
        if not self._put("0"):
            self._take_a_stale_one()
        self.renewer.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.ended.set()
        self.renewer.join()
        with suppress(FileNotFoundError, FileExistsError, OSError):
            self._call("DELETE", "b/{}/o/{}", self.bucket, self.name, ifGenerationMatch=self.generation)

    def _call(self, *words: str, **parameters: Any) -> Any:
        return filesystem().call(*words, **parameters)

    def _put(self, generation: str) -> bool:
        """Write the lock where it still has this generation, 0 for none; whether it had."""
        content = json.dumps(self.owner).encode()
        try:
            written = _asked(self.folder, lambda: _put(f"{self.folder}/.lock", content, ifGenerationMatch=generation))
        except FileExistsError:
            # An answer may get lost after the object was written; then what is there is ours.
            held = self._look()
            if held is None or held[1] != self.owner:
                return False
            self.generation = held[0]
            return True
        self.generation = written["generation"]
        return True

    def _look(self) -> tuple[str, dict[str, Any]] | None:
        """Generation and owner of the lock; None where there is none."""

        def ask() -> tuple[str, bytes] | None:
            with suppress(FileNotFoundError):
                generation = self._call("GET", "b/{}/o/{}", self.bucket, self.name, json_out=True)["generation"]
                return generation, self._call(
                    "GET", "b/{}/o/{}", self.bucket, self.name, alt="media", generation=generation
                )[1]
            return None

        found = _asked(self.folder, ask)
        if found is None:
            return None
        with suppress(ValueError):
            return found[0], json.loads(found[1])
        return found[0], {}

    def _take_a_stale_one(self) -> None:
        first, watched = self._look(), time.monotonic()
        told = False
        while True:
            held = self._look()
            if held is None:
                if self._put("0"):
                    return
                first, watched = self._look(), time.monotonic()
                continue
            generation, owner = held
            who = f"process {owner.get('process', '?')} on {owner.get('host', '?')}"
            if first is None or generation != first[0]:
                raise UserError(f"output_dir: {self.folder} is in use by another run that has not ended ({who}).")
            if time.monotonic() - watched > self.seconds:
                if not self._put(generation):
                    raise UserError(f"output_dir: {self.folder} was just taken by another run.")
                self.say(f"{self.folder}: the lock of {who} was not renewed for {self.seconds:g} s and is taken over.")
                return
            if not told:
                self.say(f"{self.folder}: locked by {who}; watching for {self.seconds:g} s whether it still lives.")
                told = True
            time.sleep(self.seconds / _BEATS)

    def _renew_until_ended(self) -> None:
        renewed = time.monotonic()
        while not self.ended.wait(self.seconds / _BEATS):
            try:
                if not self._put(self.generation):
                    self._lose("another run has taken it")
                renewed = time.monotonic()
            except Exception as error:  # the network, say: others take the lock only after `seconds`
                if time.monotonic() - renewed > self.seconds * (1 - 1 / _BEATS):
                    self._lose(f"it could not be renewed ({' '.join(str(error).split())})")

    def _lose(self, why: str) -> None:
        # Not one byte more may be written: no cleaning up, no last checkpoint.
        print(f"error: output_dir: {self.folder} is no longer this run's: {why}.", file=sys.stderr, flush=True)
        os._exit(1)


def scratch_for(name: str) -> Path:
    """The folder of this machine for files on their way into a bucket, which are worth nothing after a crash."""
    return (cache_folder(CACHE) or scratch_folder()) / "on-the-way" / hashlib.sha256(name.encode()).hexdigest()[:20]
