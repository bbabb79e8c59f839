"""What training would see: figures of a config's documents and sequences, and a few documents in colour."""

import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from mtp_jax import storage
from mtp_jax.config import Config, TokenizerRecipe
from mtp_jax.data.batches import Batch, anchors_of, training_batches
from mtp_jax.data.datasets import SourceDocuments, Stream
from mtp_jax.data.documents import Document
from mtp_jax.data.sources import texts_of
from mtp_jax.data.tokenizer import train_tokenizer
from mtp_jax.data.tokens import Encoder
from mtp_jax.encoding import load_tokenizer
from mtp_jax.errors import UserError
from mtp_jax.locate import SETTINGS, find_folder
from mtp_jax.model.folder import read_geometry
from mtp_jax.model.geometry import Geometry
from mtp_jax.storage import local
from mtp_jax.text import added_text

_SAMPLE = 500  # documents of a source that are counted, spread evenly over it
_BATCHES = 16  # batches that are counted
_SHOWN = 240  # tokens of a document that are printed


@dataclass
class SourceFigures:
    """Documents of one source, from a sample or from all of them."""

    name: str  # after its place in the config
    documents: int | None  # None for a stream
    share: float  # of the mixture
    tokens: list[int] = field(default_factory=list)  # of each document of the sample
    supervised: int = 0  # tokens
    too_long: int = 0  # documents


@dataclass
class SequenceFigures:
    """Sequences of the first batches, or of a whole epoch."""

    sequences: int = 0
    rows: int = 0
    padding: int = 0  # rows
    supervised: int = 0  # rows
    segments: int = 0
    anchors: int = 0
    places: int = 0  # for anchors


def preview_tokenizer(config: Config, training: list[SourceDocuments]) -> tuple[Any, str]:
    """The tokenizer that a run would use and where it comes from; writes nothing and needs no weights.

    Raises:
        UserError: a folder or tokenizer that cannot be used.
    """
    if config.model.path is not None:
        folder = find_folder(config.model.path, patterns=SETTINGS)
        return load_tokenizer(folder, read_geometry(folder).V), config.model.path
    assert config.model.scratch is not None
    recipe = config.model.scratch.tokenizer
    g = Geometry.from_config(config.model.scratch.config, "model.scratch.config")
    if not isinstance(recipe, TokenizerRecipe):
        return load_tokenizer(local(recipe), g.V), recipe
    trained = f"{config.output_dir.rstrip('/')}/tokenizer"
    if storage.listing(trained) if storage.is_bucket(trained) else local(trained).is_dir():
        return load_tokenizer(local(trained), g.V), trained
    return train_tokenizer(texts_of(training), recipe.vocabulary), f"trained now, {recipe.vocabulary} tokens"


def survey_sources(config: Config, training: list[SourceDocuments], tokenizer: Any, every: bool) -> list[SourceFigures]:
    """Figures of each source, from a sample or from `every` document."""
    encode, T = Encoder(tokenizer), config.train.sequence_length
    if config.data.continuations is not None:
        names, weights = [f"data.continuations: {config.data.continuations.path}"], [1.0]
    else:
        given = [source.name or source.path or source.kind for source in config.data.sources]
        names = [f"data.sources.{i}: {name}" for i, name in enumerate(given)]
        weights = [source.weight for source in config.data.sources]
    figures = []
    for source, name, weight in zip(training, names, weights, strict=True):
        count = None if isinstance(source, Stream) else len(source)
        found = SourceFigures(name, count, weight / sum(weights))
        for document in _chosen(source, every):
            tokens, supervised, _ = encode(document)
            found.tokens.append(len(tokens))
            found.supervised += int(supervised[1:].sum())
            found.too_long += len(tokens) > T + 1
        figures.append(found)
    return figures


def _chosen(source: SourceDocuments, every: bool) -> Iterable[Document]:
    if isinstance(source, Stream):
        return islice(source, None if every else _SAMPLE)
    count = len(source) if every else min(_SAMPLE, len(source))
    return (source[n * len(source) // count] for n in range(count))


def survey_sequences(config: Config, training: list[SourceDocuments], tokenizer: Any, every: bool) -> Iterator[Any]:
    """Yields the first batch with the names of its documents, then `SequenceFigures` with the counts of documents.

    Raises:
        UserError: a stream where `every` document of an epoch is wanted, documents that give nothing to train on.
    """
    streams = [i for i, source in enumerate(training) if isinstance(source, Stream)]
    if every and streams:
        raise UserError(f"--all reads a whole epoch, and data.sources.{streams[0]} is a stream: leave out one of them.")
    weights = [1.0] if config.data.continuations else [source.weight for source in config.data.sources]
    train = config.train
    batches, names = training_batches(
        training,
        weights,
        tokenizer,
        train.batch_size,
        train.sequence_length,
        config.seed,
        anchors_of(config, len(tokenizer)),
        too_long=config.data.too_long,
    )
    figures, total = SequenceFigures(), sum(len(source) for source in training if not isinstance(source, Stream))
    for number, batch in enumerate(batches):
        if number == 0:
            yield batch, names
        _add(figures, batch)
        if batches.counts()["documents"] >= total if every else number + 1 >= _BATCHES:
            break
    yield figures, batches.counts()
    batches.close()


def _add(figures: SequenceFigures, batch: Batch) -> None:
    figures.sequences += len(batch["tokens"])
    figures.rows += batch["tokens"].size
    figures.padding += int((batch["segments"] == 0).sum())
    figures.supervised += int(batch["supervised"].sum())
    figures.segments += int(batch["segments"].max(axis=1).sum())
    if "anchors" in batch:
        figures.places += batch["anchors"].size
        figures.anchors += int((batch["anchors"] >= 0).sum())


# ---- in print


def source_lines(source: SourceFigures) -> dict[str, str]:
    """Label -> what the documents of a source are."""
    lengths = np.asarray(source.tokens or [0])
    low, median, high, longest = (f"{int(np.quantile(lengths, q)):,}" for q in (0.1, 0.5, 0.9, 1.0))
    number = "streamed" if source.documents is None else f"{source.documents:,} to train on"
    sample = "all" if len(source.tokens) == source.documents else f"{len(source.tokens):,}"
    return {
        "documents": f"{number}, {source.share:.1%} of the mixture; figures from {sample} of them",
        "tokens": f"10% {low}, median {median}, 90% {high}, longest {longest}",
        "supervised": f"{source.supervised / max(1, lengths.sum()):.1%} of tokens",
        "too long": f"{source.too_long / max(1, len(source.tokens)):.1%} of documents",
    }


def sequence_lines(config: Config, figures: SequenceFigures, counts: dict[str, int]) -> dict[str, str]:
    """Label -> what the sequences hold and what became of the documents."""
    done = {"split": "split into pieces", "cut": "cut", "drop": "dropped"}[config.data.too_long]
    lines = {
        "packed": f"{figures.sequences:,} of {config.train.sequence_length} rows, each of "
        f"{figures.segments / figures.sequences:.1f} documents or pieces",
        "padding": f"{figures.padding / figures.rows:.2%} of rows",
        "supervised": f"{figures.supervised / figures.rows:.1%} of rows",
        "documents": f"{counts['documents']:,} read, {counts['too_long']:,} longer than a sequence ({done}), "
        f"{counts['unused']:,} with nothing to train on",
    }
    if figures.places:
        share = figures.anchors / figures.places
        lines["anchors"] = f"{figures.anchors / figures.sequences:.1f} per sequence, {share:.1%} of their places"
    return lines


def print_lines(title: str, lines: dict[str, str], console: Console) -> None:
    """A block of labelled lines, wrapped at the width of the terminal."""
    console.print(Text(title, "bold", overflow="fold"))
    for label, line in lines.items():
        filled = textwrap.fill(f"  {label:<10}  {line}", console.width, subsequent_indent=" " * 14)
        console.print(filled, markup=False, soft_wrap=True)


def print_documents(batch: Batch, names: Any, tokenizer: Any, count: int, console: Console) -> None:
    """The first documents of a batch, sequence after sequence, wrapped at the width of the terminal."""
    plain = console.color_system is None
    console.print(
        Text.assemble(
            ("dim", "dim"),
            " is context, ",
            ("green", "green"),
            " is supervised; a block of masks stands behind a ",
            ("token", "reverse"),
            "",
        )
        if not plain
        else "«» encloses what is supervised; a block of masks stands behind a token with ^"
    )
    shown = 0
    for sequence, segments in enumerate(batch["segments"]):
        for segment in range(1, int(segments.max()) + 1):
            if shown == count:
                return
            rows = np.flatnonzero(segments == segment)
            name = names[batch["documents"][sequence][rows[0]]].name
            console.rule(Text(f"{name}, {len(rows)} rows of sequence {sequence}"), align="left")
            console.print(_document(batch, sequence, rows, tokenizer, plain), overflow="fold")
            shown += 1


def _document(batch: Batch, sequence: int, rows: np.ndarray, tokenizer: Any, plain: bool) -> Text:
    supervised = batch["supervised"][sequence]
    predicted = np.append(False, supervised[rows[:-1]])  # a token is what the row before it predicts
    anchors = set(batch["anchors"][sequence].tolist()) if "anchors" in batch else set()
    first = int(np.argmax(predicted)) if predicted.any() else 0
    start = max(0, min(first - _SHOWN // 4, len(rows) - _SHOWN))
    text = Text("..." if start else "")
    for place in range(start, min(len(rows), start + _SHOWN)):
        if plain and predicted[place] and not (place > start and predicted[place - 1]):
            text.append("«")
        ids = batch["tokens"][sequence][rows[max(0, place - 1) : place + 1]].tolist()
        token = added_text(tokenizer, ids[:-1], ids[-1:], clean_up_tokenization_spaces=False)
        anchored = rows[place] in anchors
        style = ("green" if predicted[place] else "dim") + (" reverse" if anchored else "")
        text.append(token + ("^" if plain and anchored else ""), style)
        if plain and predicted[place] and (place + 1 == len(rows) or not predicted[place + 1]):
            text.append("»")
    return text.append("..." if start + _SHOWN < len(rows) else "")
