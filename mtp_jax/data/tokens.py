"""Tokenise a document and mark the tokens that carry loss: the supervised ones."""

import copy
import re
import threading
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from mtp_jax.data.documents import Completion, Conversation, Document, Tokens
from mtp_jax.errors import UserError
from mtp_jax.text import check_ids

# Templates report what they mark through state that all threads share.
_RENDERING = threading.Lock()
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Encoded(NamedTuple):
    """The tokens of a document."""

    tokens: Int[np.ndarray, " n"]  # int32
    supervised: Bool[np.ndarray, " n"]
    rewritten: int = 0  # assistant turns that are not supervised, see `Rendered`


class Encoder:
    """A tokenizer with its chat template, which is read at the first conversation."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    @cached_property
    def chat(self) -> "ChatTemplate":
        """The chat template; raises UserError where there is none."""
        return ChatTemplate(self.tokenizer)

    def __call__(self, document: Document) -> Encoded:
        """Texts and completions end with the end-of-text token, conversations as the template ends them.

        Raises:
            UserError: the document cannot be read, does not fit the chat template, or has a token unknown to the model.
        """
        encoded = self._encoded(document)
        check_ids(encoded.tokens, self.tokenizer, document.name)
        return encoded

    def _encoded(self, document: Document) -> Encoded:
        content = document.content()
        if isinstance(content, Tokens):
            tokens = np.asarray(content.prompt + content.completion, np.int32)
            return Encoded(tokens, np.arange(len(tokens)) >= len(content.prompt))
        if isinstance(content, Conversation):
            template = self.chat
            try:
                chat = template.render(content.messages)
            except UserError as error:
                raise UserError(*(f"{document.name}: {fault}" for fault in error.faults)) from error
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
                "the tokenizer does not report where in a text its tokens are, so supervised tokens cannot be marked: "
                "give its folder a tokenizer.json (load it with transformers and call save_pretrained)."
            )
        locator = copy.deepcopy(self.tokenizer.backend_tokenizer)
        # The last stage adds special tokens, and in some tokenizers (Llama 3's) trims white space off the offsets.
        locator.post_processor = None
        locator.no_truncation()
        locator.no_padding()
        return locator

    def _located(self, text: str) -> tuple[list[int], Int[np.ndarray, "n 2"]]:
        """The tokens of a text without special tokens around it, and the first character and the end of each.

        A token that straddles a border has a part on both sides.
        """
        encoding = self._locator.encode(text, add_special_tokens=False)
        return encoding.ids, np.asarray(encoding.offsets, np.int64).reshape(-1, 2)


# ---- conversations


class Rendered(NamedTuple):
    """A conversation as text."""

    text: str
    spans: list[tuple[int, int]]  # characters of the assistant's turns, ascending
    rewritten: int  # assistant turns that the template renders differently once others follow: context, without a span


class ChatTemplate:
    """A tokenizer's chat template.

    Its `{% generation %}` markers say what the assistant wrote. Without them a turn is found by prefix difference: what
    rendering up to and including it adds to rendering up to it with the generation prompt. Some templates render a turn
    differently once another message follows (they drop its reasoning): as the assistant never wrote it that way, such a
    turn is not supervised.

    Raises:
        UserError: the tokenizer has no chat template, or several and none is the default.
    """

    def __init__(self, tokenizer: Any):
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                "the tokenizer has no chat template, so messages cannot be formatted: use a model tuned for chat, set "
                "chat_template in its tokenizer_config.json, or train on text or on prompts with completions."
            )
        try:
            self.template = tokenizer.get_chat_template()
        except ValueError as error:
            raise UserError(f"the tokenizer's chat template cannot be chosen ({error}).") from error
        self.special = tokenizer.special_tokens_map
        self.marked = _MARKER.search(self.template) is not None

    def render(self, messages: list[dict[str, Any]]) -> Rendered:
        """Raises UserError where the template refuses a conversation or prefixes do not agree."""
        if self.marked:
            text, spans = self._render(messages, mark=True)
            return Rendered(text, [span for span in spans if span[0] < span[1]], 0)
        text, _ = self._render(messages)
        spans, rewritten = [], 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, _ = self._render(messages[:i], prompt=True)
            upto, _ = self._render(messages[: i + 1])
            if not upto.startswith(before):
                raise UserError(
                    f"the chat template does not show what the assistant wrote in message {i}: rendered up to that "
                    "message, the conversation does not begin with the messages before it and the generation prompt. "
                    "Mark the assistant's part of the template with {% generation %} and {% endgeneration %}."
                )
            if text.startswith(upto):
                spans.append((len(before), len(upto)))
            else:
                rewritten += 1
        return Rendered(text, spans, rewritten)

    def _render(
        self, messages: list[dict[str, Any]], prompt: bool = False, mark: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        # What `apply_chat_template` calls. Its own token mask looks characters up in the tokenizer's offsets, and loses
        # turns with white space at either end where these are trimmed, as in Llama 3's tokenizer.
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            with _RENDERING:
                rendered: Any = render_jinja_template(
                    conversations=[messages],
                    chat_template=self.template,
                    add_generation_prompt=prompt,
                    return_assistant_tokens_mask=mark,
                    **self.special,
                )
        except (TemplateError, TypeError, ValueError, AttributeError, KeyError) as error:
            raise UserError(f"the chat template refuses the conversation ({error}).") from error
        texts, spans = rendered
        return texts[0], spans[0] if mark else []
