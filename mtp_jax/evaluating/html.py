"""The results of an evaluation as one HTML page that needs no other file and no script."""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jinja2

from mtp_jax.evaluating.results import Results, Sample
from mtp_jax.evaluating.tables import benchmark_table, differences, head, main_figures, sentence, suite_tables

_TEMPLATE = Path(__file__).with_name("template.html")
_COLOURS = 4  # of passes, as many as the template has


class Drawing(NamedTuple):
    """A plot in the page."""

    title: str
    caption: str
    svg: str  # an element


class _Pass(NamedTuple):
    step: int
    text: str
    colour: int


def page(results: Results, drawings: Iterable[Drawing] = ()) -> str:
    """The whole of report.html; every text of the results is escaped."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    suites = {suite["name"]: suite for suite in results["suites"]}
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        results=results,
        sentence=sentence(results),
        figures=main_figures(results),
        head=head(results),
        benchmarks=benchmark_table(results),
        drawings=list(drawings),
        suites=[(suite, suite_tables(results, suite)) for suite in results["suites"]],
        differences=differences(results),
        samples=[(sample, suites[sample["suite"]]["title"], _passes(sample)) for sample in results["samples"]],
    )


def _passes(sample: Sample) -> list[_Pass]:
    """The text of each pass, in colours of which no two neighbours are equal."""
    by_step = itertools.groupby(sample["pieces"], key=lambda piece: piece[1])
    texts = ((step, "".join(text for text, _ in pieces)) for step, pieces in by_step)
    shown = [(step, text) for step, text in texts if text]  # a pass may write half a character, which is no text yet
    return [_Pass(step, text, i % _COLOURS) for i, (step, text) in enumerate(shown)]
