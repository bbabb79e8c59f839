"""The text of token ids behind a prompt: decode(prompt + new) minus decode(prompt).

New tokens decoded alone are another text: tokenizers strip the first space, and characters begin in one token and end
in another. Where decode(prompt) is no prefix of decode(prompt + new), because the prompt ends in half a character, what
both have in common is the prompt's text and the rest is new.
"""

import re
from collections.abc import Sequence
from typing import Any

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
