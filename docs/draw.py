"""Draw the pictures of how-it-works.md from the functions that training itself calls.

    python docs/draw.py                 writes docs/pictures/; needs the extra `plot`

Anchors, targets and the keys that a row sees are computed by the package; only the diagram of the two streams is drawn
by hand.
"""

import argparse
import io
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import Image
from rich.console import Console
from rich.text import Text

from mtp_jax.api import load
from mtp_jax.decoding.plan import quadratic
from mtp_jax.decoding.show import PassWriter
from mtp_jax.model.attention import LayerCache, RealRows, Scores, attend_blocks, visibility
from mtp_jax.mtp.blocks import Targets, blocks_of, choose_anchors, hash_positions, targets_of

PICTURES = Path(__file__).parent / "pictures"
SENTENCE = ("The", "cat", "sat", "on", "the", "mat")
NEIGHBOUR = ("It", "slept", "well")  # another document of the same packed sequence
NUMBER = 61  # of the sentence's document, which its anchors are drawn by
M = 3
G = 2
PROMPT = 'def parse_header(line):\n    """Parse a Content-type like header.\n'

# The colours of Okabe and Ito, which the colour-blind can tell apart, and shades of them.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#6E6E6E"
PALE_BLUE, PALE_ORANGE, PALE_GREEN, PALE_RED = "#D3E6F3", "#FBE7BD", "#CDEBE1", "#F8DCC8"
DARK_BLUE, DARK_ORANGE, DARK_GREEN, DARK_RED = "#004B7A", "#8A5200", "#00593F", "#963F00"  # for small text


class Example(NamedTuple):
    """A batch of one packed sequence, with the words that its token ids stand for."""

    words: tuple[str, ...]
    batch: dict[str, np.ndarray]  # as the data pipeline makes it, [1, T] and anchors [1, G]


class Row(NamedTuple):
    """A row of the literal packing."""

    kind: str  # "real" or "mask"
    at: int  # the real row itself, or the anchor of a mask row's block
    offset: int  # 0, or j of m_j
    segment: int
    position: int


def make_example(documents: tuple[tuple[str, ...], ...], count: int | None) -> Example:
    """Documents one behind the other, every token but their last supervised, with `count` anchors or all."""
    words = tuple(word for document in documents for word in document)
    lengths = [len(document) for document in documents]
    segments = np.repeat(np.arange(1, len(documents) + 1), lengths).astype(np.int32)
    hashes = np.concatenate([hash_positions(0, 0, NUMBER + i, np.arange(length)) for i, length in enumerate(lengths)])
    tokens = np.arange(len(words), dtype=np.int32)  # token id i stands for word i
    supervised = np.append(segments[1:] == segments[:-1], False)
    fields = {
        "tokens": tokens,
        "labels": np.append(tokens[1:], 0).astype(np.int32),
        "supervised": supervised,
        "positions": np.concatenate([np.arange(length) for length in lengths]).astype(np.int32),
        "segments": segments,
        "anchors": choose_anchors(hashes, supervised, segments, count),
        "hashes": hashes,
    }
    return Example(words, {name: value[None] for name, value in fields.items()})


def targets(batch: dict[str, np.ndarray], masks: int) -> Targets:
    """Targets of every mask row of sequence 0, [G, M] each."""
    names = ("anchors", "positions", "segments", "tokens", "labels", "supervised")
    anchors, positions, segments, *of_rows = (jnp.asarray(batch[name]) for name in names)
    found = jax.jit(targets_of, static_argnums=1)(blocks_of(anchors, positions, segments), masks, *of_rows, segments)
    return Targets(*(None if field is None else np.asarray(field)[0] for field in found))


def seen_by_masks(batch: dict[str, np.ndarray], masks: int, window: int | None = None) -> np.ndarray:
    """Which keys each mask row of sequence 0 sees: [G, M, T + G M] bool, real keys first.

    The training attention is asked itself: queries and keys are 0, so all scores are equal, and the value of key s is
    the unit vector s, so the output is positive where a key was seen and exactly 0 elsewhere.
    """
    count, T = batch["anchors"].shape[1], batch["tokens"].shape[1]
    H = T + count * masks  # one head, as wide as there are keys
    units, heads = np.eye(H, dtype=np.float32), (1, count, masks, 1, H)
    real = LayerCache(np.zeros((1, 1, T, H), np.float32), units[:T].reshape(1, 1, T, H))
    own = (np.zeros(heads, np.float32), units[T:].reshape(heads))

    @jax.jit  # compiled once, instead of every small operation by itself
    def probe(batch: Any, real: LayerCache, own: tuple[jax.Array, jax.Array]) -> jax.Array:
        blocks = blocks_of(batch["anchors"], batch["positions"], batch["segments"])
        keys = RealRows(batch["positions"], batch["segments"])
        return attend_blocks(own[0], own, real, blocks, keys, window, count, Scores(1.0))

    fields = {name: batch[name] for name in ("anchors", "positions", "segments")}
    return np.asarray(probe(fields, real, own)[0, :, :, 0]) > 0


def visibility_matrix(
    batch: dict[str, np.ndarray], masks: int, window: int | None = None
) -> tuple[list[Row], np.ndarray]:
    """Rows of sequence 0 in the literal packing, every block behind its anchor, and which row sees which as a key."""
    segments, positions, anchors = (batch[name][0] for name in ("segments", "positions", "anchors"))
    T, count = len(segments), len(anchors)
    everything = np.zeros((T + count * masks, T + count * masks), bool)
    # Real rows: the decoder's call for them takes no mask rows at all, so these columns stay empty.
    at, of = jnp.asarray(positions)[None], jnp.asarray(segments)[None]
    everything[:T, :T] = visibility(at, at, of, of, window)[0]
    everything[T:] = seen_by_masks(batch, masks, window).reshape(count * masks, -1)
    rows, order = [], []
    for i in range(T):
        rows.append(Row("real", i, 0, int(segments[i]), int(positions[i])))
        order.append(i)
        for block in np.flatnonzero(anchors == i):
            for j in range(1, masks + 1):
                rows.append(Row("mask", i, j, int(segments[i]), int(positions[i]) + j))
                order.append(T + block * masks + j - 1)
    return rows, everything[np.ix_(order, order)]


def canvas(width: float, height: float, inches: float = 9.0) -> tuple[Figure, Axes]:
    """An empty sheet of the given size in units, y growing downwards."""
    figure = Figure(figsize=(inches, inches * height / width), dpi=160, facecolor="white")
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    return figure, axes


def box(axes: Axes, x: float, y: float, w: float, h: float, face: str, edge: str, dashed: bool = False) -> None:
    """A rounded box with its upper left corner at (x, y)."""
    style = f"round,pad=0,rounding_size={0.06 * min(1.0, h)}"
    line: Any = (0, (3, 2)) if dashed else "solid"
    axes.add_patch(FancyBboxPatch((x, y), w, h, boxstyle=style, fc=face, ec=edge, lw=1.2, ls=line))


def text(axes: Axes, x: float, y: float, words: str, size: float = 10, **options: Any) -> None:
    """Centred text, unless told otherwise."""
    axes.text(x, y, words, size=size, **({"ha": "center", "va": "center"} | options))


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    """A straight arrow."""
    axes.annotate(
        "", end, start, arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.6, "shrinkA": 0, "shrinkB": 0}
    )


def draw_rows() -> Figure:
    """Real rows, and the block behind every row that may have one, by position."""
    example = make_example((SENTENCE,), None)
    drawn = make_example((SENTENCE,), G).batch["anchors"][0].tolist()
    anchors, of = example.batch["anchors"][0], targets(example.batch, M)
    anchors = anchors[anchors >= 0]
    left, columns, tall = 2.6, int(anchors.max()) + M + 1, 0.8
    figure, axes = canvas(left + columns + 0.1, 1.75 + tall * len(anchors) + 0.75)
    text(axes, 0.1, 0.35, "position", ha="left")
    for position in range(columns):
        text(axes, left + position + 0.5, 0.35, str(position))
    text(axes, 0.1, 0.95, "real rows", ha="left", weight="bold", color=BLUE)
    for i, word in enumerate(example.words):
        box(axes, left + i + 0.05, 0.6, 0.9, 0.7, PALE_BLUE, BLUE)
        text(axes, left + i + 0.5, 0.82, word, 12)
        text(axes, left + i + 0.5, 1.12, f"$x_{i}$", 10, color=GREY)
    for g, anchor in enumerate(anchors):
        y = 1.6 + tall * g
        share = example.batch["hashes"][0, anchor] / 2.0**64
        text(axes, 0.1, y + 0.2, f"block behind $x_{anchor}$", 10.5, ha="left", weight="bold")
        chosen = f"hash {share:.2f}" + (f", drawn if G = {G}" if anchor in drawn else "")
        text(axes, 0.1, y + 0.48, chosen, 9, ha="left", color=RED if anchor in drawn else GREY)
        axes.plot([left + anchor + 0.5] * 2, [1.3, y + 0.33], color=GREY, lw=1, zorder=0)
        arrow(axes, (left + anchor + 0.5, y + 0.33), (left + anchor + 1.05, y + 0.33), GREY)
        for j in range(1, M + 1):
            x, labelled = left + anchor + j, of.labelled[g, j - 1]
            box(axes, x + 0.05, y, 0.9, 0.66, PALE_ORANGE if labelled else "white", ORANGE, dashed=not labelled)
            text(axes, x + 0.5, y + 0.2, f"$m_{j}$", 12)
            said = f"\N{RIGHTWARDS ARROW} {example.words[of.label[g, j - 1]]}" if labelled else "no label"
            text(axes, x + 0.5, y + 0.48, said, 9.5, color="black" if labelled else GREY)
    y = 1.6 + tall * len(anchors) + 0.25
    note = f"Of the {len(anchors)} blocks, G = {G} anchors keep those with the smallest hashes."
    text(axes, 0.1, y - 0.1, "An arrow in a box points to the token that the mask predicts.", 10, ha="left", color=GREY)
    text(axes, 0.1, y + 0.2, note, 10, ha="left", color=GREY)
    return figure


def draw_visibility() -> Figure:
    """Which row sees which, all anchors, two documents in one sequence."""
    example = make_example((SENTENCE, NEIGHBOUR), None)
    rows, seen = visibility_matrix(example.batch, M)
    R, left, top = len(rows), 4.2, 3.6
    figure, axes = canvas(left + R + 0.3, top + R + 3.2)
    colours = {"real": {"real": BLUE}, "mask": {"real": ORANGE, "mask": RED}}
    pixels = np.ones((R, R, 3))
    for r, row in enumerate(rows):
        for s, key in enumerate(rows):
            if seen[r, s]:
                pixels[r, s] = to_rgb(colours[row.kind].get(key.kind, "black"))
            elif row.kind == "mask":
                pixels[r, s] = to_rgb("#F6F2EA")
            else:
                pixels[r, s] = to_rgb("#EAF0F5")
    axes.imshow(pixels, extent=(left, left + R, top + R, top), interpolation="nearest", aspect="auto", zorder=1)
    axes.set(xlim=(0, left + R + 0.3), ylim=(top + R + 3.2, 0))
    for line in range(R + 1):
        axes.plot([left, left + R], [top + line] * 2, color="white", lw=0.8, zorder=2)
        axes.plot([left + line] * 2, [top, top + R], color="white", lw=0.8, zorder=2)
    border = next(r for r, row in enumerate(rows) if row.segment == 2)
    axes.plot([0.2, left + R], [top + border] * 2, color="black", lw=1.5, zorder=3)
    axes.plot([left + border] * 2, [0.9, top + R], color="black", lw=1.5, zorder=3)
    for r, row in enumerate(rows):
        name = example.words[row.at] if row.kind == "real" else f"$m_{row.offset}$"
        look: dict[str, Any] = {"color": BLUE if row.kind == "real" else DARK_ORANGE}
        look["weight"] = "bold" if row.kind == "real" else "normal"
        text(axes, left - 1.2, top + r + 0.5, name, 9, ha="right", **look)
        text(axes, left - 0.3, top + r + 0.5, str(row.position), 8.5, ha="right", color=GREY)
        text(axes, left + r + 0.5, top - 0.3, name, 9, rotation=90, va="bottom", **look)
    text(axes, left - 0.2, top - 0.7, "position", 8.5, ha="right", color=GREY)
    text(axes, left + border / 2, 0.5, "keys of document 1", 10.5)
    text(axes, left + (border + R) / 2, 0.5, "keys of document 2", 10.5)
    text(axes, 0.6, top + border / 2, "rows of document 1", 10.5, rotation=90)
    text(axes, 0.6, top + (border + R) / 2, "document 2", 10.5, rotation=90)
    legend = (
        (BLUE, "real row sees real row"),
        (ORANGE, "mask row sees real row"),
        (RED, "mask row sees mask of its own block"),
    )
    for i, (colour, meaning) in enumerate(legend):
        x = left + (0.0, 8.8, 17.9)[i]
        box(axes, x, top + R + 0.7, 0.8, 0.8, colour, colour)
        text(axes, x + 1.1, top + R + 1.1, meaning, 9.5, ha="left")
    empty = "A pale cell is not seen: no row sees another document or another block, and no real row sees a mask."
    text(axes, left, top + R + 2.3, empty, 9.5, ha="left", color=GREY)
    return figure


def draw_streams() -> Figure:
    """The two streams through the same frozen weights."""
    figure, axes = canvas(18, 13.1)
    real, masks, wide = 0.4, 10.0, 7.6
    text(axes, real + wide / 2, 0.45, "real stream", 13, weight="bold", color=BLUE)
    text(axes, masks + wide / 2, 0.45, "mask stream", 13, weight="bold", color=DARK_ORANGE)

    def step(x: float, y: float, h: float, lines: tuple[str, ...]) -> None:
        face, edge = (PALE_BLUE, BLUE) if x == real else (PALE_ORANGE, ORANGE)
        box(axes, x + 0.3, y, wide - 0.6, h, face, edge)
        for i, line in enumerate(lines):
            text(axes, x + wide / 2, y + h * (i + 0.5) / len(lines), line, 10.5 if i == 0 else 9.5)

    step(real, 0.9, 1.2, ("token embeddings", "T rows, from the frozen table"))
    step(masks, 0.9, 1.2, ("mask embeddings $m_1 \\ldots m_M$", "G M rows, trained"))
    box(axes, 0.2, 2.6, 17.6, 5.4, "#FAFAFA", GREY, dashed=True)
    text(axes, 9.0, 2.95, "one layer, L times: the same frozen W for both streams", 10, color=GREY)
    step(real, 3.3, 1.2, ("q, k, v = W h",))
    step(masks, 3.3, 1.2, (r"q, k, v = W h + $\frac{\alpha}{R}$ B (A h)",))
    step(real, 4.9, 1.2, ("attention", "real keys of the document to the row"))
    step(
        masks,
        4.9,
        1.2,
        ("attention, one softmax over two parts", "real keys to the anchor | own block to the row"),
    )
    step(real, 6.5, 1.2, ("o, gate, up, down: W h",))
    step(masks, 6.5, 1.2, (r"o, gate, up, down: W h + $\frac{\alpha}{R}$ B (A h)",))
    step(real, 8.6, 1.2, ("final norm: $z_t$", "[B, T, D]"))
    step(masks, 8.6, 1.2, ("final norm: $z_{i,j}$", "[B, G, M, D]"))
    step(real, 10.3, 1.2, ("base head: $p_t$", "targets and verification"))
    step(masks, 10.3, 1.2, ("base head and sampler head", "drafts; the losses start here"))
    for x, colour in ((real + wide / 2, BLUE), (masks + wide / 2, ORANGE)):
        for start, end in ((2.1, 3.3), (4.5, 4.9), (6.1, 6.5), (7.7, 8.6), (9.8, 10.3)):
            arrow(axes, (x, start), (x, end), colour)
    arrow(axes, (real + wide - 0.3, 4.1), (masks + 0.3, 5.3), BLUE)
    text(axes, 8.98, 3.75, "k, v", 10.5, color=BLUE)
    text(axes, 8.98, 5.6, "never\nback", 9, color=GREY)
    arrow(axes, (real + wide - 0.3, 9.2), (masks + 0.3, 10.6), BLUE)
    text(axes, 8.98, 9.1, "targets", 10, color=BLUE)
    text(axes, real + wide / 2, 12.0, "no trained array enters:", 10.5, color=BLUE, weight="bold")
    text(axes, real + wide / 2, 12.5, "equal to the base model, no backward pass", 10, color=BLUE)
    text(axes, masks + wide / 2, 12.0, "masks, A, B and sampler are trained:", 10.5, color=DARK_ORANGE, weight="bold")
    text(axes, masks + wide / 2, 12.5, "forward and backward pass", 10, color=DARK_ORANGE)
    return figure


def draw_targets() -> Figure:
    """What every mask row of the drawn blocks is trained on."""
    example = make_example((SENTENCE,), G)
    anchors, of = example.batch["anchors"][0], targets(example.batch, M)
    left, tall, columns = 2.1, 1.75, int(anchors.max()) + M + 1
    figure, axes = canvas(left + columns + 0.1, 3.1 + tall * len(anchors) + 0.75)
    text(axes, 0.1, 0.3, "position t", ha="left")
    sources = (
        ("label $x_{t+1}$", PALE_RED, RED, DARK_RED),
        ("latent $z_t$, base $p_t$", PALE_BLUE, BLUE, DARK_BLUE),
        ("token $x_t$", PALE_GREEN, GREEN, DARK_GREEN),
    )
    for line, (name, face, edge, dark) in enumerate(sources):
        y = 0.55 + 0.72 * line
        text(axes, 0.1, y + 0.3, name, 10.5, ha="left", weight="bold", color=dark)
        for t, word in enumerate(example.words):
            exists = line > 0 or example.batch["supervised"][0, t]
            box(axes, left + t + 0.05, y, 0.9, 0.6, face if exists else "white", edge, dashed=not exists)
            label = example.words[example.batch["labels"][0, t]] if exists else "none"
            said = (label, f"$z_{t},\\ p_{t}$", word)[line]
            text(axes, left + t + 0.5, y + 0.3, said, 11 if exists else 9.5, color="black" if exists else GREY)
    for t in range(columns):
        text(axes, left + t + 0.5, 0.3, str(t))
        if t >= len(example.words):
            text(axes, left + t + 0.5, 1.6, "no\nreal\nrow", 9.5, color=GREY)
    for g, anchor in enumerate(anchors):
        y = 3.0 + tall * g
        text(axes, 0.1, y + 0.7, f"block\nbehind $x_{anchor}$\n\u201c{example.words[anchor]}\u201d", 10.5, ha="left")
        for j in range(1, M + 1):
            x, at = left + anchor + j, (g, j - 1)
            exists, labelled = of.exists[at], of.labelled[at]
            box(axes, x + 0.05, y, 0.9, 1.6, PALE_ORANGE if exists else "white", ORANGE, dashed=not exists)
            text(axes, x + 0.5, y + 0.2, f"$m_{j}$", 12)
            if not exists:
                text(axes, x + 0.5, y + 0.85, "no\ntarget", 9.5, color=GREY)
                continue
            label = example.words[of.label[at]] if labelled else "none"
            share = f"/{round(1 / of.share[at])}" if of.share[at] < 1 else ""
            lines = (
                (f"label {label}", DARK_RED),
                (f"base $p_{of.row[at]}$", DARK_BLUE),
                (f"LCM $z_{of.row[at]}$ {share}", DARK_BLUE),
                (f"prev {example.words[of.previous[at]]}", DARK_GREEN),
            )
            for line, (said, colour) in enumerate(lines):
                text(axes, x + 0.5, y + 0.5 + 0.28 * line, said, 9.5, color=colour)
    y = 3.0 + tall * len(anchors) + 0.2
    note = "A mask row takes all its targets from the real row of its own position: read a column downwards."
    text(axes, 0.1, y, note, 10, ha="left", color=GREY)
    text(
        axes, 0.1, y + 0.3, "/2: two mask rows share the position, each counts half in LCM.", 10, ha="left", color=GREY
    )
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a PNG of 64 colours, a third of the size of one of all colours."""
    whole = io.BytesIO()
    figure.savefig(whole, format="png")
    Image.open(whole).convert("RGB").quantize(64).save(path, optimize=True)


DRAWINGS = {
    "rows": draw_rows,
    "visibility": draw_visibility,
    "streams": draw_streams,
    "targets": draw_targets,
}


def completion() -> str:
    """A completion of the bundled model by its ready adapter, as the terminal shows it, in SVG."""
    generator = load("bundled:stdlib-5m", adapter="bundled:stdlib-5m", plan=quadratic(4), dtype="float32")
    console = Console(record=True, width=100, file=io.StringIO(), highlight=False)
    [done] = generator([PROMPT], 96)
    writer = PassWriter(generator.tokenizer, console, done.prompt_ids, shown=False)
    console.print(Text(PROMPT), end="")
    writer(done.token_ids, done.emitted_by)
    writer.finish()
    title = f"{len(done.token_ids)} tokens in {done.steps} passes: neighbouring passes differ in colour"
    return console.export_svg(title=title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PICTURES, metavar="FOLDER")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, draw in DRAWINGS.items():
        save(draw(), out / f"{name}.png")
    (out / "completion.svg").write_text(completion(), encoding="utf-8")


if __name__ == "__main__":
    main()
