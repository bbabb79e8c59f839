"""What an evaluation writes: its results as JSON, as Markdown, as plots and as one HTML page."""

import json
from pathlib import Path

from mtp_jax.errors import UserError, warn
from mtp_jax.evaluating.html import Drawing, page
from mtp_jax.evaluating.markdown import markdown
from mtp_jax.evaluating.plots import PLOTS, png, style, svg
from mtp_jax.evaluating.results import Results
from mtp_jax.files import write_whole


def write_report(results: Results, out: Path) -> None:
    """Write results.json, results.md, a PNG file for each plot, and report.html, each of them whole.

    Without matplotlib there are no plots, and a warning says so. Plots of earlier results do not stay.

    Raises:
        UserError: a folder that cannot be written.
    """
    drawings, pictures = [], {}
    if _can_draw():
        with style():
            for plot in PLOTS:
                if figure := plot.draw(results):
                    pictures[f"{plot.name}.png"] = plot.title, png(figure)
                    drawings.append(Drawing(plot.title, plot.caption, svg(figure, plot.name)))
    files = {
        "results.json": (json.dumps(results, indent=2) + "\n").encode(),
        "results.md": markdown(results, [(title, name) for name, (title, _) in pictures.items()]).encode(),
        **{name: data for name, (_, data) in pictures.items()},
        "report.html": page(results, drawings).encode(),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            write_whole(out / name, data)
        for plot in PLOTS:
            if f"{plot.name}.png" not in files:
                (out / f"{plot.name}.png").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error}).") from error


def _can_draw() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        warn("matplotlib is not installed, so the report has no plots; pip install 'mtp_jax[plot]' brings it.")
        return False
    return True
