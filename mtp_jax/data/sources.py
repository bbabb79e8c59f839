"""What a config's sources give: documents to train on and documents held out; and a check that they can be used."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from mtp_jax.config import Data, Source
from mtp_jax.data.continuations import Continuation, check_continuations, read_continuations
from mtp_jax.data.datasets import Record, SourceDocuments, Stream, StreamedRecord, dataset_records
from mtp_jax.data.documents import (
    BadRecords,
    Content,
    Conversation,
    Document,
    Documents,
    FileDocument,
    Text,
    python_stdlib,
    text_files,
)
from mtp_jax.data.packing import TooLong
from mtp_jax.data.tokens import Encoder
from mtp_jax.errors import BadRecord, UserError

_SAMPLE = 10_000  # records of a source that are checked, spread evenly over it
_STREAMED = 1_000  # the same, at the beginning of a stream
ENOUGH_TOKENS = 2_000_000  # of a source


def source_documents(
    source: Source, key: str = "data.sources.0.path", bad_records: BadRecords = Document.bad_records
) -> SourceDocuments:
    """All documents of a source, in a fixed order; `key` is where its path stands in the config.

    Raises:
        UserError: a missing path, a source without text, a dataset that cannot be loaded or lacks the columns.
    """
    if source.kind == "python-stdlib":
        return python_stdlib()
    if source.kind == "dataset":
        return dataset_records(source, key.removesuffix(".path"), bad_records)
    return text_files(source, key, bad_records)


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
    bad_records = BadRecords(0, " Set data.bad_records: skip to leave such records out.")
    if data.bad_records == "skip":
        limit = data.bad_records_limit
        bad_records = BadRecords(limit, f" It is one more bad record than data.bad_records_limit={limit} allows.")
    for i, source in enumerate(data.sources):
        key = f"data.sources.{i}"
        try:
            train, held = split(source_documents(source, f"{key}.path", bad_records), data.held_out)
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


def texts_of(sources: list[SourceDocuments]) -> Iterator[str]:
    """The text of every training document, to train a tokenizer on; bad records as far as they may be skipped."""
    for source in sources:
        for document in source:
            try:
                yield document.text()
            except BadRecord as error:
                document.bad_records.skip(document.name, error)


# ---- checked from a sample, before a run starts


def check_supervision(
    sources: list[SourceDocuments],
    tokenizer: Any | None,
    length: int | None = None,
    too_long: TooLong = "split",
    held_out: Sequence[Document] = (),
) -> list[str]:
    """A line for each source of records: how many, which of their tokens are supervised, and how many are too long.

    Of each source it looks at up to 10,000 documents, spread evenly, or at fewer that have 2 million tokens.

    Args:
        sources: The training documents of each source.
        tokenizer: None where it is still to be trained.
        length: T, tokens of a sequence; None where it does not matter.
        too_long: What becomes of longer records.
        held_out: Documents that are checked too.

    Raises:
        UserError: records that cannot be read, do not fit the chat template, or have no supervised token; bad records
            that may not be skipped, with their number.
    """
    encode = Encoder(tokenizer)
    lines, faults = [], []
    for i, source in enumerate(sources):
        where = f"data.sources.{i}"
        try:
            sample = sample_of(source)
            if isinstance(sample[0], Continuation) and not isinstance(source, Stream):
                where = "data.continuations"
                check_continuations(source, tokenizer)
            looked = _look_at(sample, encode)
            if isinstance(sample[0], Continuation | Record | StreamedRecord):
                number = "streamed" if isinstance(source, Stream) else f"{len(source):,}"
                lines.append(f"{where}: {number} {looked.line(encode, length, too_long)}")
            elif looked.bad:
                lines.append(f"{where}: {looked.skipped()}")
        except UserError as error:
            faults += [f"{where}: {fault}" for fault in error.faults]
    if held_out and not faults:
        try:
            looked = _look_at(sample_of(held_out), encode)
            lines += [f"held-out documents: {looked.skipped()}"] if looked.bad else []
        except UserError as error:
            faults += [f"held-out documents: {fault}" for fault in error.faults]
    if faults:
        raise UserError(*faults)
    return lines


def sample_of(source: SourceDocuments) -> list[Document]:
    """Up to 10,000 documents, spread evenly over a source, or the first 1,000 of a stream; UserError without any."""
    if isinstance(source, Stream):
        if not (sample := list(islice(source, _STREAMED))):
            raise UserError(f"{source.name}: no record is left to train on.")
        return list(sample)
    count = min(_SAMPLE, len(source))
    return [source[n * len(source) // count] for n in range(count)]


def in_any_order(sample: list[Document]) -> list[int]:
    """The numbers of a sample's documents in a fixed order without meaning, so that it may be cut short anywhere."""
    return np.random.default_rng(0).permutation(len(sample)).tolist()


@dataclass
class _Looked:
    """What was seen of a source."""

    first: Document
    content: Content | None = None  # of a good document
    count: int = 0
    supervised: int = 0  # tokens
    rewritten: int = 0  # turns
    lengths: list[int] = field(default_factory=list)  # tokens of each good document
    bad: dict[int, BadRecord] = field(default_factory=dict)

    def line(self, encode: Encoder, length: int | None, too_long: TooLong) -> str:
        """A line to print; raises UserError where there is nothing to train on."""
        count = self.count
        if encode.tokenizer is not None and not self.supervised:
            raise UserError(f"none of the {count} records checked ({self.first.name}, ...) has a supervised token.")
        longer = sum(length is not None and tokens > length + 1 for tokens in self.lengths)
        if longer == count and too_long == "drop":
            raise UserError(
                f"all of the {count} records checked are longer than train.sequence_length={length}, and "
                "data.too_long drops them: raise the one, or set the other to split or cut."
            )
        line = self._kind(encode)
        if longer:
            what = {"split": "split", "cut": "cut", "drop": "dropped"}[too_long]
            line += f"; {longer} of {count} checked are longer than a sequence of {length} and are {what}"
        return f"{line}; {self.skipped()}" if self.bad else line

    def skipped(self) -> str:
        """How many bad records there are, how many there may be, and the first."""
        limit, first = self.first.bad_records.limit, self.bad[min(self.bad)]
        return f"{len(self.bad)} of {self.count} checked are bad and are skipped (up to {limit:,}), the first: {first}"

    def _kind(self, encode: Encoder) -> str:
        if isinstance(self.content, Text):
            return "texts, supervised throughout"
        if not isinstance(self.content, Conversation):
            return "prompts with completions, supervised in the completions"
        if encode.chat.marked:
            return "conversations, supervised where the chat template marks {% generation %}"
        how = "conversations, supervised in assistant turns by prefix difference of the chat template"
        note = f"; in the {self.count} checked, {self.rewritten} earlier turns that the template rewrites are not"
        return how + (note if self.rewritten else "")


def _look_at(sample: list[Document], encode: Encoder) -> _Looked:
    looked, tokens = _Looked(sample[0]), 0
    for number in in_any_order(sample):
        if tokens > ENOUGH_TOKENS:
            break
        document, looked.count = sample[number], looked.count + 1
        try:
            if encode.tokenizer is None or isinstance(document, FileDocument):
                looked.content = document.content()
                tokens += sum(len(str(part)) for part in looked.content[:2]) // 4  # or so
                continue
            encoded = encode.encode(document)
            looked.content = looked.content or document.content()
        except BadRecord as error:
            looked.bad[number] = error
            continue
        tokens += len(encoded.tokens)
        looked.lengths.append(len(encoded.tokens))
        looked.supervised += int(encoded.supervised[1:].sum())
        looked.rewritten += encoded.rewritten
    for number, fault in sorted(looked.bad.items()):
        try:
            sample[number].bad_records.skip(sample[number].name, fault)
        except UserError as error:
            raise UserError(f"{error} Bad among the {looked.count} checked: {len(looked.bad)}.") from error
    return looked
