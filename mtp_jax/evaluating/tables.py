"""The tables of a report and its main figures, in words: what Markdown and the HTML page both show."""

import itertools
from collections.abc import Callable, Iterable
from statistics import fmean, geometric_mean
from typing import Literal, NamedTuple

from mtp_jax.evaluating import paper
from mtp_jax.evaluating.results import Identical, Results, Row, Suite

PLAIN = "none"
_PAPER_MASKS = range(1, 9)
OF_MASKS = tuple(kind + behind for behind in ("", "+lookup") for kind in ("quadratic", "linear", "blocks"))
_MASKS_DRAFT = (*OF_MASKS, "auto")
_WITHOUT_ADAPTER = ("lookup", "jacobi", "draft")


class Cell(NamedTuple):
    """A value, and what stands beside it: an interval, or a remark."""

    value: str
    interval: str = ""
    remark: str = ""


class Line(NamedTuple):
    """A line of a table."""

    cells: tuple[Cell, ...]
    kind: Literal["measured", "mean", "paper"] = "measured"


class Table(NamedTuple):
    """A table, of whose columns the first `names` hold words and the others numbers."""

    title: str
    heads: tuple[str, ...]
    lines: tuple[Line, ...]
    names: int


class MainFigure(NamedTuple):
    """One of the figures at the top."""

    label: str
    value: str
    note: str


class Differences(NamedTuple):
    """Where outputs differ from those of plain decoding."""

    ties: list[str]
    faults: list[str]


def kind_of(decoder: str) -> str:
    """How a decoder drafts: the name of its plan without numbers, lookup, jacobi, draft, transformers or none."""
    masks, plus, _ = decoder.partition("+")
    return masks.partition(":")[0].partition(" ")[0] + ("+lookup" if plus else "")


def quadratic_rows(results: Results) -> dict[str, dict[int, Row]]:
    """Rows of quadratic decoding by suite, in the suites' order, and masks; each at its smallest batch size."""
    found: dict[str, dict[int, Row]] = {suite["name"]: {} for suite in results["suites"]}
    for row in sorted(results["rows"], key=lambda row: row["batch_size"]):
        if kind_of(row["decoder"]) == "quadratic" and row["masks"] and row["tokens_per_step"]:
            found[row["suite"]].setdefault(row["masks"], row)
    return {suite: rows for suite, rows in found.items() if rows}


def main_batch_size(results: Results) -> int:
    """The batch size that the figures at the top are of: the smallest."""
    return min(results["settings"]["batch_sizes"])


def of_all_suites(
    results: Results, value: Callable[[Row], float | None], mean: Callable[[Iterable[float]], float]
) -> dict[str, float]:
    """A mean over suites by decoder, at the main batch size; only decoders that have the value on every suite."""
    found: dict[str, dict[str, float]] = {}
    for row in results["rows"]:
        figure = value(row)
        if row["batch_size"] == main_batch_size(results) and figure is not None:
            found.setdefault(row["decoder"], {})[row["suite"]] = figure
    return {name: mean(by.values()) for name, by in found.items() if len(by) == len(results["suites"])}


def mean_tokens_per_step(results: Results) -> dict[str, float]:
    """Mean tokens per step over suites, by decoder."""
    return of_all_suites(results, lambda row: row["tokens_per_step"] and row["tokens_per_step"]["mean"], fmean)


def mean_speedup(results: Results) -> dict[str, float]:
    """Geometric mean over suites of the speed-up over plain decoding, by decoder."""
    return of_all_suites(results, lambda row: row["speedup"] and row["speedup"]["median"], geometric_mean)


# ---- the top


def sentence(results: Results) -> str:
    """What the evaluation found, in one sentence."""
    suites = _count(len(results["suites"]), "suite")
    steps, speeds = _best(mean_tokens_per_step(results), _MASKS_DRAFT), _best(mean_speedup(results), _MASKS_DRAFT)
    if results["adapter"] is None or steps is None:
        return f"{results['model']} {'without an' if results['adapter'] is None else 'with its'} adapter, on {suites}."
    found = f"With its adapter, {results['model']} writes {steps[1]:.2f} tokens per step ({steps[0]})"
    over = f"on average over {suites}" if len(results["suites"]) > 1 else f"on {results['suites'][0]['title']}"
    if speeds is None:
        return f"{found} {over}."
    decoder, speed = speeds
    batch = f"batch {main_batch_size(results)}"
    if speed > 1:
        return f"{found} and runs {speed:.2f} times as fast as without drafts ({decoder}, {batch}), {over}."
    return f"{found} {over}, but no plan is faster than plain decoding: {decoder} runs at {speed:.2f}x ({batch})."


def main_figures(results: Results) -> list[MainFigure]:
    """Tokens per step, speed-up, identical outputs, and the fastest way to draft without an adapter."""
    batch, found = f"batch {main_batch_size(results)}", []
    if best := _best(mean_tokens_per_step(results), _MASKS_DRAFT):
        found.append(MainFigure("tokens per step", f"{best[1]:.2f}", f"{best[0]}, {_over(results, 'mean')}"))
    speeds = mean_speedup(results)
    for label, kinds in (("speed-up", _MASKS_DRAFT), ("speed-up without an adapter", _WITHOUT_ADAPTER)):
        if best := _best(speeds, kinds):
            note = f"{best[0]}, {batch}, {_over(results, 'geometric mean')}"
            found.append(MainFigure(label, f"{best[1]:.2f}x", note))
    checked = [row["identical"] for row in results["rows"] if row["identical"] and _drafts_here(row["decoder"])]
    if checked:
        every = Identical(
            same=sum(one["same"] for one in checked),
            of=sum(one["of"] for one in checked),
            ties=[tie for one in checked for tie in one["ties"]],
            faults=[fault for one in checked for fault in one["faults"]],
        )
        note = _differing(every) or "as without drafts, with every way to draft"
        found.append(MainFigure("identical outputs", f"{every['same']}/{every['of']}", note))
    return found


def _best(figures: dict[str, float], kinds: tuple[str, ...]) -> tuple[str, float] | None:
    of = {decoder: figure for decoder, figure in figures.items() if kind_of(decoder) in kinds}
    return max(of.items(), key=lambda item: item[1]) if of else None


def _over(results: Results, mean: str) -> str:
    suites = results["suites"]
    return suites[0]["title"] if len(suites) == 1 else f"{mean} of {len(suites)} suites"


def _drafts_here(decoder: str) -> bool:
    return kind_of(decoder) in (*_MASKS_DRAFT, *_WITHOUT_ADAPTER)


def _count(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


# ---- Table 1


def benchmark_table(results: Results) -> Table | None:
    """Tokens per step by suite and masks, shaped like the paper's Table 1, with its figures below ours."""
    by_suite = quadratic_rows(results)
    if not by_suite:
        return None
    ours = {
        name: {masks: row["tokens_per_step"]["mean"] for masks, row in rows.items() if row["tokens_per_step"]}
        for name, rows in by_suite.items()
    }
    theirs = {
        name: dict(zip(_PAPER_MASKS, paper.TABLE_1[name].tokens_per_step, strict=True))
        for name in ours
        if name in paper.TABLE_1
    }
    masks = sorted({*_PAPER_MASKS, *itertools.chain.from_iterable(ours.values())})

    def line(skill: str, name: str, values: dict[int, float], kind: Literal["measured", "mean", "paper"]) -> Line:
        figures = (f"{values[M]:.2f}" if M in values else "" for M in masks)
        return Line(tuple(map(Cell, (skill, name, *figures))), kind)

    lines, domain = [], None
    for suite in _by_domain([suite for suite in results["suites"] if suite["name"] in ours]):
        name = suite["name"]
        lines.append(line("" if suite["domain"] == domain else suite["domain"], suite["title"], ours[name], "measured"))
        if name in theirs:
            lines.append(line("", paper.LABEL, theirs[name], "paper"))
        domain = suite["domain"]
    if len(ours) > 1:
        lines.append(line("mean", f"{len(ours)} suites", _means(ours), "mean"))
        if 1 < len(theirs) < len(ours):
            shared = {name: ours[name] for name in theirs}
            lines.append(line("", f"the {len(shared)} of the paper", _means(shared), "mean"))
        if len(theirs) > 1:
            lines.append(line("", paper.LABEL, _means(theirs), "paper"))
    return Table("Tokens per step by number of masks", ("skill", "suite", *map(str, masks)), tuple(lines), names=2)


def _by_domain(suites: list[Suite]) -> list[Suite]:
    """Suites of one domain side by side, domains and suites otherwise in their order."""
    order = list(dict.fromkeys(suite["domain"] for suite in suites))
    return sorted(suites, key=lambda suite: order.index(suite["domain"]))


def _means(figures: dict[str, dict[int, float]]) -> dict[int, float]:
    """Means over suites, for the numbers of masks that every suite has."""
    common = set.intersection(*(set(by) for by in figures.values()))
    return {M: fmean(by[M] for by in figures.values()) for M in common}


# ---- a suite


def suite_tables(results: Results, suite: Suite) -> list[Table]:
    """Every decoder on a suite, one table for each batch size; columns that would be empty are left out."""
    of_suite = [row for row in results["rows"] if row["suite"] == suite["name"]]
    ours = ("decoder", "tokens per step", "tokens/s", "speed-up", "identical")
    heads = (*ours, suite["metric"] or "score", "estimate", "estimate, two passes")
    tables = []
    for batch_size in dict.fromkeys(row["batch_size"] for row in of_suite):
        lines = [_cells(row) for row in of_suite if row["batch_size"] == batch_size]
        kept = [i for i in range(len(heads)) if any(cells[i].value for cells in lines)]
        tables.append(
            Table(
                f"{suite['title']}, batch {batch_size}",
                tuple(heads[i] for i in kept),
                tuple(Line(tuple(cells[i] for i in kept)) for cells in lines),
                names=1,
            )
        )
    return tables


def _cells(row: Row) -> tuple[Cell, ...]:
    steps, rate, speedup, same = row["tokens_per_step"], row["tokens_per_second"], row["speedup"], row["identical"]
    chosen = f"took {row['plan']}" if row["plan"] else ""
    if row["calibrated_apart"] is False:
        chosen += ", calibrated on the questions measured"
    return (
        Cell(row["decoder"], remark=chosen),
        Cell(f"{steps['mean']:.2f}", f"[{steps['low']:.2f}, {steps['high']:.2f}]") if steps else Cell(""),
        Cell(_rate(rate["median"]), f"[{_rate(rate['low'])}, {_rate(rate['high'])}]") if rate else Cell(""),
        Cell(f"{speedup['median']:.2f}x", f"[{speedup['low']:.2f}, {speedup['high']:.2f}]") if speedup else Cell(""),
        Cell(f"{same['same']}/{same['of']}", remark=_differing(same)) if same else Cell(""),
        Cell(f"{row['score']:.3f}") if row["score"] is not None else Cell(""),
        *(Cell("" if of is None else f"{of:.2f}") for of in (row["estimate"], row["estimate_two_passes"])),
    )


def _rate(tokens_per_second: float) -> str:
    return f"{tokens_per_second:.1f}" if tokens_per_second < 100 else f"{tokens_per_second:.0f}"


def _differing(identical: Identical) -> str:
    counts = ((len(identical["ties"]), "tie"), (len(identical["faults"]), "fault"))
    return ", ".join(_count(count, what) for count, what in counts if count)


def differences(results: Results) -> Differences:
    """Every output that differs from plain decoding's, with its suite, decoder and batch size."""
    titles, found = {suite["name"]: suite["title"] for suite in results["suites"]}, Differences([], [])
    for row in results["rows"]:
        if row["identical"]:
            place = f"{titles[row['suite']]}, {row['decoder']}, batch {row['batch_size']}"
            found.ties.extend(f"{place}: {text}" for text in row["identical"]["ties"])
            found.faults.extend(f"{place}: {text}" for text in row["identical"]["faults"])
    return found


def head(results: Results) -> list[tuple[str, str]]:
    """What was evaluated, on what, and how."""
    settings = {name.replace("_", " "): value for name, value in results["settings"].items() if value is not None}
    facts = [
        ("model", results["model"]),
        ("weights", None if results["weights"] == "stored" else results["weights"]),
        ("adapter", results["adapter"]),
        ("masks", results["masks"]),
        ("draft model", results["draft_model"]),
        ("device", results["device"]),
        ("dtype", results["dtype"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in results["versions"].items())),
        ("settings", "; ".join(f"{name} {_setting(value)}" for name, value in settings.items())),
    ]
    return [(name, str(fact)) for name, fact in facts if fact is not None]


def _setting(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {one}" for name, one in value.items() if one is not None)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
