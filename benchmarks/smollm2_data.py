"""Prompts for an adapter of SmolLM2-135M-Instruct, by domain, and what to evaluate it on.

    python benchmarks/smollm2_data.py --data FOLDER --out runs/smollm2-data
    python benchmarks/smollm2.py --out runs/SmolLM2-135M-Instruct
    python -m mtp_jax.regenerate --config configs/smollm2_135m.yaml
    python -m mtp_jax.train --config configs/smollm2_135m.yaml

Only prompts are trained on: the model writes the answers itself. With `--answers`, for configs/paper_smollm2_135m.yaml,
answers are those of the data, and prompts without one are left out.

FOLDER holds `gsm8k/train.jsonl` (`question`, `answer`), `mbpp/mbpp.jsonl` (`task_id`, `text`, `test_list`, `code`),
`gpteacher/*.json` (`instruction`, `input`, `response`), and `tinystories/tinystories_2M.txt` (stories between
<|endoftext|>); code comes from the running Python's standard library too. The last 473 records of GSM8K's train split
are kept back: `gsm8k_held_out.jsonl` is for `mtp_jax.evaluate --suite gsm8k=FILE`. Of MBPP only its train split, tasks
601 to 974, is used.
"""

import argparse
import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtp_jax.data.documents import python_stdlib
from mtp_jax.errors import run_command
from mtp_jax.evaluating.suites import SUITES

_HELD_OUT = 473
_STORIES = 600
_FUNCTIONS = 1000


Asked = tuple[str, str | None]  # a question, and the data's answer where there is one


def math(data: Path) -> Iterator[Asked]:
    """Questions of GSM8K."""
    lines = (data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    for line in lines[:-_HELD_OUT]:
        row = json.loads(line)
        yield SUITES["gsm8k"].question(row), row["answer"]


def code(data: Path) -> Iterator[Asked]:
    """Tasks of MBPP's train split and of GPTeacher, and functions of the standard library to complete."""
    for line in (data / "mbpp" / "mbpp.jsonl").read_text(encoding="utf-8").splitlines():
        if 601 <= (row := json.loads(line))["task_id"] <= 974:
            yield SUITES["mbpp"].question(row), _fenced(row["code"])
    yield from gpteacher(data / "gpteacher" / "codegen-instruct.json")
    yield from functions()


def functions() -> Iterator[Asked]:
    """Beginnings of documented functions of the standard library, asked for as HumanEval's."""
    found = 0
    for file in python_stdlib():
        text = file.text()
        lines = text.splitlines(keepends=True)
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef) or ast.get_docstring(node) is None or len(node.body) < 2:
                continue
            beginning = "".join(lines[node.lineno - 1 : node.body[0].end_lineno])
            if 80 < len(beginning) < 700 and found < _FUNCTIONS:
                found += 1
                whole = "".join(lines[node.lineno - 1 : node.end_lineno])
                yield SUITES["humaneval"].question({"prompt": beginning}), _fenced(whole)


def chat(data: Path) -> Iterator[Asked]:
    """Role play of GPTeacher, and stories to retell."""
    yield from gpteacher(data / "gpteacher" / "roleplay-instruct.json")
    stories = (data / "tinystories" / "tinystories_2M.txt").read_text(encoding="utf-8").split("<|endoftext|>")
    for story in stories[:_STORIES]:
        yield f"Summarize the following story in two sentences.\n\n{story.strip()}", None


def gpteacher(file: Path) -> Iterator[Asked]:
    """Instructions, each with its input."""
    for row in json.loads(file.read_text(encoding="utf-8")):
        yield "\n".join(filter(None, (row["instruction"], row.get("input")))), row["response"]


def _fenced(source: str) -> str:
    return f"```python\n{source.strip().replace(chr(13), '')}\n```"


def record(question: str, answer: str = "...") -> dict[str, Any]:
    """A chat; where the model is to write the answer, what stands there is not trained on."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def main() -> None:
    """Write one file per domain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--answers", action="store_true", help="the data's answers, for the paper's recipe")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    for domain in (math, code, chat):
        asked = list(domain(a.data))
        records = (
            [record(question, answer) for question, answer in asked if answer]
            if a.answers
            else [record(question) for question, _ in asked]
        )
        with (a.out / f"{domain.__name__}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in records)
        print(f"{domain.__name__}: {len(records)} prompts")
    lines = (a.data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()[-_HELD_OUT:]
    (a.out / "gsm8k_held_out.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"gsm8k_held_out.jsonl: {_HELD_OUT} records that are not trained on")


if __name__ == "__main__":
    run_command(main)
