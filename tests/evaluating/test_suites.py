"""Suites: what is asked of the model, which records belong to one, and how faults are told."""

import gzip
import json

import pytest

from mtp_jax.errors import UserError
from mtp_jax.evaluating.suites import SUITES, find_suites

pytestmark = pytest.mark.quick

GSM8K = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(6)]
HUMANEVAL = [
    {"prompt": 'def one():\n    """Return 1."""\n', "test": "def check(f): assert f() == 1", "entry_point": "one"}
]
MBPP = [{"text": "Write one.", "test_list": ["assert one() == 1"], "task_id": n} for n in (2, 11, 510, 601)]
SPEC_BENCH = [
    {"question_id": n, "category": name, "turns": [f"{name} {n}", "and then?"]}
    for n, name in enumerate(("writing", "coding", "translation", "qa", "math_reasoning", "rag", "summarization"))
]


@pytest.fixture
def write(tmp_path):
    """A function that writes records as JSON lines and returns the file."""

    def to_file(records, name="records.jsonl"):
        text = "".join(json.dumps(record) + "\n" for record in records).encode()
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
        return tmp_path / name

    return to_file


def questions(asked):
    return [question.prompt[0]["content"] for question in asked.questions]


def test_each_record_is_a_question_to_the_model(write):
    (gsm8k, code) = find_suites([f"gsm8k={write(GSM8K)}", f"humaneval={write(HUMANEVAL, 'HumanEval.jsonl.gz')}"], None)
    assert questions(gsm8k) == [record["question"] for record in GSM8K] and gsm8k.source == "records.jsonl"
    assert [question.record for question in gsm8k.questions] == GSM8K
    assert questions(code)[0].endswith('```python\ndef one():\n    """Return 1."""\n```')


def test_only_the_test_split_of_mbpp_is_asked(write):
    (mbpp,) = find_suites([f"mbpp={write(MBPP)}"], None)
    assert [question.record["task_id"] for question in mbpp.questions] == [11, 510]
    assert "assert one() == 1" in questions(mbpp)[0]


def test_spec_bench_is_asked_by_task(write):
    file = write(SPEC_BENCH)
    tasks = {asked.name: questions(asked) for asked in find_suites([f"spec_bench={file}"], None)}
    assert tasks.pop("spec_bench:mt_bench") == ["writing 0", "coding 1"]
    assert tasks == {
        f"spec_bench:{task}": [f"{name} {n}"]
        for n, (task, name) in enumerate(
            [("translation",) * 2, ("qa",) * 2, ("math", "math_reasoning"), ("rag",) * 2, ("summarization",) * 2], 2
        )
    }
    (qa,) = find_suites([f"spec_bench:qa={file}"], None)
    assert questions(qa) == ["qa 3"]


def test_both_forms_of_mt_bench(write):
    for column in ("turns", "prompt"):
        (asked,) = find_suites([f"mt_bench={write([{column: ['first', 'second']}])}"], None)
        assert questions(asked) == ["first"]


def test_choices_are_lettered(write):
    record = {"question": "Which?", "choices": ["w", "x", "y", "z"], "answer": 2}
    (asked,) = find_suites([f"mmlu={write([record])}"], None)
    assert "Which?\nA. w\nB. x\nC. y\nD. z\n" in questions(asked)[0]


def test_a_file_of_prompts_is_a_suite_of_its_own(write):
    (asked,) = find_suites([str(write([{"prompt": "def f():"}], "mine.jsonl"))], None)
    assert (asked.name, asked.source, asked.questions[0].prompt) == ("mine", "mine.jsonl", "def f():")


def test_some_questions_are_drawn_by_the_seed_and_keep_their_order(write):
    file = write(GSM8K)
    first, again, other = (questions(find_suites([f"gsm8k={file}"], 3, seed)[0]) for seed in (0, 0, 1))
    every = [record["question"] for record in GSM8K]
    assert first == again == sorted(first, key=every.index) and len(first) == 3
    assert first != other
    (asked,) = find_suites([f"gsm8k={file}"], 3)
    assert sorted(first + [q.record["question"] for q in asked.others]) == sorted(every)


@pytest.mark.parametrize(
    ("given", "records", "said"),
    [
        ("gsm9k", None, "unknown; give a file of prompts, or one of gsm8k, humaneval"),
        ("gsm8k=missing.jsonl", None, "no such file"),
        ("missing.jsonl", None, "--suite missing.jsonl: no such file"),
        ("spec_bench:qa", None, "is not on the hub; give its file"),
        ("gsm8k={file}", [*GSM8K, {"question": "How?"}], "record 7 has no 'answer'; gsm8k needs question, answer"),
        ("gsm8k={file}", [{"question": " ", "answer": "1"}], "record 1 asks nothing"),
        ("mbpp={file}", MBPP[:1], "holds no question of mbpp (1 records)"),
        ("mt_bench={file}", [{"text": "?"}], "record 1 is not one of mt_bench ('prompt')"),
        ("mmlu={file}", [{"question": "?", "choices": ["w"], "answer": 0}], "record 1 is not one of mmlu"),
        ("gsm8k={file}", [1], "line 1"),
    ],
)
def test_faults_are_told(write, given, records, said):
    given = given if records is None else given.format(file=write(records))
    with pytest.raises(UserError) as error:
        find_suites([given], None)
    assert len(error.value.faults) == 1 and said in str(error.value)


def test_a_suite_given_twice_is_refused(write):
    with pytest.raises(UserError, match="gsm8k is given twice"):
        find_suites([f"gsm8k={write(GSM8K)}"] * 2, None)


def test_without_a_hub_the_message_says_how_to_do_without(monkeypatch):
    with pytest.raises(UserError, match=r"hub did not give openai/gsm8k.*--suite gsm8k=FILE"):
        find_suites(["gsm8k"], None)


def test_every_suite_of_the_hub_has_a_name_that_says_who_keeps_it():
    assert all(suite.hub is None or suite.hub.name.count("/") == 1 for suite in SUITES.values())
    assert all(suite.hub is not None for name, suite in SUITES.items() if not name.startswith("spec_bench:"))
