"""Conversations through a tokenizer's chat template, and which stretches of the result the assistant wrote."""

import re
import threading
from typing import Any, NamedTuple

from mtp_jax.errors import UserError

# Templates report what they mark through state that all threads share.
_RENDERING = threading.Lock()
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Rendered(NamedTuple):
    """A conversation as text."""

    text: str
    spans: list[tuple[int, int]]  # characters of the assistant's turns, ascending
    rewritten: int  # assistant turns that a later message made look otherwise: they are context and have no span


class ChatTemplate:
    """A tokenizer's chat template.

    Its `{% generation %}` markers say what the assistant wrote. A template without them is asked by prefix difference:
    up to an assistant turn with the generation prompt, and up to and with the turn. Some templates render a turn
    otherwise once another message follows (they drop its reasoning): as it was never written that way, such a turn is
    not supervised.

    Raises:
        UserError: the tokenizer has no chat template, or several and none is the default.
    """

    def __init__(self, tokenizer: Any):
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                "the tokenizer has no chat template, so messages cannot be formatted: take a model tuned for chat, or "
                "set chat_template in its tokenizer_config.json, or train on text or on prompt and completion."
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
                    f"the chat template cannot tell what the assistant wrote in message {i}: rendered up to that "
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
                texts, spans = render_jinja_template(
                    conversations=[messages],
                    chat_template=self.template,
                    add_generation_prompt=prompt,
                    return_assistant_tokens_mask=mark,
                    **self.special,
                )
        except (TemplateError, TypeError, ValueError, AttributeError, KeyError) as error:
            raise UserError(f"the chat template refuses the conversation ({error}).") from error
        return texts[0], spans[0] if mark else []
