"""The processes of a run: the environment names them, the first speaks for all of them, and they end together.

They exchange messages through the key-value store of JAX's coordination service, which needs no device.
"""

import contextlib
import ctypes
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
from jax._src import distributed  # the service's client has no public name

from mtp_jax.errors import Interrupted, UserError, end_at_once, faults_of, warn

HEARTBEAT = "MTP_JAX_HEARTBEAT_SECONDS"
ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
LOST = 75  # exit code where another process was lost, a temporary failure (EX_TEMPFAIL): rerun the command
_SECONDS = 60.0  # without a heartbeat until a process counts as lost
_JOIN_SECONDS = 300  # that processes wait for each other at the start
_BEATS = 6  # heartbeats in that time
_FAREWELL_SECONDS = 10.0  # that the first process, which holds the service, waits for the others to end
_END = "mtp_jax/end"
_VALUES, _turn = "mtp_jax/value", itertools.count()

T = TypeVar("T")


# ---- joining


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Within: this process is one of those that the environment names, or alone; a fault in one ends all.

    Raises:
        UserError: wrong or missing environment variables, or processes that cannot be reached.
    """
    seconds = _heartbeat()
    if not _join(seconds):
        yield
        return
    watch = _Watch(seconds)
    try:
        yield
    except Interrupted:
        watch.finish()
        raise
    except BaseException as error:
        watch.fail(error)
    watch.finish()


def _heartbeat() -> float:
    said = os.environ.get(HEARTBEAT, str(_SECONDS))
    try:
        seconds = float(said)
    except ValueError:
        seconds = -1.0
    if not 1 <= seconds <= 3600:
        raise UserError(f"{HEARTBEAT}={said!r} should be a number of seconds from 1 to 3600.")
    return seconds


def _join(seconds: float) -> bool:
    """Join the other processes before anything touches a device; whether there are any."""
    named = {name: os.environ[name] for name in (ADDRESS, COUNT, INDEX) if os.environ.get(name)}
    if jax.distributed.is_initialized():
        return jax.process_count() > 1
    if named.get(COUNT) == "1":  # alone, whatever cluster the machine is in
        return False
    plain = _plain(named) if COUNT in named or INDEX in named else {}
    jax.config.update("jax_enable_preemption_service", False)  # it would intercept SIGTERM
    _when_jax_gives_up(f"the processes of this run did not all join within {_JOIN_SECONDS} s.")
    try:
        # JAX's own heartbeat ends a process without a readable message, so ours must come first.
        jax.distributed.initialize(
            heartbeat_timeout_seconds=int(1.25 * seconds + 5), initialization_timeout=_JOIN_SECONDS, **plain
        )
    except Exception as error:
        _when_jax_gives_up(None)
        reason = str(error).strip().splitlines()[0]
        if not named and ("coordinator_address should be" in reason or "must be called before" in reason):
            return False  # no cluster here, or the caller has used its devices already
        missing = ", ".join(name for name in (ADDRESS, COUNT, INDEX) if name not in named)
        if named and missing:
            reason = f"{missing} missing, and no cluster found that supplies it ({reason})"
        raise UserError(
            f"the processes of this run cannot be joined: {reason}. Set all three of {ADDRESS}, {COUNT} "
            f"and {INDEX}, or {COUNT}=1 for a run of one process."
        ) from error
    if distributed.global_state.num_processes == 1:
        _when_jax_gives_up(None)
        return False
    return True


def _plain(named: dict[str, str]) -> dict[str, Any]:
    """Arguments from the three variables; where the count or the index is set, all three are needed."""
    faults = [f"{name} is missing beside {', '.join(named)}." for name in (ADDRESS, COUNT, INDEX) if name not in named]
    for name in (COUNT, INDEX):
        if not named.get(name, "0").isdecimal():
            faults.append(f"{name}={named[name]!r} should be a whole number.")
    if not re.fullmatch(r".+:\d+", named.get(ADDRESS, "host:1")):
        faults.append(f"{ADDRESS}={named[ADDRESS]!r} should be HOST:PORT, where process 0 can be reached.")
    if not faults and int(named[INDEX]) >= int(named[COUNT]):
        faults.append(f"{INDEX}={named[INDEX]} should be from 0 to {COUNT} - 1 = {int(named[COUNT]) - 1}.")
    if faults:
        raise UserError(*faults)
    return {
        "coordinator_address": named[ADDRESS],
        "num_processes": int(named[COUNT]),
        "process_id": int(named[INDEX]),
        "cluster_detection_method": "deactivate",
    }


# ---- speaking


def is_first() -> bool:
    """Whether this process writes the records and reports to the terminal."""
    return jax.process_index() == 0


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns in the first process, which JSON must be able to hold; all processes call this and wait."""
    if jax.process_count() == 1:
        return make()
    client, key = _client(), f"{_VALUES}/{next(_turn)}"
    if is_first():
        value = make()
        client.key_value_set(key, json.dumps(value))
        return value
    return _wait_for(key)


def to_first(about: str, value: T) -> list[T]:
    """In the first process, the values of all processes, which JSON must be able to hold; in others only their own.

    All processes call this, once per `about`, and only the first one waits.
    """
    if jax.process_count() == 1:
        return [value]
    client, key = _client(), f"mtp_jax/about/{about}"
    if not is_first():
        client.key_value_set(f"{key}/{jax.process_index()}", json.dumps(value))
        return [value]
    return [value, *(_wait_for(f"{key}/{i}") for i in range(1, jax.process_count()))]


def _wait_for(key: str) -> Any:
    while True:
        with contextlib.suppress(_TimeUp), _timeouts():
            return json.loads(_client().blocking_key_value_get(key, 60_000))


def _client() -> Any:
    return distributed.global_state.client


class _TimeUp(Exception):
    """The value is not there yet."""


@contextlib.contextmanager
def _timeouts() -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise _TimeUp from error


_streams: dict[str, int] = {}  # "terminal": where stderr went before it went to a log


def log_to(folder: Path) -> None:
    """From now on the output of this process goes to a log of its own; the first keeps the terminal.

    Raises:
        UserError: a folder that cannot be written.
    """
    if is_first():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = os.open(folder / f"process-{jax.process_index()}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    except OSError as error:
        raise UserError(f"output_dir: {folder} cannot be written ({error.strerror}).") from error
    sys.stdout.flush()
    sys.stderr.flush()
    _streams["terminal"] = os.dup(2)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


# ---- ending together


class _Watch:
    """A thread that sends heartbeats, looks for those of others, and waits for the message that ends all."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.client = _client()
        self.index, self.count = distributed.global_state.process_id, distributed.global_state.num_processes
        self.heard = {i: ("", time.monotonic()) for i in range(self.count)}
        _when_jax_gives_up(None if self.index == 0 else _FIRST_IS_LOST)
        self.thread = threading.Thread(target=self._watch, name="processes", daemon=True)
        self.thread.start()

    def finish(self) -> None:
        """This process is done; returns when the first process is."""
        if self.index == 0:
            self._say(0)
        self.thread.join()

    def fail(self, error: BaseException) -> NoReturn:
        """End all processes because of an error in this one."""
        known = faults_of(error)
        if known is None:
            fault = f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
            if _comes_from_jax(error):  # most likely another process was lost: let the heartbeat find out which
                warn(f"{fault}; waiting for heartbeats of the other processes.")
                self.thread.join(self.seconds * (1 + 2 / _BEATS) + 5)
            traceback.print_exception(error)
            known = 1, (fault,)
        self._say(*known)
        self.thread.join()
        end_at_once(known[0])

    def _say(self, code: int, faults: tuple[str, ...] = (), lost: int | None = None) -> None:
        message = {"code": code, "faults": faults, "by": self.index, "lost": lost}
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first
            self.client.key_value_set(_END, json.dumps(message))

    def _watch(self) -> None:
        for beat in itertools.count():
            try:
                with _timeouts():
                    self.client.key_value_set(f"mtp_jax/beat/{self.index}", str(beat), allow_overwrite=True)
                    if self.index == 0:
                        self._look_for_the_lost()
                    message = json.loads(self.client.blocking_key_value_get(_END, int(1000 * self.seconds / _BEATS)))
            except _TimeUp:
                continue
            except jax.errors.JaxRuntimeError:  # without the service, JAX ends this process
                time.sleep(self.seconds / _BEATS)
                continue
            if message["code"] != 0:
                self._end(message)
            return

    def _look_for_the_lost(self) -> None:
        now = time.monotonic()
        for key, beat in self.client.key_value_dir_get("mtp_jax/beat/"):
            i = int(key.rsplit("/", 1)[-1])
            if self.heard[i][0] != beat:
                self.heard[i] = beat, now
        for i, (_, last) in self.heard.items():
            if now - last > self.seconds:
                fault = (
                    f"process {i} of {self.count} is lost: no heartbeat for {self.seconds:g} s. All others end; "
                    "rerun the command in all processes to continue from the last checkpoint."
                )
                self._say(LOST, (fault,), lost=i)

    def _end(self, message: dict[str, Any]) -> NoReturn:
        if self.index == 0 or "terminal" in _streams:  # the first reports for those that have no log yet
            whose = "" if message["by"] == 0 else f"process {message['by']}: "
            for fault in message["faults"]:
                print(f"error: {whose}{' '.join(fault.split())}", file=sys.stderr)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self.client.key_value_set(f"mtp_jax/bye/{self.index}", "")
            until = time.monotonic() + _FAREWELL_SECONDS
            for i in range(1, self.count if self.index == 0 else 0):
                if i != message["lost"]:
                    left = max(int(1000 * (until - time.monotonic())), 1)
                    self.client.blocking_key_value_get(f"mtp_jax/bye/{i}", left)
        end_at_once(message["code"])


def _comes_from_jax(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


_FIRST_IS_LOST = (
    "the first process, which coordinates the others, is lost or cannot be reached. This process ends; rerun the "
    "command in all processes to continue from the last checkpoint."
)
_last_message = [""]


def _give_up(_: int) -> None:
    for stream in {2, _streams.get("terminal", 2)}:
        with contextlib.suppress(OSError):
            os.write(stream, f"error: {_last_message[0]}\n".encode())
    os._exit(LOST)


_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)
_give_up_in_c = _handler(_give_up)


def _when_jax_gives_up(message: str | None) -> None:
    """Print `message` before JAX, unable to reach the service, ends the process; None leaves that to JAX."""
    # JAX aborts the process from a thread of its own, and accepts no Python callback to call first. A Python signal
    # handler would only note the signal, and abort() proceeds as soon as a handler returns.
    _last_message[0] = message or ""
    ctypes.CDLL(None).signal(int(signal.SIGABRT), _give_up_in_c if message else _handler(int(signal.SIG_DFL)))
