"""Faults of the user's making, and how a command reports them."""

import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """Something the user can mend: one complete sentence per fault, saying what, where and what would be right."""

    code = 2

    def __init__(self, *faults: str):
        super().__init__("\n".join(faults))
        self.faults = faults


class BadRecord(UserError):
    """A document or prompt that cannot be used, though others beside it may be."""


class Unreachable(UserError):
    """A temporary failure, such as a lost process or an unreachable bucket: rerun the command (EX_TEMPFAIL)."""

    code = 75


class Interrupted(Exception):
    """A command that a signal ended in good order; the text says how to go on."""

    def __init__(self, text: str, number: int):
        super().__init__(text)
        self.code = 128 + number  # as shells report it


def _full_disk(error: BaseException | None) -> bool:
    # Array writers below Python report a full disk in the text of an error of their own, not as an OSError.
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL_DISK:
            return True
        if any(os.strerror(number) in str(error) for number in FULL_DISK):
            return True
        error = error.__cause__ or error.__context__
    return False


def reason(error: BaseException) -> str:
    """What an error says in its first line, and what the error says that it comes from."""
    own = next(iter(str(error).strip().splitlines()), type(error).__name__)
    cause = error.__cause__
    while cause is not None and cause.__cause__ is not None:
        cause = cause.__cause__
    return own if cause is None or reason(cause) in own else f"{own.rstrip('.: ')}: {reason(cause)}"


def faults_of(error: BaseException) -> tuple[int, tuple[str, ...]] | None:
    """Exit code and faults of an error that the user can mend or has made on purpose; None for one that is ours."""
    if isinstance(error, UserError):
        return error.code, error.faults
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, ()
    if isinstance(error, Exception) and _full_disk(error):
        name = getattr(error, "filename", None)
        where = f" (writing {name})" if name else ""
        return 2, (f"the disk is full{where}: free some space and run the command again.",)
    return None


def warn(text: str) -> None:
    """Tell the user of something that the command goes on after."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def end_at_once(code: int) -> NoReturn:
    """End the process from any thread, without waiting for another."""
    sys.stdout.flush()
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h")  # a progress bar hides the cursor
    sys.stderr.flush()
    os._exit(code)


def _say_nothing(_: object) -> None:
    pass


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main`; faults go to stderr, one line each, and end the process with exit code 2."""
    try:
        main()
        sys.stdout.flush()
        return
    except Interrupted as end:
        print(end, file=sys.stderr)
        sys.exit(end.code)
    except BrokenPipeError:  # the reader of our output (head, say) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (Exception, KeyboardInterrupt) as error:
        known = faults_of(error)
        if known is None:
            raise
    # What libraries stumble over while they are torn down after a fault (pending reads, say) is no news.
    sys.unraisablehook = _say_nothing
    code, faults = known
    for fault in faults:
        print(f"error: {' '.join(fault.split())}", file=sys.stderr)
    sys.stderr.flush()
    sys.exit(code)
