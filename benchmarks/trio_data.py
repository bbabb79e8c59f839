"""Training documents for an adapter of trio-17m, by domain, without those that its test prompts were cut from.

    python benchmarks/trio_data.py --shared FOLDER --out runs/trio-17m
    python -m mtp_jax.regenerate --config benchmarks/trio_17m.yaml model.path=MODEL
    python -m mtp_jax.train --config benchmarks/trio_17m.yaml model.path=MODEL

Reads the running Python's standard library, and below FOLDER/data: `gsm8k/train.jsonl` (`question`, `answer`),
`gpteacher/*.json` (lists of `instruction`, `input`, `response`), `tinystories/tinystories_2M.txt` (stories separated by
<|endoftext|>), and the test prompts, `trio_prompts/DOMAIN.jsonl` for math, code, chat and story.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtp_jax.data.documents import python_stdlib

Rows = Iterator[dict[str, Any]]


def chat(question: str, answer: str) -> dict[str, Any]:
    """A row of one question and its answer."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def rows(domain: str, data: Path) -> Rows:
    """All documents of a domain."""
    if domain == "math":
        for line in (data / "gsm8k" / "train.jsonl").read_text().splitlines():
            row = json.loads(line)
            yield chat(row["question"], row["answer"])
    elif domain == "chat":
        for file in sorted((data / "gpteacher").glob("*.json")):
            for row in json.loads(file.read_text()):
                yield chat("\n".join(filter(None, (row["instruction"], row.get("input")))), row["response"])
    elif domain == "story":
        for text in (data / "tinystories" / "tinystories_2M.txt").read_text().split("<|endoftext|>"):
            if text.strip():
                yield {"text": text.strip()}
    else:
        for file in python_stdlib():
            yield {"text": file.text()}


def main() -> None:
    """Write one file per domain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="the folder that holds data/")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    data = arguments.shared / "data"
    for domain in ("math", "code", "chat", "story"):
        tests = [json.loads(line) for line in (data / "trio_prompts" / f"{domain}.jsonl").read_text().splitlines()]
        prompts = [test.get("prompt") or test["messages"][0]["content"] for test in tests]
        kept = left_out = 0
        with (arguments.out / f"{domain}.jsonl").open("w") as file:
            for row in rows(domain, data):
                text = row.get("text") or row["messages"][0]["content"]
                if any(prompt in text for prompt in prompts):
                    left_out += 1
                    continue
                kept += 1
                file.write(json.dumps(row) + "\n")
        print(f"{domain}: {kept} documents, {left_out} left out: a test prompt was cut from them")


if __name__ == "__main__":
    main()
