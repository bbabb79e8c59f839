"""A fault of the user's is one line on stderr and exit code 2; anything else keeps its traceback."""

import errno
import os
import subprocess
import sys

import pytest

from mtp_jax.errors import UserError, run_command

pytestmark = pytest.mark.quick


def raising(error):
    def main():
        raise error

    return main


def caused(error, cause):
    error.__cause__ = cause
    return error


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some/file")


@pytest.mark.parametrize(
    ("error", "lines"),
    [
        (UserError("one."), ["error: one."]),
        (UserError("one.", "two\nlines."), ["error: one.", "error: two lines."]),
        (FULL, ["error: the disk is full (writing some/file): free some space and run the command again."]),
        (
            caused(ValueError("outer"), OSError(errno.EDQUOT, "quota")),
            ["error: the disk is full: free some space and run the command again."],
        ),
        (
            ValueError(f"writer: {os.strerror(errno.ENOSPC)} [x]"),
            ["error: the disk is full: free some space and run the command again."],
        ),
    ],
)
def test_faults_are_lines_and_code_2(error, lines, capsys, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    with pytest.raises(SystemExit) as end:
        run_command(raising(error))
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines() == lines


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(errno.EIO, "disk broken"), ZeroDivisionError()])
def test_what_is_no_fault_of_the_user_is_raised(error):
    with pytest.raises(type(error)):
        run_command(raising(error))


def test_an_interrupt_ends_quietly(capsys):
    with pytest.raises(SystemExit) as end:
        run_command(raising(KeyboardInterrupt()))
    assert end.value.code == 130 and capsys.readouterr().err == ""


def test_a_reader_that_goes_away_is_no_error():
    code = "from mtp_jax.errors import run_command\nrun_command(lambda: [print('x' * 100) for _ in range(10**5)])"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(30) == 141
    assert process.stderr.read() == ""
    process.stderr.close()
