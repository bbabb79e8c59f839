"""Tokenizers, and what they make of texts and conversations: the same where a model is trained and where it is used."""

import codecs
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mtp_jax.errors import BadRecord, UserError, reason
from mtp_jax.files import starts_with_mark
from mtp_jax.locate import SETTINGS


def load_tokenizer(folder: Path, vocabulary: int) -> Any:
    """A folder's tokenizer, checked against the size of a model's vocabulary.

    Added tokens may lie beyond it, as long as no text has them (`check_ids`): `beyond` holds them, by id.

    Raises:
        UserError: no tokenizer, one that needs code from the folder, or other ids beyond the vocabulary.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(f"{folder}: holds no tokenizer (tokenizer.json, tokenizer.model or vocab.json).")
    with tempfile.TemporaryDirectory() as copy:
        marked = any(starts_with_mark(file) for file in folder.glob("*.json"))
        try:
            readable = _without_marks(folder, Path(copy)) if marked else folder
            tokenizer = AutoTokenizer.from_pretrained(str(readable), local_files_only=True, trust_remote_code=False)
            tokenizer.decode(tokenizer("a")["input_ids"])  # settings of the wrong kind show only now
        except Exception as error:  # whatever the tokenizer library raises, the folder's files are at fault
            raise UserError(f"{folder}: the tokenizer cannot be loaded ({reason(error)}).") from error
    beyond = {id_: token for token, id_ in tokenizer.get_vocab().items() if id_ >= vocabulary}
    others = sorted(beyond.items() - {(id_, token) for token, id_ in tokenizer.get_added_vocab().items()})
    if others:
        raise UserError(
            f"{folder}: the tokenizer has id {others[-1][0]} ({others[-1][1]!r}), but the model's vocabulary ends at "
            f"{vocabulary - 1}; tokenizer and model do not belong together."
        )
    tokenizer.beyond = beyond
    return tokenizer


def _without_marks(folder: Path, copy: Path) -> Path:
    (copy / "additional_chat_templates").mkdir()
    for pattern in (*SETTINGS, "additional_chat_templates/*.jinja"):
        for file in folder.glob(pattern):
            (copy / file.relative_to(folder)).write_bytes(file.read_bytes().removeprefix(codecs.BOM_UTF8))
    return copy


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer adds before a text and after it."""

    def inside(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    text = "a" if inside("a") else next(filter(inside, tokenizer.get_vocab()))
    inner, whole = inside(text), tokenizer(text)["input_ids"]
    start = next((i for i in range(len(whole)) if whole[i : i + len(inner)] == inner), 0)
    return whole[:start], whole[start + len(inner) :]


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that is to be continued: what begins a text stands there once, and nothing ends it."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    before, _ = special_tokens(tokenizer)
    return list(ids) if ids[: len(before)] == before else [*before, *ids]


def render_chat(
    tokenizer: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, prompt: bool = False
) -> str:
    """A conversation as the tokenizer's chat template writes it, special tokens included.

    Args:
        tokenizer: Has a chat template.
        messages: Each with a role.
        tools: JSON schemas of functions, for templates that list them.
        prompt: Whether to end where the assistant begins to answer.

    Raises:
        BadRecord: the template refuses the conversation, with its reason.
    """
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, tokenize=False)
    except Exception as error:  # a template is a program of its own, and may raise whatever it likes
        raise BadRecord(refusal(error)) from error


def refusal(error: Exception) -> str:
    """What a chat template's error says, in a sentence."""
    return f"the chat template refuses the conversation ({reason(error).rstrip('.')})."


def check_characters(text: str, where: str) -> None:
    """Raise BadRecord for half a character: JSON escapes and bytes of a terminal can give it, and no text holds it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        byte = 0xDC80 <= code < 0xDD00
        what = f"the byte 0x{code - 0xDC00:02x}, which is no UTF-8" if byte else "half a surrogate pair"
        raise BadRecord(f"{where}: holds {text[error.start]!a} ({what}), which is no text.") from error


def check_ids(ids: Iterable[Any], tokenizer: Any, where: str) -> None:
    """Raise BadRecord where a tokenizer gave an id that the model has no embedding for."""
    beyond = getattr(tokenizer, "beyond", {})
    if beyond and (found := sorted(beyond.keys() & set(ids))):
        raise BadRecord(
            f"{where}: holds the token {beyond[found[0]]!r}, whose id {found[0]} is beyond the model's vocabulary."
        )
