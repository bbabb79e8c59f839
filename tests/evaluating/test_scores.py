"""Scores: right answers count, wrong ones do not, and programs that a model wrote can do little."""

import pytest

from mtp_jax.evaluating import scores


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("6 * 7 = 42, so she has 42 apples.", True),
        ("**Answer:** $1,042.00 of 42", True),
        ("It is 42.0", True),
        ("42 or rather 43", False),
        ("forty-two", False),
    ],
)
def test_the_last_number_counts(answer, right):
    assert scores.number.right(answer, {"answer": "6 * 7 = <<6*7=42>>42\n#### 42"}) == right


def test_negative_and_long_numbers():
    assert scores.number.right("so it is -1,200", {"answer": "#### -1200"})
    assert not scores.number.right("so it is 1,200", {"answer": "#### -1200"})


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("The answer is C.", True),
        ("A or B? The answer is: **C**", True),
        ("B and then C", True),
        ("The answer is A", False),
        ("", False),
    ],
)
def test_the_stated_letter_counts(answer, right):
    assert scores.letter.right(answer, {"answer": 2}) == right


HUMANEVAL = {
    "prompt": 'import math\n\ndef area(r):\n    """The area of a circle."""\n',
    "test": "def check(f):\n    assert abs(f(1) - math.pi) < 1e-6",
    "entry_point": "area",
}
RIGHT = "def area(r):\n    return math.pi * r * r\n"


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (f"Here it is:\n\n```python\n{RIGHT}```\nIt works.", True),
        (f"```\n{RIGHT}", True),
        (RIGHT, True),
        ("```python\ndef area(r):\n    return 3 * r\n```", False),
        ("I cannot.", False),
        ("```python\nimport sys\nsys.exit(0)\n```", False),
        ("```python\nwhile True:\n    pass\n```", False),
        ("```python\nx = bytearray(1 << 31)\n" + RIGHT + "```", False),
        ("```python\ninput()\n" + RIGHT + "```", False),
    ],
)
def test_a_function_is_run_against_its_tests(answer, right, monkeypatch):
    monkeypatch.setattr(scores, "_SECONDS", 2)
    assert scores.humaneval.right(answer, HUMANEVAL) == right


def test_mbpp_runs_the_program_and_then_its_tests():
    record = {"test_list": ["assert twice(2) == 4", "assert twice(0) == ZERO"], "test_setup_code": "ZERO = 0"}
    assert scores.mbpp.right("```python\ndef twice(x):\n    return 2 * x\n```", record)
    assert not scores.mbpp.right("```python\ndef twice(x):\n    return x * x + (x == 0)\n```", record)


def test_programs_run_in_an_empty_folder_without_our_environment(monkeypatch):
    monkeypatch.setenv("A_SECRET", "1")
    assert scores.runs("import os\nassert not os.listdir('.') and 'A_SECRET' not in os.environ")
