"""Faults of the user's making, and how a command reports them."""

import errno
import os
import signal
import sys
from collections.abc import Callable

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """Something the user can mend: one complete sentence per fault, saying what, where and what would be right."""

    def __init__(self, *faults: str):
        super().__init__("\n".join(faults))
        self.faults = faults


def _full_disk(error: BaseException | None) -> bool:
    # Array writers below Python report a full disk in the text of an error of their own, not as an OSError.
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL_DISK:
            return True
        if any(os.strerror(number) in str(error) for number in FULL_DISK):
            return True
        error = error.__cause__ or error.__context__
    return False


def _say_nothing(_: object) -> None:
    pass


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main`; faults go to stderr, one line each, and end the process with exit code 2."""
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        # What libraries stumble over while they are torn down after a fault (pending reads, say) is no news.
        sys.unraisablehook = _say_nothing
        faults = error.faults
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of our output (head, say) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        if not _full_disk(error):
            raise
        sys.unraisablehook = _say_nothing
        name = getattr(error, "filename", None)
        where = f" (writing {name})" if name else ""
        faults = (f"the disk is full{where}: free some space and run the command again.",)
    else:
        return
    for fault in faults:
        print(f"error: {' '.join(fault.split())}", file=sys.stderr)
    sys.stderr.flush()
    sys.exit(2)
