"""What a config's sources give: documents to train on and documents held out; and a check that they can be used."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np

from mtp_jax.config import Data, Source
from mtp_jax.data.continuations import Continuation, check_continuations, read_continuations
from mtp_jax.data.datasets import Record, SourceDocuments, Stream, dataset_records
from mtp_jax.data.documents import Content, Conversation, Document, Documents, Text, python_stdlib, text_files
from mtp_jax.data.packing import TooLong
from mtp_jax.data.tokens import Encoder
from mtp_jax.errors import UserError

_SAMPLE = 64  # records of a source that are checked, spread evenly over it


def source_documents(source: Source, key: str = "data.sources.0.path") -> SourceDocuments:
    """All documents of a source, in a fixed order; `key` is where its path stands in the config.

    Raises:
        UserError: a missing path, a source without text, a dataset that cannot be loaded or lacks the columns.
    """
    if source.kind == "python-stdlib":
        return python_stdlib()
    if source.kind == "dataset":
        return dataset_records(source, key.removesuffix(".path"))
    return text_files(source, key)


def split(found: SourceDocuments, held_out: float) -> tuple[SourceDocuments, Sequence[Document]]:
    """Training and held-out documents, divided by a hash of their names: alike on every machine."""
    if isinstance(found, Stream):
        return found.split(held_out)
    held = np.fromiter((document.draw < held_out for document in found), bool, len(found))
    every = found if isinstance(found, Documents) else Documents(len(found), found.__getitem__)
    return every.part(np.flatnonzero(~held)), every.part(np.flatnonzero(held))


def read_sources(data: Data, continuations: bool = True) -> tuple[list[SourceDocuments], list[Document]]:
    """Training documents of every source, and the held-out documents of all.

    Where `data.continuations` is set, they replace the training documents, as one source, unless `continuations` is
    false.

    Raises:
        UserError: what a source lacks, nothing to train on.
    """
    training, held_out, faults = [], [], []
    for i, source in enumerate(data.sources):
        key = f"data.sources.{i}"
        try:
            train, held = split(source_documents(source, f"{key}.path"), data.held_out)
        except UserError as error:
            faults += error.faults
            continue
        if not isinstance(train, Stream) and not train:
            faults.append(f"{key}: all {len(held)} documents are held out; lower data.held_out.")
        training.append(train)
        held_out += held
    if data.continuations is not None and continuations:
        try:
            training = [read_continuations(data.continuations)]
        except UserError as error:
            faults += error.faults
    if faults:
        raise UserError(*faults)
    return training, held_out


# ---- checked from a sample, before a run starts


def check_supervision(
    sources: list[SourceDocuments], tokenizer: Any | None, length: int | None = None, too_long: TooLong = "split"
) -> list[str]:
    """A line for each source of records: how many, which of their tokens are supervised, and how many are too long.

    Args:
        sources: The training documents of each source.
        tokenizer: None where it is still to be trained.
        length: T, tokens of a sequence; None where it does not matter.
        too_long: What becomes of longer records.

    Raises:
        UserError: records that cannot be read, do not fit the chat template, or have no supervised token.
    """
    encode = Encoder(tokenizer)
    lines, faults = [], []
    for i, source in enumerate(sources):
        where = f"data.sources.{i}"
        try:
            sample = _sample(source)
            if isinstance(sample[0], Continuation) and not isinstance(source, Stream):
                where = "data.continuations"
                check_continuations(source, tokenizer)
            elif not isinstance(source, Stream) and not isinstance(sample[0], Record):
                continue
            number = "streamed" if isinstance(source, Stream) else f"{len(source):,}"
            lines.append(f"{where}: {number} {_look_at(sample, encode, length, too_long)}")
        except UserError as error:
            faults += [f"{where}: {fault}" for fault in error.faults]
    if faults:
        raise UserError(*faults)
    return lines


def _sample(source: SourceDocuments) -> list[Document]:
    if isinstance(source, Stream):
        if not (sample := list(islice(source, _SAMPLE))):
            raise UserError(f"{source.name}: no record is left to train on.")
        return list(sample)
    count = min(_SAMPLE, len(source))
    return [source[n * len(source) // count] for n in range(count)]


def _look_at(sample: list[Document], encode: Encoder, length: int | None, too_long: TooLong) -> str:
    content: Content = sample[0].content()
    marked = isinstance(content, Conversation) and encode.chat.marked
    supervised = rewritten = longer = 0
    for document in sample:
        if encode.tokenizer is None:
            document.content()
            continue
        encoded = encode(document)
        supervised += int(encoded.supervised[1:].sum())
        rewritten += encoded.rewritten
        longer += length is not None and len(encoded.tokens) > length + 1
    if encode.tokenizer is not None and not supervised:
        raise UserError(f"none of the {len(sample)} records checked ({sample[0].name}, ...) has a supervised token.")
    if longer == len(sample) and too_long == "drop":
        raise UserError(
            f"all of the {len(sample)} records checked are longer than train.sequence_length={length}, and "
            "data.too_long drops them: raise the one, or set the other to split or cut."
        )
    what = {"split": "split", "cut": "cut", "drop": "dropped"}[too_long]
    size = f"; {longer} of {len(sample)} checked are longer than a sequence of {length} and are {what}"
    return _kind(content, marked, len(sample), rewritten) + (size if longer else "")


def _kind(content: Content, marked: bool, count: int, rewritten: int) -> str:
    if isinstance(content, Text):
        return "texts, supervised throughout"
    if not isinstance(content, Conversation):
        return "prompts with completions, supervised in the completions"
    if marked:
        return "conversations, supervised where the chat template marks {% generation %}"
    how = "conversations, supervised in assistant turns by prefix difference of the chat template"
    note = f"; in the {count} checked, {rewritten} earlier turns that the template rewrites are not"
    return how + (note if rewritten else "")
