"""Scores of answers: the last number of GSM8K, the letter of MMLU, the unit tests of HumanEval and MBPP."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_SECONDS = 10  # a program may run
_MEMORY = 1 << 30  # bytes
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_BLOCK = re.compile(r"```(?:python|py)?[^\S\n]*\n(.*?)(?:```|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Score:
    """Whether an answer is right."""

    right: Callable[[str, dict[str, Any]], bool]  # of the answer's text and the record
    runs_code: bool = False  # executes what the model wrote


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _same_number(answer: str, record: dict[str, Any]) -> bool:
    wanted = _last_number(record["answer"].rsplit("####", 1)[-1])
    return wanted is not None and _last_number(answer) == wanted


def _same_letter(answer: str, record: dict[str, Any]) -> bool:
    stated = re.findall(r"answer is:?\s*\(?\**([ABCD])\b", answer) or re.findall(r"\b([ABCD])\b", answer)
    return bool(stated) and stated[-1] == "ABCD"[record["answer"]]


def code_of(answer: str) -> str:
    """The program in an answer: its first block of code, or all of it where there is none."""
    found = _BLOCK.search(answer)
    return found[1] if found else answer


def _passes_humaneval(answer: str, record: dict[str, Any]) -> bool:
    # The beginning comes first: an answer may leave out the imports, and defines the function anew.
    program = f"{record['prompt']}    pass\n\n{code_of(answer)}\n\n{record['test']}\n\ncheck({record['entry_point']})\n"
    return runs(program)


def _passes_mbpp(answer: str, record: dict[str, Any]) -> bool:
    setup = record.get("test_setup_code") or ""
    return runs("\n\n".join((code_of(answer), setup, *record["test_list"])) + "\n")


def runs(program: str) -> bool:
    """Whether a Python program ends without an error, alone in an empty folder, for at most 10 s and with 1 GiB.

    These limits stop accidents, not attacks: run it where nothing can be harmed.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-I", "-c", _LIMITED, str(_MEMORY), str(_SECONDS)]
        try:
            done = subprocess.run(
                words,
                input=program.encode("utf-8", "replace"),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=_SECONDS,
                cwd=folder,
                env={"PATH": os.defpath, "HOME": folder},
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0


# Limits are set by the process itself: doing so between fork and exec is not safe in a process with threads.
_LIMITED = """
import resource, sys
memory, seconds = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
program = sys.stdin.buffer.read().decode()
sys.stdin.close()
try:
    exec(compile(program, "answer", "exec"), {"__name__": "__main__"})
except SystemExit:  # before the tests were reached
    sys.exit(1)
"""

number = Score(_same_number)
letter = Score(_same_letter)
humaneval = Score(_passes_humaneval, runs_code=True)
mbpp = Score(_passes_mbpp, runs_code=True)
