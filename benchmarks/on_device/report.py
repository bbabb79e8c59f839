"""DIR/report.md and report.png from the figures of the parts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtp_jax.files import read_json, write_whole

_PARTS = ("correct", "steps", "decode", "train", "adapter")


def write_report(out: Path) -> Path:
    """Write what there is; returns the report's file."""
    parts = {part: read_json(out / f"{part}.json") for part in _PARTS if (out / f"{part}.json").is_file()}
    pieces = [_TITLE]
    for part, found in parts.items():
        pieces += [f"## {_HEADS[part]}", _about(found)]
        good = {name: case for name, case in found["cases"].items() if "error" not in case}
        pieces += _WRITERS[part](good)
        bad = [f"- {name}: {_line(case['error'])}" for name, case in found["cases"].items() if "error" in case]
        if bad:
            pieces += ["Failed:", "\n".join(bad)]
    if _plot(parts, out / "report.png"):
        pieces.insert(1, "![time of a step against its rows, and speed with forced acceptance](report.png)")
    write_whole(out / "report.md", ("\n\n".join(pieces) + "\n").encode())
    return out / "report.md"


_TITLE = "# On this device"
_HEADS = {
    "correct": "Correct",
    "steps": "Decoding steps",
    "decode": "Decoding with forced acceptance",
    "train": "Training steps",
    "adapter": "An adapter trained here",
}


def _about(found: dict[str, Any]) -> str:
    setting = found["setting"]
    model = setting["decoding"] if found["part"] in ("steps", "decode") else ", ".join(setting["training"])
    shapes = {"correct": "", "adapter": ""}.get(found["part"], f", {model}, rank {setting['rank']}, {setting['dtype']}")
    count = f"{found['devices']} x " if found["devices"] > 1 else ""
    return f"{count}{found['device']}, jax {found['versions']['jax']}{shapes}{', rehearsal' if setting['tiny'] else ''}"


def _correct(cases: dict[str, Any]) -> Iterator[str]:
    rows = []
    for name, case in cases.items():
        verdict = {True: "yes", False: "NO"}.get(case.get("right"), "")
        rows.append([name, verdict, _line(", ".join(f"{k} {_short(v)}" for k, v in case.items() if k != "right"))])
    yield _table(["check", "right", "figures"], rows)


def _steps(cases: dict[str, Any]) -> Iterator[str]:
    for name, case in cases.items():
        if name == "drafting":
            plain = case["seconds"]["none"]
            rows = [[what, f"{1e3 * s:.3f}", f"{s / plain:.2f}x"] for what, s in case["seconds"].items()]
            yield f"What drafting takes of a step of {case['plan']}, batch {case['batch']}:"
            yield _table(["drafts from", "ms", "against none"], rows)
            continue
        plain = case["plans"]["none"]["seconds"]
        rows = [
            [
                plan,
                str(of["rows"]),
                f"{1e3 * of['seconds']:.3f}",
                f"{of['seconds'] / plain:.2f}x",
                f"{of['of_bound']:.0%}",
            ]
            for plan, of in case["plans"].items()
        ]
        yield f"{name}; a large sum reads {case['bytes_per_second'] / 1e9:.0f} GB/s:"
        yield _table(["plan", "rows", "ms", "against none", "of the bandwidth bound"], rows)


def _decode(cases: dict[str, Any]) -> Iterator[str]:
    for name, case in cases.items():
        rows = [
            [plan, f"{of['tokens_per_step']:.2f}", f"{of['tokens_per_second']:.0f}", f"{of['speedup']:.2f}x"]
            for plan, of in case["plans"].items()
        ]
        yield f"{name}, {case['new_tokens']} tokens behind {case['context']}; acceptance is {case['acceptance']}:"
        yield _table(["plan", "tokens per step (forced)", "tokens/s (forced)", "against none (forced)"], rows)


def _train(cases: dict[str, Any]) -> Iterator[str]:
    rows = []
    for name, case in cases.items():
        if "of_peak" not in case:
            yield f"{name}: {case['faster']:.1f}x as fast, gradients differ by {case['gradients_differ_by']:.1e}"
            continue
        share = "" if case["of_peak"] is None else f"{case['of_peak']:.0%}"
        memory = case["peak_bytes"] or case["temporaries_bytes"]
        numbers = [f"{case['seconds']:.3f}", f"{case['tokens_per_second']:.0f}", f"{case['mask_rows_per_second']:.0f}"]
        rows.append(
            [f"{name} ({case['kernel']})", *numbers, f"{case['model_tflop']:.1f}", share, f"{memory / 2**30:.1f}"]
        )
    yield _table(["step", "s", "tokens/s", "mask rows/s", "TFLOP", "of peak", "GiB"], rows)


def _adapter(cases: dict[str, Any]) -> Iterator[str]:
    if "train" in cases:
        yield f"{cases['train']['steps']} steps in {cases['train']['seconds']:.0f} s: `{cases['train']['command']}`"
    rows = [
        [row["suite"], row["decoder"], _short(row["tokens_per_step"]), _short(row["speedup"])]
        for row in cases.get("evaluate", {}).get("rows", [])
    ]
    if rows:
        yield _table(["suite", "decoder", "tokens per step", "speed-up"], rows)


_WRITERS = {"correct": _correct, "steps": _steps, "decode": _decode, "train": _train, "adapter": _adapter}


def _plot(parts: dict[str, Any], file: Path) -> bool:
    """Time of a step against rows, and speed with forced acceptance; False where there is nothing to draw with."""
    try:
        import matplotlib
    except ImportError:
        return False
    if not parts.keys() & {"steps", "decode"}:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    picture, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for name, case in parts.get("steps", {"cases": {}})["cases"].items():
        if "plans" in case:
            points = sorted(
                (of["rows"], of["seconds"] / case["plans"]["none"]["seconds"]) for of in case["plans"].values()
            )
            left.plot(*zip(*points, strict=True), marker="o", label=name)
    left.set(xlabel="rows of a step", ylabel="time against a plain step", xscale="log")
    for name, case in parts.get("decode", {"cases": {}})["cases"].items():
        if "plans" in case:
            right.plot(list(case["plans"]), [of["speedup"] for of in case["plans"].values()], marker="o", label=name)
    right.set(ylabel="speed against none (forced)")
    right.tick_params(axis="x", rotation=30)
    for axes in (left, right):
        if axes.lines:
            axes.legend()
    picture.savefig(file, dpi=120)
    pyplot.close(picture)
    return True


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return "; ".join(f"{name} {_short(of)}" for name, of in value.items())
    return str(value)


def _line(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")[:300]
