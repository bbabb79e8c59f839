"""Plots of an evaluation. They need matplotlib, the extra `plot`."""

import contextlib
import io
import itertools
import math
import re
from collections.abc import Callable, Iterator
from statistics import fmean, geometric_mean
from typing import TYPE_CHECKING, Any, NamedTuple

from mtp_jax.evaluating import paper
from mtp_jax.evaluating.results import Results
from mtp_jax.evaluating.tables import OF_MASKS, PLAIN, kind_of, quadratic_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 4.2  # inches: as wide as a phone, so that text keeps its size there
_LEGEND_COLUMNS = 2
_INK, _GRID = "#24292f", "#d8dee4"
# Of Okabe and Ito, which the colour-blind can tell apart; with a marker each, for more lines than colours.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DRAFTING = (*OF_MASKS, "lookup", "jacobi")  # a step's cost is that of its rows


class Plot(NamedTuple):
    """A plot: the name of its file, what it shows, and how it is drawn (None: there is nothing to draw)."""

    name: str
    title: str
    caption: str
    draw: Callable[[Results], "Figure | None"]


def tokens_per_step(results: Results) -> "Figure | None":
    """Tokens per step against masks, a line for each suite, with the paper's curves."""
    by_suite = quadratic_rows(results)
    if not by_suite:
        return None
    figure, (axes,) = _sheet([len(by_suite) + 1])
    own, drawn = set(by_suite), set()
    styles = zip(results["suites"], itertools.cycle(_COLOURS), itertools.cycle(_MARKERS), strict=False)
    for suite, colour, marker in styles:
        points = [
            (masks, row["tokens_per_step"])
            for masks, row in by_suite.get(suite["name"], {}).items()
            if row["tokens_per_step"]
        ]
        if not points:
            continue
        points.sort(key=lambda point: point[0])
        means = [steps["mean"] for _, steps in points]
        below, above = ([abs(steps[end] - steps["mean"]) for _, steps in points] for end in ("low", "high"))
        masks = [masks for masks, _ in points]
        axes.errorbar(masks, means, (below, above), color=colour, marker=marker, label=suite["title"], elinewidth=1)
        theirs = paper.nearest(suite["name"], suite["domain"])
        if theirs and theirs not in drawn and (theirs == suite["name"] or theirs not in own):
            drawn.add(theirs)
            curve = paper.TABLE_1[theirs].tokens_per_step
            axes.plot(range(1, len(curve) + 1), curve, color=colour, linestyle="--", linewidth=1, alpha=0.75)
    if drawn:
        axes.errorbar([], [], color=_INK, linestyle="--", linewidth=1, label=paper.LABEL)  # as the others, to be last
    axes.set(xlabel="masks", ylabel="tokens per step", ylim=(1, None))
    _whole_numbers(axes)
    _legend(axes)
    return figure


def acceptance(results: Results) -> "Figure | None":
    """The probability that the first j drafts are accepted: by suite, and by way of drafting."""
    by_suite = {
        name: rows[max(rows)]["acceptance"]
        for name, rows in quadratic_rows(results).items()
        if rows[max(rows)]["acceptance"]
    }
    by_decoder = _longest_of_each_kind(results)
    panels = [
        (title, curves)
        for title, curves in (
            (
                "quadratic decoding, by suite",
                {_title(results, name): curve for name, curve in by_suite.items() if curve},
            ),
            ("mean over suites, by decoder", by_decoder),
        )
        if curves
    ]
    if not panels:
        return None
    figure, sheets = _sheet([len(curves) for _, curves in panels])
    for axes, (title, curves) in zip(sheets, panels, strict=True):
        styles = zip(curves.items(), itertools.cycle(_COLOURS), itertools.cycle(_MARKERS), strict=False)
        for (name, curve), colour, marker in styles:
            axes.plot(range(1, len(curve) + 1), curve, color=colour, marker=marker, label=name, clip_on=False)
        axes.set(xlabel="draft j", ylabel="probability of j accepted", ylim=(0, 1))
        _whole_numbers(axes)
        axes.set_title(title)
        _legend(axes)
    return figure


def time(results: Results) -> "Figure | None":
    """Seconds of a step over those of a plain step, against its rows, beside the tokens it gains."""
    plain = {
        (row["suite"], row["batch_size"]): row["step_seconds"]
        for row in results["rows"]
        if row["decoder"] == PLAIN and row["step_seconds"]
    }
    costs: dict[int, dict[int, list[float]]] = {}  # of a step, by batch size and rows
    gains: dict[str, dict[int, list[float]]] = {}  # tokens per step, by kind and rows
    for row in results["rows"]:
        of_plain = plain.get((row["suite"], row["batch_size"]))
        if row["rows"] is None or not row["step_seconds"] or not of_plain:
            continue
        kind = kind_of(row["decoder"])
        if kind in (PLAIN, *_DRAFTING):
            by_rows = costs.setdefault(row["batch_size"], {})
            by_rows.setdefault(row["rows"], []).append(row["step_seconds"] / of_plain)
        if kind in _DRAFTING and row["tokens_per_step"]:
            gains.setdefault(kind, {}).setdefault(row["rows"], []).append(row["tokens_per_step"]["mean"])
    if not gains:
        return None
    figure, (axes,) = _sheet([len(costs) + len(gains)])
    for batch_size, colour, marker in zip(
        sorted(costs), itertools.cycle(_COLOURS), itertools.cycle(_MARKERS), strict=False
    ):
        points = sorted((rows, geometric_mean(ratios)) for rows, ratios in costs[batch_size].items())
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=f"time, batch {batch_size}")
    for kind, marker in zip(gains, itertools.cycle(_MARKERS), strict=False):
        points = sorted((rows, fmean(means)) for rows, means in gains[kind].items())
        line: dict[str, Any] = {
            "color": _INK,
            "linestyle": ":",
            "linewidth": 1,
            "marker": marker,
            "markerfacecolor": "none",
        }
        axes.plot(*zip(*points, strict=True), **line, label=f"tokens, {kind}")
    axes.set(xlabel="rows of a step", ylabel="a plain step = 1")
    _doubling(axes)
    _legend(axes)
    return figure


PLOTS = (
    Plot(
        "tokens_per_step",
        "Tokens per step by number of masks",
        "Quadratic decoding, with 95% bootstrap intervals over prompts. Dashed: the paper's 8B model on the same "
        "benchmark, or on one of the same domain.",
        tokens_per_step,
    ),
    Plot(
        "time",
        "Time of a step by its rows",
        "Solid: the time of a step, where a plain step takes 1. Dotted: the tokens that it writes, where a plain step "
        "writes 1. Drafts save time where the tokens lie above the time.",
        time,
    ),
    Plot(
        "acceptance",
        "Acceptance by depth",
        "How often the first j drafts of a step are all accepted: with the plan that has the most masks, and with the "
        "longest drafts of each way to draft.",
        acceptance,
    ),
)


def _title(results: Results, name: str) -> str:
    return next(suite["title"] for suite in results["suites"] if suite["name"] == name)


def _longest_of_each_kind(results: Results) -> dict[str, list[float]]:
    """Mean acceptance over suites of the decoder with the most drafts, of each kind that was run on every suite."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in results["rows"]:
        if row["acceptance"] and kind_of(row["decoder"]) != "auto":
            found.setdefault(row["decoder"], {}).setdefault(row["suite"], row["acceptance"])
    longest: dict[str, tuple[str, list[float]]] = {}
    for decoder, by_suite in found.items():
        if len(by_suite) == len(results["suites"]):
            curve = [fmean(column) for column in zip(*by_suite.values(), strict=False)]
            kind = kind_of(decoder)
            if kind not in longest or len(curve) > len(longest[kind][1]):
                longest[kind] = decoder, curve
    return dict(longest.values())


# ---- paper and ink


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Sizes and colours of a plot, for drawing and for writing it."""
    import matplotlib

    wanted: dict[Any, Any] = {
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.color": _GRID,
        "grid.linewidth": 0.7,
        "font.size": 9,
        "axes.titlesize": 9,
        "legend.frameon": False,
        "lines.linewidth": 1.6,
        "lines.markersize": 4.5,
        "text.parse_math": False,  # a title may hold dollars
        "svg.hashsalt": "mtp_jax",  # the same plot is the same file
    }
    with matplotlib.rc_context(wanted):
        yield


def _sheet(entries: list[int]) -> "tuple[Figure, list[Axes]]":
    """A panel below the other for each legend of so many entries."""
    from matplotlib.figure import Figure

    heights = [2.6 + 0.17 * math.ceil(count / _LEGEND_COLUMNS) for count in entries]
    figure = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
    return figure, list(figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])


def _legend(axes: "Axes") -> None:
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=_LEGEND_COLUMNS, handlelength=2.6, columnspacing=1.2
    )


def _whole_numbers(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _doubling(axes: "Axes") -> None:
    """Axes by factors of 2, with plain numbers; the upright one only where it spans several."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    tall = axes.get_ylim()[1] > 4
    axes.set(xscale="log", yscale="log" if tall else "linear")
    for axis in (axes.xaxis, axes.yaxis)[: 1 + tall]:
        axis.set_major_locator(LogLocator(base=2))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
        axis.set_tick_params(which="minor", length=0)


def png(figure: "Figure") -> bytes:
    """A figure as a PNG file, on white."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return file.getvalue()


def svg(figure: "Figure", name: str) -> str:
    """A figure as an SVG element to stand in a page.

    Its ids begin with `name`, and its colours are the page's variables --ink, --grid and --series-0, ...
    """
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    drawn = file.getvalue()
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
    drawn = re.sub(r'\sxmlns(:xlink)?="[^"]*"| (width|height)="[\d.]+pt"', "", drawn)  # needless within HTML
    drawn = drawn.replace("xlink:href", "href").replace("*{", "svg *{")
    drawn = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", drawn)
    variables = {_INK: "ink", _GRID: "grid"} | {colour: f"series-{i}" for i, colour in enumerate(_COLOURS)}
    for colour, variable in variables.items():
        drawn = drawn.replace(colour, f"var(--{variable})")
    return drawn
