"""Whether the rows of each dataset can be trained on and what of them is, told from a sample before a run starts."""

from itertools import islice
from typing import Any

from mtp_jax.data.continuations import Continuation
from mtp_jax.data.encoding import Encoder
from mtp_jax.data.examples import Content, Conversation, Example, Text
from mtp_jax.data.packing import TooLong
from mtp_jax.data.rows import Row
from mtp_jax.data.streams import Documents, Stream
from mtp_jax.errors import UserError

_SAMPLE = 64  # rows of a source that are looked at, spread evenly over it


def check_supervision(
    sources: list[Documents], tokenizer: Any | None, length: int | None = None, too_long: TooLong = "split"
) -> list[str]:
    """A line for each source of rows: how many, which of their tokens are to be predicted, and which are too long.

    Args:
        sources: The training examples of each source.
        tokenizer: None where it is still to be trained.
        length: T, tokens of a sequence; None where it does not matter.
        too_long: What becomes of longer rows.

    Raises:
        UserError: rows that cannot be read, do not fit the chat template, or have nothing to be predicted.
    """
    encode = Encoder(tokenizer)
    lines, faults = [], []
    for i, source in enumerate(sources):
        where = f"data.sources.{i}"
        try:
            sample = _sample(source)
            if isinstance(sample[0], Continuation):
                where = "data.continuations"
            elif not isinstance(source, Stream) and not isinstance(sample[0], Row):
                continue
            number = "streamed" if isinstance(source, Stream) else f"{len(source):,}"
            lines.append(f"{where}: {number} {_look_at(sample, encode, length, too_long)}")
        except UserError as error:
            faults += [f"{where}: {fault}" for fault in error.faults]
    if faults:
        raise UserError(*faults)
    return lines


def _sample(source: Documents) -> list[Example]:
    if isinstance(source, Stream):
        if not (sample := list(islice(source, _SAMPLE))):
            raise UserError(f"{source.name}: no row is left to train on.")
        return list(sample)
    count = min(_SAMPLE, len(source))
    return [source[n * len(source) // count] for n in range(count)]


def _look_at(sample: list[Example], encode: Encoder, length: int | None, too_long: TooLong) -> str:
    content: Content = sample[0].content()
    marked = isinstance(content, Conversation) and encode.chat.marked
    supervised = rewritten = longer = 0
    for example in sample:
        if encode.tokenizer is None:
            example.content()
            continue
        encoded = encode(example)
        supervised += int(encoded.supervised[1:].sum())
        rewritten += encoded.rewritten
        longer += length is not None and len(encoded.tokens) > length + 1
    if encode.tokenizer is not None and not supervised:
        raise UserError(
            f"none of the {len(sample)} rows looked at, {sample[0].name} among them, has a token to be predicted."
        )
    if longer == len(sample) and too_long == "drop":
        raise UserError(
            f"all of the {len(sample)} rows looked at are longer than train.sequence_length={length}, and "
            "data.too_long drops them: raise the one, or set the other to split or cut."
        )
    what = {"split": "split", "cut": "cut", "drop": "dropped"}[too_long]
    size = f"; {longer} of {len(sample)} looked at are longer than a sequence of {length} and are {what}"
    return _kind(content, marked, len(sample), rewritten) + (size if longer else "")


def _kind(content: Content, marked: bool, count: int, rewritten: int) -> str:
    if isinstance(content, Text):
        return "texts, supervised throughout"
    if not isinstance(content, Conversation):
        return "prompts with completions, supervised in the completions"
    if marked:
        return "conversations, supervised where the chat template marks {% generation %}"
    note = f"; in {count} of them, {rewritten} earlier turns that the template rewrites are not" if rewritten else ""
    return f"conversations, supervised in assistant turns by prefix difference of the chat template{note}"
