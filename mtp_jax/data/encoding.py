"""From an example to its tokens, each with the word whether it is to be predicted."""

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from mtp_jax.data.chat import ChatTemplate
from mtp_jax.data.examples import Completion, Conversation, Example
from mtp_jax.errors import UserError


class Encoded(NamedTuple):
    """The tokens of an example."""

    tokens: Int[np.ndarray, " n"]  # int32
    supervised: Bool[np.ndarray, " n"]  # whether a token is to be predicted
    rewritten: int = 0  # assistant turns that are not supervised, see `chat.Rendered`


class Encoder:
    """A tokenizer with its chat template, which is looked at when the first conversation comes."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    @cached_property
    def chat(self) -> ChatTemplate:
        """The chat template; raises UserError where there is none."""
        return ChatTemplate(self.tokenizer)

    def __call__(self, example: Example) -> Encoded:
        """Texts and completions end with the end-of-text token, conversations as the template ends them.

        Raises:
            UserError: the example cannot be read or does not fit the chat template.
        """
        content = example.content()
        if isinstance(content, Conversation):
            template = self.chat
            try:
                chat = template.render(content.messages)
            except UserError as error:
                raise UserError(*(f"{example.name}: {fault}" for fault in error.faults)) from error
            # The template writes special tokens itself, and ends a turn in its own way.
            ids = self._ids(chat.text, add_special_tokens=False)
            supervised = self._within(chat.text, ids, chat.spans)
            return Encoded(np.asarray(ids, np.int32), supervised, chat.rewritten)
        text = "".join(content)
        ids = self._ids(text)
        supervised = np.ones(len(ids), bool)
        if isinstance(content, Completion):
            supervised[: _agree(ids, self._ids(content.prompt))] = False
        if (end := self.tokenizer.eos_token_id) is not None:
            ids, supervised = [*ids, end], np.append(supervised, True)
        return Encoded(np.asarray(ids, np.int32), supervised)

    def _ids(self, text: str, **options: bool) -> list[int]:
        return self.tokenizer(text, verbose=False, **options)["input_ids"]

    def _within(self, text: str, ids: list[int], spans: list[tuple[int, int]]) -> Bool[np.ndarray, " n"]:
        """Which tokens have a part in one of the spans; a token that reaches into one belongs to it."""
        supervised = np.zeros(len(ids), bool)
        for start, end in spans:
            first = _agree(ids, self._ids(text[:start], add_special_tokens=False))
            whole = ids if end == len(text) else self._ids(text[:end], add_special_tokens=False)
            last = _agree(ids, whole)
            supervised[first : last + (last < len(whole))] = True
        return supervised


def _agree(a: list[int], b: list[int]) -> int:
    """How many tokens two lists have in common from the start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
