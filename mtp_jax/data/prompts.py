"""Prompts of a file, for the commands that continue or measure on them."""

import json
from typing import Any

from mtp_jax.data.json_lines import DataFile, JsonLines, parse
from mtp_jax.data.records import messages_of, tools_of
from mtp_jax.encoding import check_characters
from mtp_jax.errors import UserError
from mtp_jax.files import expanded


def read_prompts(file: str) -> list[Any]:
    """Prompts of a file of JSON lines: a string `prompt` or a chat's `messages`, perhaps with `tools`, on each line.

    Returns:
        For each line what `Generator.encode` takes.

    Raises:
        UserError: an unreadable file, no prompts, or a broken line, by its number.
    """
    try:
        lines = JsonLines.of_files([DataFile(str(expanded(file)), file)])
    except ValueError as error:
        raise UserError(f"--prompts {file}: cannot be read ({str(error).removeprefix(f'{file}, ')}).") from error
    prompts, faults = [], []
    for number, line in enumerate(lines):
        try:
            prompts.append(_prompt(parse(line)))
            check_characters(json.dumps(prompts[-1], ensure_ascii=False), lines.place(number))
        except ValueError as error:
            faults.append(f"{lines.place(number)}: {error}.")
        except UserError as error:
            faults += error.faults
    if faults:
        raise UserError(*faults)
    if not prompts:
        raise UserError(f"{file}: holds no prompts; each line is an object such as {{'prompt': 'def main():'}}.")
    return prompts


def _prompt(record: dict[str, Any]) -> Any:
    if isinstance(prompt := record.get("prompt"), str):
        return prompt
    column = next((name for name in ("messages", "conversations", "prompt") if record.get(name) is not None), None)
    if column is None:
        raise ValueError("needs a string 'prompt', or 'messages' with role and content")
    messages, tools = messages_of(record[column], column), tools_of(record.get("tools"), "tools")
    if not all({"content", "tool_calls"} & message.keys() for message in messages):
        raise ValueError(f"column {column!r} has a message without content")
    return messages if tools is None else {"messages": messages, "tools": tools}
