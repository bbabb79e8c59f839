"""Tokenizers, and the text of token ids behind a prompt: decode(prompt + new) minus decode(prompt).

New tokens decoded alone are another text: tokenizers strip the first space, and characters begin in one token and end
in another. Where decode(prompt) is no prefix of decode(prompt + new), because the prompt ends in half a character, what
both have in common is the prompt's text and the rest is new.
"""

import codecs
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mtp_jax.errors import BadRecord, UserError
from mtp_jax.files import starts_with_mark
from mtp_jax.locate import SETTINGS

# A byte as a token. Decoded, a run of them is text if all are UTF-8, and otherwise one replacement character for each.
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# Half a character, which a later token may complete.
_HALF = re.compile(r"\ufffd+\Z")
# What a later token may still change where decoded text is cleaned up (`clean_up_tokenization` of transformers).
_UNCLEAN = re.compile(r"(\ufffd+|( n)? {0,2}('[vr]?)?)\Z")


def added_text(tokenizer: Any, prompt: Sequence[int], new: Sequence[int], **how: Any) -> str:
    """The text that new tokens add to a prompt's; `how` is for `tokenizer.decode`."""
    before, after = tokenizer.decode(list(prompt), **how), tokenizer.decode([*prompt, *new], **how)
    return after[_shared(before, after) :]


def _shared(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class TextStream:
    """`added_text` as it comes: text is given once no later token can change it.

    Each call gives two texts: what was left of the prompt's (`prompt` is what is certain from the start), and new text.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], **how: Any):
        self.tokenizer, self.how, self.ids = tokenizer, how, list(prompt)
        self.special = set(tokenizer.all_special_ids)
        cleans = how.get("clean_up_tokenization_spaces", tokenizer.clean_up_tokenization_spaces)
        self.unsettled = _UNCLEAN if cleans else _HALF
        self.before = self._decode(len(self.ids))
        self.prompt = self._settled()
        self.given = len(self.prompt)

    def __call__(self, tokens: Sequence[int]) -> tuple[str, str]:
        """What is certain with these tokens."""
        self.ids += tokens
        return self._give(self._settled())

    def finish(self) -> tuple[str, str]:
        """What was held back, as it is."""
        return self._give(self._decode(len(self.ids)))

    def _decode(self, count: int) -> str:
        return self.tokenizer.decode(self.ids[:count], **self.how)

    def _settled(self) -> str:
        at = end = len(self.ids)
        while at and (self.ids[at - 1] in self.special or self._is_byte(self.ids[at - 1])):
            at -= 1
            end = at if self._is_byte(self.ids[at]) else end
        return self.unsettled.sub("", self._decode(end))

    def _is_byte(self, id_: int) -> bool:
        return _BYTE.fullmatch(self.tokenizer.convert_ids_to_tokens(id_) or "") is not None

    def _give(self, text: str) -> tuple[str, str]:
        border = max(self.given, _shared(self.before, text))
        old, self.given = self.given, max(self.given, len(text))
        return text[old:border], text[border:]


# ---- tokenizers


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
        except Exception as error:  # whatever the tokenizer library raises, the folder's files are at fault
            raise UserError(f"{folder}: the tokenizer cannot be loaded ({str(error).splitlines()[0]}).") from error
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


def check_characters(text: str, where: str) -> None:
    """Raise BadRecord for half a character: JSON escapes and bytes of a terminal can give it, and no text holds it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        what = (
            f"the byte 0x{code - 0xDC00:02x}, which is no UTF-8" if 0xDC80 <= code < 0xDD00 else "half a surrogate pair"
        )
        raise BadRecord(f"{where}: holds {text[error.start]!a} ({what}), which is no text.") from error


def check_ids(ids: Iterable[Any], tokenizer: Any, where: str) -> None:
    """Raise BadRecord where a tokenizer gave an id that the model has no embedding for."""
    beyond = getattr(tokenizer, "beyond", {})
    if beyond and (found := sorted(beyond.keys() & set(ids))):
        raise BadRecord(
            f"{where}: holds the token {beyond[found[0]]!r}, whose id {found[0]} is beyond the model's vocabulary."
        )
