"""From an example to its tokens, each with the word whether it is to be predicted."""

import copy
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
            ids, offsets = self._located(chat.text)
            supervised = np.zeros(len(ids), bool)
            for start, end in chat.spans:
                supervised |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
            return Encoded(np.asarray(ids, np.int32), supervised, chat.rewritten)
        text = "".join(content[:2])
        ids = self.tokenizer(text, verbose=False)["input_ids"]
        supervised = np.ones(len(ids), bool)
        if isinstance(content, Completion):
            inner, offsets = self._located(text)
            begin = next(i for i in range(len(ids) - len(inner) + 1) if ids[i : i + len(inner)] == inner)
            supervised[: begin + int(np.sum(offsets[:, 1] <= len(content.prompt)))] = False
        if isinstance(content, Completion) and not content.whole:
            return Encoded(np.asarray(ids, np.int32), supervised)
        if (end := self.tokenizer.eos_token_id) is not None:
            ids, supervised = [*ids, end], np.append(supervised, True)
        return Encoded(np.asarray(ids, np.int32), supervised)

    @cached_property
    def _locator(self) -> Any:
        if not getattr(self.tokenizer, "is_fast", False):
            raise UserError(
                "the tokenizer does not say where in a text its tokens stand, so what is to be predicted cannot be "
                "told: give its folder a tokenizer.json (load it with transformers and call save_pretrained)."
            )
        locator = copy.deepcopy(self.tokenizer.backend_tokenizer)
        # The last stage adds special tokens, and in some tokenizers (Llama 3's) takes white space off the places.
        locator.post_processor = None
        locator.no_truncation()
        locator.no_padding()
        return locator

    def _located(self, text: str) -> tuple[list[int], Int[np.ndarray, "n 2"]]:
        """The tokens of a text without special ones around it, and the characters from and to which each stands.

        A token that reaches across a border has a part on both sides.
        """
        encoding = self._locator.encode(text, add_special_tokens=False)
        return encoding.ids, np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
