"""The pictures of docs/how-it-works.md show what the definition says; a drawing cannot drift from the method."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.quick

DOCS = Path(__file__).resolve().parents[2] / "docs"
spec = importlib.util.spec_from_file_location("draw", DOCS / "draw.py")
draw = importlib.util.module_from_spec(spec)
spec.loader.exec_module(draw)


def by_definition(batch, M, window):
    """A mask row sees real rows up to its anchor in its document and earlier masks of its block; no real row a mask."""
    segments, positions = batch["segments"][0].tolist(), batch["positions"][0].tolist()
    rows = []  # (anchor of the block, or None; row or offset; document; position)
    for i in range(len(segments)):
        rows.append((None, i, segments[i], positions[i]))
        if i in batch["anchors"][0]:
            rows += [(i, j, segments[i], positions[i] + j) for j in range(1, M + 1)]
    seen = []
    for anchor, number, document, position in rows:
        reach = number if anchor is None else anchor
        seen.append([])
        for other_anchor, other, other_document, other_position in rows:
            near = window is None or position - other_position < window
            if other_anchor is None:
                allowed = other <= reach and other_document == document
            else:
                allowed = other_anchor == anchor and other <= number
            seen[-1].append(allowed and near)
    return rows, np.array(seen)


def check(batch, M, window=None):
    rows, seen = draw.visibility_matrix(batch, M, window)
    expected_rows, expected = by_definition(batch, M, window)
    assert [(row.kind == "mask", row.segment, row.position) for row in rows] == [
        (anchor is not None, document, position) for anchor, _, document, position in expected_rows
    ]
    assert np.array_equal(seen, expected)
    real = np.array([row.kind == "real" for row in rows])
    assert not seen[np.ix_(real, ~real)].any()


def test_the_drawn_matrix_follows_the_definition():
    check(draw.make_example((draw.SENTENCE, draw.NEIGHBOUR), None).batch, draw.M)


@pytest.mark.parametrize(("count", "window"), [(4, None), (None, 3)])
def test_so_it_does_with_other_documents_sampled_anchors_and_windows(count, window):
    check(draw.make_example((tuple("abcd"), tuple("e"), tuple("fghi")), count).batch, 2, window)


def test_the_example_is_the_one_of_the_page():
    sampled = draw.make_example((draw.SENTENCE,), draw.G).batch
    assert sampled["anchors"].tolist() == [[1, 3]]
    of = draw.targets(sampled, draw.M)
    word = np.array(draw.SENTENCE)
    assert word[of.label[of.labelled]].tolist() == ["on", "the", "mat", "mat"]
    assert word[of.previous[of.exists]].tolist() == ["sat", "on", "the", "the", "mat"]
    assert of.row[of.exists].tolist() == [2, 3, 4, 4, 5]
    assert of.share.tolist() == [[1, 1, 0.5], [0.5, 1, 0]]


def test_every_picture_is_there_and_shown():
    page = (DOCS / "how-it-works.md").read_text()
    drawn = {f"{name}.png" for name in draw.DRAWINGS} | {"completion.svg"}
    assert {path.name for path in (DOCS / "pictures").iterdir()} == drawn
    assert "](docs/pictures/completion.svg)" in (DOCS.parent / "README.md").read_text()
    for name in draw.DRAWINGS:
        assert f"](pictures/{name}.png)" in page
        assert (DOCS / "pictures" / f"{name}.png").stat().st_size < 150_000
