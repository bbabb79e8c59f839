"""What training would see: figures of a config's documents and sequences, and a few documents in colour."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mtp_jax import storage
from mtp_jax.config import Config, TokenizerRecipe
from mtp_jax.data.encoding import Encoder
from mtp_jax.data.examples import Example
from mtp_jax.data.pipeline import Batch, anchors_of, training_batches
from mtp_jax.data.streams import Documents, Stream
from mtp_jax.data.tokenizer import train_tokenizer
from mtp_jax.errors import UserError
from mtp_jax.model.folder import SETTINGS, find_folder, load_tokenizer, read_geometry
from mtp_jax.model.geometry import Geometry
from mtp_jax.storage import local

_SAMPLE = 500  # documents of a source that are looked at, spread evenly over it
_BATCHES = 16  # batches that are looked at
_SHOWN = 240  # tokens of a document that are shown


@dataclass
class SourceFigures:
    """Documents of one source, as far as they were looked at."""

    name: str
    documents: int | None  # None for a stream
    share: float  # of the mixture
    tokens: list[int] = field(default_factory=list)  # of each document looked at
    supervised: int = 0  # tokens that are to be predicted
    too_long: int = 0


@dataclass
class SequenceFigures:
    """Sequences that were looked at."""

    sequences: int = 0
    rows: int = 0
    padding: int = 0
    supervised: int = 0
    segments: int = 0
    anchors: int = 0
    places: int = 0  # for anchors


def preview_tokenizer(config: Config, training: list[Documents]) -> tuple[Any, str]:
    """The tokenizer that a run would use, without writing anything, and where it is from.

    Raises:
        UserError: a folder or tokenizer that does not do.
    """
    if config.model.path is not None:
        folder = find_folder(config.model.path, patterns=SETTINGS)
        return load_tokenizer(folder, read_geometry(folder)), config.model.path
    assert config.model.scratch is not None
    recipe = config.model.scratch.tokenizer
    g = Geometry.from_config(config.model.scratch.config, "model.scratch.config")
    if not isinstance(recipe, TokenizerRecipe):
        return load_tokenizer(local(recipe), g), recipe
    trained = f"{config.output_dir.rstrip('/')}/tokenizer"
    if storage.listing(trained) if storage.is_bucket(trained) else local(trained).is_dir():
        return load_tokenizer(local(trained), g), trained
    texts = (document.text() for source in training for document in source)
    return train_tokenizer(texts, recipe.vocabulary), f"trained now, {recipe.vocabulary} tokens"


def survey_sources(config: Config, training: list[Documents], tokenizer: Any, every: bool) -> list[SourceFigures]:
    """Figures of each source, from a sample or from `every` document of an epoch."""
    encode, T = Encoder(tokenizer), config.train.sequence_length
    if config.data.continuations is not None:
        names, weights = [config.data.continuations.path], [1.0]
    else:
        names = [source.name or source.path or source.kind for source in config.data.sources]
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


def _chosen(source: Documents, every: bool) -> Iterable[Example]:
    if isinstance(source, Stream):
        return islice(source, None if every else _SAMPLE)
    count = len(source) if every else min(_SAMPLE, len(source))
    return (source[n * len(source) // count] for n in range(count))


def survey_sequences(config: Config, training: list[Documents], tokenizer: Any, every: bool) -> Iterator[Any]:
    """First the first batch with the names of its documents; then `SequenceFigures` and the counts of documents.

    Raises:
        UserError: a stream where `every` document of an epoch is asked for, documents that give nothing.
    """
    streams = [i for i, source in enumerate(training) if isinstance(source, Stream)]
    if every and streams:
        raise UserError(f"--all reads a whole epoch, and data.sources.{streams[0]} is a stream: leave one of them out.")
    weights = [1.0] if config.data.continuations else [source.weight for source in config.data.sources]
    train = config.train
    batches, names = training_batches(
        training,
        weights,
        tokenizer,
        train.batch_size,
        train.sequence_length,
        config.seed,
        anchors_of(config),
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


def sources_table(sources: list[SourceFigures]) -> Table:
    """One line for each source."""
    table = Table(title="documents", title_justify="left")
    for name in ("source", "to train on", "looked at", "share", "tokens 10%", "50%", "90%", "longest"):
        table.add_column(name, justify="left" if name == "source" else "right")
    for name in ("supervised", "too long"):
        table.add_column(name, justify="right")
    for source in sources:
        lengths = np.asarray(source.tokens or [0])
        table.add_row(
            source.name,
            "streamed" if source.documents is None else f"{source.documents:,}",
            f"{len(source.tokens):,}",
            f"{source.share:.1%}",
            *(f"{int(np.quantile(lengths, q)):,}" for q in (0.1, 0.5, 0.9, 1.0)),
            f"{source.supervised / max(1, lengths.sum()):.1%}",
            f"{source.too_long / max(1, len(source.tokens)):.1%}",
        )
    return table


def sequence_lines(config: Config, figures: SequenceFigures, counts: dict[str, int]) -> list[str]:
    """What the sequences hold, and what became of documents."""
    done = {"split": "split into pieces", "cut": "cut", "drop": "dropped"}[config.data.too_long]
    lines = [
        f"sequences: {figures.sequences:,} of {config.train.sequence_length} looked at, with "
        f"{figures.segments / figures.sequences:.1f} documents or pieces each",
        f"padding: {figures.padding / figures.rows:.2%} of their rows; supervised: "
        f"{figures.supervised / figures.rows:.1%}",
        f"documents read for them: {counts['documents']:,}; longer than a sequence: {counts['too_long']:,} ({done}); "
        f"with nothing to train on: {counts['unused']:,}",
    ]
    if figures.places:
        share = figures.anchors / figures.places
        lines.append(f"anchors: {figures.anchors / figures.sequences:.1f} in a sequence, {share:.1%} of their places")
    return lines


def print_documents(batch: Batch, names: Any, tokenizer: Any, count: int, console: Console) -> None:
    """The first documents of a batch, sequence after sequence."""
    plain = console.color_system is None
    console.print(
        Text.assemble(
            "context is ",
            ("dim", "dim"),
            ", what is predicted is ",
            ("green", "green"),
            "; a block of masks stands behind a ",
            ("token", "reverse"),
            "",
        )
        if not plain
        else "what is predicted stands in «»; a block of masks stands behind a token with ^"
    )
    shown = 0
    for row, segments in enumerate(batch["segments"]):
        for segment in range(1, int(segments.max()) + 1):
            if shown == count:
                return
            inside = np.flatnonzero(segments == segment)
            name = names[batch["documents"][row][inside[0]]].name
            console.rule(Text(f"{name}, {len(inside)} rows of sequence {row}"), align="left")
            console.print(_document(batch, row, inside, tokenizer, plain), soft_wrap=True)
            shown += 1


def _document(batch: Batch, row: int, inside: np.ndarray, tokenizer: Any, plain: bool) -> Text:
    supervised = batch["supervised"][row]
    predicted = np.append(False, supervised[inside[:-1]])  # a token is what the row before it predicts
    anchors = set(batch["anchors"][row].tolist()) if "anchors" in batch else set()
    first = int(np.argmax(predicted)) if predicted.any() else 0
    start = max(0, min(first - _SHOWN // 4, len(inside) - _SHOWN))
    text = Text("..." if start else "")
    for place in range(start, min(len(inside), start + _SHOWN)):
        if plain and predicted[place] and not (place > start and predicted[place - 1]):
            text.append("«")
        token = tokenizer.decode([int(batch["tokens"][row][inside[place]])], clean_up_tokenization_spaces=False)
        anchored = inside[place] in anchors
        style = ("green" if predicted[place] else "dim") + (" reverse" if anchored else "")
        text.append(token + ("^" if plain and anchored else ""), style)
        if plain and predicted[place] and (place + 1 == len(inside) or not predicted[place + 1]):
            text.append("»")
    return text.append("..." if start + _SHOWN < len(inside) else "")
