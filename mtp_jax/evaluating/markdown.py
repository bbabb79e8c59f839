"""The results of an evaluation as Markdown."""

import re
from collections.abc import Iterable

from mtp_jax.evaluating.results import Results
from mtp_jax.evaluating.tables import (
    Cell,
    Table,
    benchmark_table,
    differences,
    head,
    main_figures,
    sentence,
    suite_tables,
)


def markdown(results: Results, pictures: Iterable[tuple[str, str]] = ()) -> str:
    """The whole of results.md.

    Args:
        pictures: a title and the name of a file beside it.
    """
    parts = [
        "# Evaluation",
        _text(sentence(results)),
        "\n".join(f"- {figure.label}: **{figure.value}** ({_text(figure.note)})" for figure in main_figures(results)),
        "| | |\n|---|---|\n" + "\n".join(f"| {name} | {_text(fact)} |" for name, fact in head(results)),
        "    " + " ".join(results["command"].split()),
    ]
    if table := benchmark_table(results):
        parts += [f"## {table.title}", _table(table)]
        parts.append("Quadratic decoding. Below ours, the paper's figures (arXiv 2507.11851) on the same benchmark.")
    parts += [f"![{_text(title)}]({file})" for title, file in pictures]
    parts.append("## Decoders by suite")
    parts.append(
        "Tokens per step with a 95% bootstrap interval over prompts; tokens per second, and speed-up over plain "
        "decoding in the same round, as the median with the lowest and the highest round."
    )
    for suite in results["suites"]:
        parts.append(f"### {_text(suite['title'])}")
        parts.append(f"{_text(suite['domain'])}, {suite['prompts']} prompts of {_text(suite['source'])}")
        for table in suite_tables(results, suite):
            parts += [f"**{_text(table.title)}**", _table(table)]
    found = differences(results)
    if found.faults:
        parts += ["## Faults", "Outputs that differ from plain decoding's:", _list(found.faults)]
    if found.ties:
        parts += ["## Ties", "Outputs that differ from a token on whose logit equals another's but for rounding:"]
        parts.append(_list(found.ties))
    return "\n\n".join(part for part in parts if part) + "\n"


def _text(text: str) -> str:
    """Text on one line that Markdown takes literally."""
    return re.sub(r"([\\`*<>\[\]|]|(?<!\w)_|_(?!\w)|&(?=#?\w+;))", r"\\\1", " ".join(text.split()))


def _table(table: Table) -> str:
    rule = ["---"] * table.names + ["--:"] * (len(table.heads) - table.names)
    lines = [
        [_text(name) for name in table.heads],
        rule,
        *([_cell(cell) for cell in line.cells] for line in table.lines),
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(cell: Cell) -> str:
    remark = f"({_text(cell.remark)})" if cell.remark else ""
    return " ".join(filter(None, (_text(cell.value), cell.interval, remark)))


def _list(items: list[str]) -> str:
    return "\n".join(f"- {_text(item)}" for item in items)
