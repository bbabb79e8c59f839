"""Whether the rows of each dataset can be trained on and what of them is, told from a sample before a run starts."""

from typing import Any

from mtp_jax.data.continuations import Continuation
from mtp_jax.data.encoding import Encoder
from mtp_jax.data.examples import Content, Conversation, Example, Text
from mtp_jax.data.rows import Row
from mtp_jax.errors import UserError

_SAMPLE = 64  # rows of a source that are looked at, spread evenly over it


def check_supervision(sources: list[list[Example]], tokenizer: Any | None) -> list[str]:
    """A line for each source of rows: how many, and which of their tokens are to be predicted.

    Args:
        sources: The training examples of each source.
        tokenizer: None where it is still to be trained.

    Raises:
        UserError: rows that cannot be read, do not fit the chat template, or have nothing to be predicted.
    """
    encode = Encoder(tokenizer)
    lines, faults = [], []
    for i, source in enumerate(sources):
        if isinstance(source[0], Row | Continuation):
            where = f"data.sources.{i}" if isinstance(source[0], Row) else "data.continuations"
            try:
                lines.append(f"{where}: {len(source):,} {_look_at(source, encode)}")
            except UserError as error:
                faults += [f"{where}: {fault}" for fault in error.faults]
    if faults:
        raise UserError(*faults)
    return lines


def _look_at(source: list[Example], encode: Encoder) -> str:
    count = min(_SAMPLE, len(source))
    sample = [source[n * len(source) // count] for n in range(count)]
    content: Content = sample[0].content()
    marked = isinstance(content, Conversation) and encode.chat.marked
    supervised = rewritten = 0
    for example in sample:
        if encode.tokenizer is None:
            example.content()
            continue
        encoded = encode(example)
        supervised += int(encoded.supervised[1:].sum())
        rewritten += encoded.rewritten
    if encode.tokenizer is not None and not supervised:
        raise UserError(
            f"none of the {count} rows looked at, {sample[0].name} among them, has a token to be predicted."
        )
    if isinstance(content, Text):
        return "texts, supervised throughout"
    if not isinstance(content, Conversation):
        return "prompts with completions, supervised in the completions"
    if marked:
        return "conversations, supervised where the chat template marks {% generation %}"
    note = f"; in {count} of them, {rewritten} earlier turns that the template rewrites are not" if rewritten else ""
    return f"conversations, supervised in assistant turns by prefix difference of the chat template{note}"
