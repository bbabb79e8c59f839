"""Benchmark suites as prompts: one table says where each lies, what is asked, and how an answer is scored."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mtp_jax.data.json_lines import DataFile, JsonLines, format_of, parse
from mtp_jax.data.prompts import read_prompts
from mtp_jax.encoding import check_characters
from mtp_jax.errors import UserError, reason
from mtp_jax.evaluating import scores
from mtp_jax.files import expanded

Record = dict[str, Any]


@dataclass(frozen=True)
class Hub:
    """Where the Hugging Face hub has a suite."""

    name: str
    split: str
    config: str | None = None
    file: str | None = None  # in place of a split, where the dataset needs a script of its own


@dataclass(frozen=True)
class Suite:
    """A benchmark: one user message for each record, which the model answers."""

    title: str
    domain: str  # the paper's skill: knowledge, math, code or chat; or the task
    columns: tuple[str, ...]  # without which a record is no question
    question: Callable[[Record], str]
    hub: Hub | None = None
    metric: str | None = None
    score: scores.Score | None = None  # None where a person or a judge would have to say
    chosen: Callable[[Record], bool] = lambda record: True  # the records that belong to the suite


@dataclass(frozen=True)
class Question:
    """A prompt of a suite, as `Generator.encode` takes it, and its record, which holds the answer."""

    prompt: Any
    record: Record


@dataclass(frozen=True)
class Asked:
    """A suite with the questions that are asked of the model."""

    name: str
    suite: Suite
    source: str  # file or hub name
    questions: list[Question]
    others: list[Question]  # of the suite, that are not asked, in an order drawn by the seed


def _column(name: str) -> Callable[[Record], str]:
    return lambda record: record[name]


def _humaneval(record: Record) -> str:
    return f"Complete the following Python function.\n\n```python\n{record['prompt'].rstrip()}\n```"


def _mbpp(record: Record) -> str:
    tests = "\n".join(record["test_list"])
    return f"{record['text']}\nYour code should pass these tests:\n\n{tests}"


def _mmlu(record: Record) -> str:
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", record["choices"], strict=True))
    return f"{record['question']}\n{choices}\nThink it through, then end with: The answer is <letter>."


def _first_turn(record: Record) -> str:
    return record["turns"][0]


def _task(*categories: str) -> Callable[[Record], bool]:
    return lambda record: record.get("category") in categories


MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
_spec_bench = Suite("Spec-Bench", "", ("turns", "category"), _first_turn)
SPEC_BENCH = {
    f"spec_bench:{name}": replace(_spec_bench, title=f"Spec-Bench, {title}", domain=title, chosen=_task(*categories))
    for name, title, categories in (
        ("mt_bench", "multi-turn chat", MT_BENCH),
        ("translation", "translation", ("translation",)),
        ("summarization", "summarization", ("summarization",)),
        ("qa", "question answering", ("qa",)),
        ("math", "math", ("math_reasoning",)),
        ("rag", "retrieval", ("rag",)),
    )
}
SUITES = {
    "gsm8k": Suite(
        "GSM8K",
        "math",
        ("question", "answer"),
        _column("question"),
        Hub("openai/gsm8k", "test", "main"),
        "exact match of the last number",
        scores.number,
    ),
    "humaneval": Suite(
        "HumanEval",
        "code",
        ("prompt", "test", "entry_point"),
        _humaneval,
        Hub("openai/openai_humaneval", "test"),
        "pass@1",
        scores.humaneval,
    ),
    "mbpp": Suite(
        "MBPP",
        "code",
        ("text", "test_list", "task_id"),
        _mbpp,
        Hub("google-research-datasets/mbpp", "test", "full"),
        "pass@1",
        scores.mbpp,
        lambda record: 11 <= record["task_id"] <= 510,  # its test split, where a file holds all
    ),
    "mt_bench": Suite(
        "MT-Bench",
        "chat",
        (),
        lambda record: (record.get("turns") or record["prompt"])[0],
        Hub("HuggingFaceH4/mt_bench_prompts", "train"),
    ),
    **SPEC_BENCH,
    "alpaca_eval": Suite(
        "AlpacaEval",
        "chat",
        ("instruction",),
        _column("instruction"),
        Hub("tatsu-lab/alpaca_eval", "train", file="alpaca_eval.json"),
    ),
    "ifeval": Suite("IFEval", "chat", ("prompt",), _column("prompt"), Hub("google/IFEval", "train")),
    "mmlu": Suite(
        "MMLU",
        "knowledge",
        ("question", "choices", "answer"),
        _mmlu,
        Hub("cais/mmlu", "test", "all"),
        "exact match of the letter",
        scores.letter,
    ),
    "truthfulqa": Suite(
        "TruthfulQA",
        "knowledge",
        ("question",),
        _column("question"),
        Hub("truthfulqa/truthful_qa", "validation", "generation"),
    ),
}


def find_suites(names: Sequence[str], count: int | None, seed: int = 0) -> list[Asked]:
    """The questions of `--suite` arguments: NAME, NAME=FILE, or a FILE of prompts of your own.

    `spec_bench` stands for all of its tasks.

    Args:
        count: at most so many questions of each suite, drawn by `seed` and kept in their order; None for all.
    Raises:
        UserError: an unknown suite, an unreadable file, records that are no questions, or no hub.
    """
    found: list[Asked] = []
    for given in names:
        name, _, file = given.partition("=")
        if name == "spec_bench":
            found += [_asked(task, file, count, seed) for task in SPEC_BENCH]
        elif name in SUITES:
            found.append(_asked(name, file, count, seed))
        elif not file and (expanded(given).exists() or re.search(r"\.(jsonl?|gz|zst)$", given)):
            if not expanded(given).is_file():
                raise UserError(f"--suite {given}: no such file.")
            stem = Path(given).name.split(".")[0]
            own = Suite(stem, stem, (), lambda record: "")
            questions = [Question(prompt, {}) for prompt in read_prompts(given)]
            found.append(Asked(stem, own, Path(given).name, *_split(questions, count, seed)))
        else:
            known = ", ".join((*(n for n in SUITES if ":" not in n), "spec_bench", *SPEC_BENCH))
            raise UserError(f"--suite {given}: unknown; give a file of prompts, or one of {known}.")
    twice = [asked.name for asked in found]
    for name in sorted({name for name in twice if twice.count(name) > 1}):
        raise UserError(f"--suite: {name} is given twice; results are listed by name.")
    return found


def _asked(name: str, file: str, count: int | None, seed: int) -> Asked:
    suite = SUITES[name]
    if file:
        where, records = f"--suite {name}={file}", list(_records(name, file))
    elif suite.hub is None:
        raise UserError(f"--suite {name}: is not on the hub; give its file: --suite {name}=question.jsonl.")
    else:
        where, records = f"--suite {name}", _hub_records(name, suite.hub)
    questions = []
    for number, record in enumerate(records):
        if missing := [column for column in suite.columns if record.get(column) is None]:
            raise UserError(
                f"{where}: record {number + 1} has no {missing[0]!r}; {name} needs {', '.join(suite.columns)}."
            )
        if not suite.chosen(record):
            continue
        try:
            text = suite.question(record)
        except (TypeError, KeyError, IndexError, ValueError) as error:
            raise UserError(f"{where}: record {number + 1} is not one of {name} ({reason(error)}).") from error
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}: record {number + 1} asks nothing: its question is empty or no text.")
        check_characters(text, f"{where}: record {number + 1}")
        questions.append(Question([{"role": "user", "content": text}], record))
    if not questions:
        raise UserError(f"{where}: holds no question of {name} ({len(records)} records).")
    source = Path(file).name if file or suite.hub is None else suite.hub.name
    return Asked(name, suite, source, *_split(questions, count, seed))


def _split(questions: list[Question], count: int | None, seed: int) -> tuple[list[Question], list[Question]]:
    """The questions that are asked, and the others."""
    if count is None or count >= len(questions):
        return questions, []
    order = np.random.default_rng(seed).permutation(len(questions))
    return [questions[i] for i in sorted(order[:count])], [questions[i] for i in order[count:]]


def _records(name: str, file: str) -> Iterator[Record]:
    """Records of a local file of any format."""
    where, path = f"--suite {name}={file}", expanded(file)
    if not path.is_file():
        raise UserError(f"{where}: no such file.")
    if format_of(path.name) in ("json", "csv"):
        try:
            lines = JsonLines.of_files([DataFile(str(path), path.name)])
        except ValueError as error:
            raise UserError(f"{where}: cannot be read ({reason(error)}).") from error
        for number, line in enumerate(lines):
            try:
                yield parse(line)
            except ValueError as error:
                raise UserError(f"{lines.place(number)}: {error}.") from error
        return
    from datasets import load_dataset

    try:
        yield from load_dataset(format_of(path.name) or "json", data_files=str(path), split="train")
    except Exception as error:  # whatever the library raises, the file is at fault
        raise UserError(f"{where}: cannot be read ({reason(error)}).") from error


def _hub_records(name: str, hub: Hub) -> list[Record]:
    from datasets import load_dataset

    try:
        if hub.file:
            data = load_dataset("json", data_files=f"hf://datasets/{hub.name}/{hub.file}", split="train")
        else:
            data = load_dataset(hub.name, hub.config, split=hub.split)
        return list(data)
    except Exception as error:  # of the network, the hub or the dataset
        raise UserError(
            f"--suite {name}: the Hugging Face hub did not give {hub.name} ({reason(error)}); with a local file: "
            f"--suite {name}=FILE."
        ) from error
