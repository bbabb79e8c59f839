"""What a record of a dataset holds: from its columns to a text, a prompt with completion, or a conversation."""

import json
from dataclasses import dataclass
from typing import Any

from mtp_jax.data.documents import Completion, Content, Conversation, Text
from mtp_jax.data.json_lines import parse
from mtp_jax.encoding import check_characters
from mtp_jax.errors import BadRecord

# Who speaks in ShareGPT's form, as chat templates call them.
_SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
_SPEAKERS |= {"user": "user", "assistant": "assistant", "model": "assistant", "system": "system"}
_SPEAKERS |= {"tool": "tool", "function_response": "tool", "observation": "tool"}


@dataclass(frozen=True, eq=False)
class Columns:
    """Which columns of a dataset make a document."""

    form: str  # of FORMS
    names: tuple[str, ...]  # the dataset's names, in the order of FORMS
    tools: str | None = None  # of a conversation
    # The dataset's types by column where it is a table: in every struct of a table are the keys of all of them.
    types: dict[str, Any] | None = None

    @property
    def wanted(self) -> list[str]:
        """All of them."""
        return [*self.names, *([] if self.tools is None else [self.tools])]

    def content(self, values: dict[str, Any] | bytes, name: str) -> Content:
        """What a record or a line of JSON holds; raises BadRecord with its name where it is none or holds another."""
        try:
            content = self._content(parse(values) if isinstance(values, bytes) else values)
        except ValueError as error:
            raise BadRecord(f"{name}: {error}.") from error
        for part in content[:2]:
            check_characters(part if isinstance(part, str) else json.dumps(part, ensure_ascii=False), name)
        return content

    def _content(self, values: dict[str, Any]) -> Text | Completion | Conversation:
        given = [self._read(values, column) for column in self.names]
        if self.form in ("conversation", "sharegpt"):
            return Conversation(messages_of(given[0], self.names[0]), self._tools(values))
        if self.form == "completion" and any(isinstance(value, list) for value in given):
            prompt, completion = map(messages_of, given, self.names)
            return Conversation(prompt + completion, self._tools(values), len(prompt))
        for column, value in zip(self.names, given, strict=True):
            if not isinstance(value, str):
                raise ValueError(f"column {column!r} should hold text, not {type(value).__name__}")
        return Text(*given) if self.form == "text" else Completion(*given)

    def _read(self, values: dict[str, Any], column: str) -> Any:
        value = values.get(column)
        return value if self.types is None else _as_written(value, self.types.get(column), column)

    def _tools(self, values: dict[str, Any]) -> list[dict[str, Any]] | None:
        return None if self.tools is None else tools_of(self._read(values, self.tools), self.tools)


def _parsed(value: Any) -> Any:
    """What a text of JSON holds; other values as they are."""
    try:
        return json.loads(value) if isinstance(value, str) and value.strip() else value
    except ValueError:
        return value


def tools_of(value: Any, column: str) -> list[dict[str, Any]] | None:
    """The tools in a record's column, as a list or a text of JSON; raises ValueError where it holds something else."""
    tools = _parsed(value)
    tools = [_parsed(tool) for tool in tools] if isinstance(tools, list) else tools or None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"column {column!r} should hold a list of tools, each a JSON schema")
    return tools


def messages_of(value: Any, column: str) -> list[dict[str, Any]]:
    """The messages in a record's column, each with a role; raises ValueError where it holds something else."""
    value = _parsed(value)
    right = "a list of messages, each with a role and a content (or from and value)"
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ValueError(f"column {column!r} should hold {right}")
    if not value:
        raise ValueError(f"column {column!r} holds no message")
    messages = []
    for number, given in enumerate(value):
        message = dict(given)
        if "role" not in message and "from" in message:
            speaker = message.pop("from")
            if speaker not in _SPEAKERS:
                raise ValueError(
                    f"column {column!r}, message {number}: from {speaker!r} is none of {', '.join(_SPEAKERS)}"
                )
            message = {"role": _SPEAKERS[speaker], "content": message.pop("value", None), **message}
        if not isinstance(message.get("role"), str) or not message["role"]:
            raise ValueError(f"column {column!r} should hold {right}; message {number} has no role")
        content = message.get("content")
        if not isinstance(content, str | list | dict | None):
            kind = type(content).__name__
            raise ValueError(f"column {column!r}, message {number}: content should be text, not {kind}")
        messages.append(message)
    return messages


def _as_written(value: Any, kind: Any, column: str) -> Any:
    """A value of a table without the keys that the table has added, which are null, to each struct of its column.

    A null that a record had there itself cannot be told from them, and goes too.
    """
    if type(kind).__name__ == "Json":  # stored as a text of JSON
        return value
    if isinstance(value, dict):
        kinds = kind if isinstance(kind, dict) else {}
        return {key: _as_written(part, kinds.get(key), column) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_as_written(part, getattr(kind, "feature", None), column) for part in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise ValueError(f"column {column!r} should hold text, not {type(value).__name__}")
