"""Tokenise a document and mark the tokens that carry loss: the supervised ones."""

import copy
import os.path
import re
import threading
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from mtp_jax.data.documents import Completion, Conversation, Document, Text, Tokens
from mtp_jax.encoding import check_ids, refusal, render_chat, special_tokens
from mtp_jax.errors import BadRecord, UserError

# Templates report what they mark through state that all threads share.
_RENDERING = threading.Lock()
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Encoded(NamedTuple):
    """The tokens of a document; none of a bad record that is skipped."""

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
        """What `encode` gives, or nothing of a bad record, as far as those may be skipped.

        Raises:
            UserError: the document cannot be read, or is one bad record too many.
        """
        try:
            return self.encode(document)
        except BadRecord as error:
            document.bad_records.skip(document.name, error)
            return Encoded(np.zeros(0, np.int32), np.zeros(0, bool))

    def encode(self, document: Document) -> Encoded:
        """Texts and completions end with the end-of-text token, conversations as the template ends them.

        Raises:
            UserError: the document cannot be read, or has a token unknown to the model.
            BadRecord: it holds what cannot be trained on, or does not fit the chat template.
        """
        encoded = self._encoded(document)
        check_ids(encoded.tokens, self.tokenizer, document.name)
        return encoded

    def _encoded(self, document: Document) -> Encoded:
        content = document.content()
        if isinstance(content, Tokens):
            tokens = np.asarray(content.prompt + content.completion, np.int32)
            return Encoded(tokens, np.arange(len(tokens)) >= len(content.prompt))
        if not isinstance(content, Conversation):
            return self._encode_text(content)
        try:
            chat = self.chat.render(*content)
        except BadRecord as error:
            raise BadRecord(f"{document.name}: {error}") from error
        # The template writes special tokens itself, and ends a turn in its own way.
        ids, offsets = self._located(chat.text)
        supervised = np.zeros(len(ids), bool)
        for start, end in chat.spans:
            supervised |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
        return Encoded(np.asarray(ids, np.int32), supervised, chat.rewritten)

    def _encode_text(self, content: Text | Completion) -> Encoded:
        text, end = "".join(content[:2]), self.tokenizer.eos_token_id
        if isinstance(content, Completion):
            ids, offsets = self._located(text)
            context = int(np.sum(offsets[:, 1] <= len(content.prompt)))
        else:
            ids, context = list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]), 0
        # What begins or ends a text stands there once, whether the text, the tokenizer or both have it.
        before, after = self._special
        if ids[: len(before)] != before:
            ids, context = [*before, *ids], context + len(before) * bool(context)
        ended = end is not None and text.rstrip().endswith(self.tokenizer.eos_token)
        if not ended and not (isinstance(content, Completion) and not content.whole):
            ids = [*ids, *after]
            ids += [] if end is None or ids[-1:] == [end] else [end]
        return Encoded(np.asarray(ids, np.int32), np.arange(len(ids)) >= context)

    @cached_property
    def _special(self) -> tuple[list[int], list[int]]:
        return special_tokens(self.tokenizer)

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
    rewritten: int  # assistant turns that are context, without a span; see `ChatTemplate`


class ChatTemplate:
    """A tokenizer's chat template.

    Its `{% generation %}` markers say what the assistant wrote. Without them a turn is found by prefix difference: what
    rendering up to and including it adds to rendering up to it with the generation prompt. Where the template refuses
    one of these prefixes or begins the turn in another way, a turn begins and ends where the rendering changes once a
    mark stands in its place.

    Some templates render a turn differently once another message follows (they drop its reasoning): as the assistant
    never wrote it that way, such a turn is context, as is one that cannot be found.

    Raises:
        UserError: the tokenizer has no chat template, or several and none is the default.
    """

    def __init__(self, tokenizer: Any):
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                "the tokenizer has no chat template, so messages cannot be formatted: use a model tuned for chat, set "
                "chat_template in its tokenizer_config.json, or train on text or on prompts with completions."
            )
        self.tokenizer = tokenizer
        self.marked = _MARKER.search(self._template(None)) is not None

    def _template(self, tools: Any) -> str:
        try:
            return self.tokenizer.get_chat_template(tools=tools)
        except ValueError as error:
            raise UserError(f"the tokenizer's chat template cannot be chosen ({error}).") from error

    def render(self, messages: list[dict[str, Any]], tools: Any = None, context: int = 0) -> Rendered:
        """The conversation, of which so many first messages are context; raises BadRecord where it is refused."""
        template, turns = self._template(tools), [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if _MARKER.search(template):
            text, spans = self._marks(template, messages, tools)
            if turns and turns[0] < context:
                spans = spans[len(self._marks(template, messages[:context], tools)[1]) :]
        else:
            turns = [i for i in turns if i >= context]
            text = render_chat(self.tokenizer, messages, tools)
            spans = [span for i in turns if (span := self._turn(messages, tools, i, text)) is not None]
        for number, content in enumerate(message.get("content") for message in messages):
            if content and not isinstance(content, str) and str(content) in text:
                raise BadRecord(
                    f"message {number}: the chat template takes its content for a text, and it is a "
                    f"{type(content).__name__}; make it a text."
                )
        rewritten = 0 if _MARKER.search(template) else len(turns) - len(spans)
        return Rendered(text, [span for span in spans if span[0] < span[1]], rewritten)

    def _turn(self, messages: list[dict[str, Any]], tools: Any, i: int, text: str) -> tuple[int, int] | None:
        """Characters of the assistant's message i in the whole conversation; None where it does not stand there so."""
        mark = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text)
        spoken = {"role": "assistant", "content": mark}
        marked = [*messages[:i], spoken, *messages[i + 1 :]]
        upto = self._accepted(messages[: i + 1], tools)
        if upto is None:  # found in the whole conversation
            head, found, tail = self._accepted(marked, tools, "").partition(mark)
            if not found or not (text.startswith(head) and text[len(head) :].endswith(tail)):
                return None
            # What ends a turn is what stands behind the mark in a last one.
            before = messages[:-1] if messages[-1]["role"] == "assistant" else [{"role": "user", "content": "a"}]
            ending, end = self._accepted([*before, spoken], tools, "").partition(mark)[2], len(text) - len(tail)
            return len(head), end + (len(ending) if text.startswith(ending, end) else 0)
        if not text.startswith(upto):
            return None
        before = self._accepted(messages[:i], tools, prompt=True)
        if before is not None and upto.startswith(before):
            return len(before), len(upto)
        head, found, _ = self._accepted(marked[: i + 1], tools, "").partition(mark)
        return (len(os.path.commonprefix([head, upto])), len(upto)) if found else None  # noqa: RUF071

    def _accepted(self, messages: Any, tools: Any, otherwise: Any = None, prompt: bool = False) -> Any:
        try:
            return render_chat(self.tokenizer, messages, tools, prompt)
        except BadRecord:
            return otherwise

    def _marks(self, template: str, messages: list[dict[str, Any]], tools: Any) -> tuple[str, list[tuple[int, int]]]:
        # What `apply_chat_template` calls. Its own token mask looks characters up in the tokenizer's offsets, and loses
        # turns with white space at either end where these are trimmed, as in Llama 3's tokenizer.
        from transformers.utils.chat_template_utils import render_jinja_template

        given = [{key: part for key, part in message.items() if part is not None} for message in messages]
        try:
            with _RENDERING:
                rendered: Any = render_jinja_template(
                    conversations=[given],
                    tools=tools,
                    chat_template=template,
                    return_assistant_tokens_mask=True,
                    **self.tokenizer.special_tokens_map,
                )
        except Exception as error:  # see `render_chat`
            raise BadRecord(refusal(error)) from error
        return rendered[0][0], rendered[1][0]
