"""Prompts of a JSONL file, for the commands that continue or measure on them."""

import json
from pathlib import Path
from typing import Any

from mtp_jax.encoding import check_characters
from mtp_jax.errors import UserError


def read_prompts(file: str) -> list[Any]:
    """Prompts of a JSONL file, a string `prompt` or a chat's `messages` on each line.

    Raises:
        UserError: an unreadable file, no prompts, or a broken line, by its number.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")  # splitlines would also cut inside a text
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {file}: cannot be read ({getattr(error, 'strerror', None) or error}).") from error
    prompts, faults = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            prompts.append(_prompt(json.loads(line)))
            check_characters(json.dumps(prompts[-1], ensure_ascii=False), where)
        except (ValueError, RecursionError) as error:
            faults.append(f"{where}: {error}.")
        except UserError as error:
            faults += error.faults
    if faults:
        raise UserError(*faults)
    if not prompts:
        raise UserError(f"{file}: holds no prompts; each line is an object such as {{'prompt': 'def main():'}}.")
    return prompts


def _prompt(record: Any) -> Any:
    if isinstance(record, dict):
        if isinstance(prompt := record.get("prompt"), str):
            return prompt
        messages = record.get("messages")
        if isinstance(messages, list) and all(
            isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages
        ):
            return messages
    raise ValueError("needs a string 'prompt', or 'messages' with role and content")
