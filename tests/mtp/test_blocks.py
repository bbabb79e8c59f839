"""Anchors and targets, against the definitions written out."""

import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.mtp.blocks import Noise, blocks_of, choose_anchors, hash_positions, noise_ids, targets_of

pytestmark = pytest.mark.quick

T = 20


def test_hash_depends_on_each_argument_and_nothing_else():
    positions = np.arange(50)
    base = hash_positions(1, 2, 3, positions)
    assert np.array_equal(base, hash_positions(1, 2, 3, positions))
    assert np.array_equal(base[10:], hash_positions(1, 2, 3, positions[10:]))
    others = [
        hash_positions(0, 2, 3, positions),
        hash_positions(1, 0, 3, positions),
        hash_positions(1, 2, 0, positions),
    ]
    assert all(not np.any(base == other) for other in others)
    assert len(set(base.tolist())) == len(base)


def test_hash_is_uniform():
    values = np.concatenate([hash_positions(7, epoch, 11, np.arange(1000)) for epoch in range(20)]) / 2.0**64
    counts = np.histogram(values, bins=10, range=(0, 1))[0]
    assert np.sum((counts - 2000.0) ** 2 / 2000.0) < 27.9  # chi-square, 9 degrees of freedom, p = 0.001


def test_anchors_are_the_smallest_hashes_among_fitting_rows():
    hashes = hash_positions(0, 0, 5, np.arange(T))
    supervised, segments = np.ones(T, bool), np.repeat([1, 2], T // 2)
    supervised[[T // 2 - 1, T - 1]] = False  # the last tokens of the two documents
    fitting = [t for t in range(T - 1) if supervised[t] and segments[t + 1] == segments[t]]
    chosen = choose_anchors(hashes, supervised, segments, 6)
    assert chosen.tolist() == sorted(sorted(fitting, key=lambda t: hashes[t])[:6])


def test_no_block_behind_prompt_tokens_but_one_behind_the_last():
    supervised = np.arange(T) >= 7  # row 7 is the last prompt token: the token after it is supervised
    chosen = choose_anchors(hash_positions(0, 0, 0, np.arange(T)), supervised, np.ones(T, int), None)
    assert chosen[chosen >= 0].tolist() == list(range(7, T - 1)) and len(chosen) == T


def test_a_document_keeps_its_anchors_in_another_packing():
    def anchors_of(before: int) -> set[int]:
        """Positions in the document at which there are anchors when `before` other tokens stand in front of it."""
        hashes = np.concatenate([hash_positions(0, 0, 1, np.arange(before)), hash_positions(0, 0, 2, np.arange(10))])
        segments = np.repeat([1, 2], [before, 10])
        supervised = np.append(segments[1:] == segments[:-1], False)
        hashes[:before] = np.iinfo(np.uint64).max  # the other document wins no anchor
        return {t - before for t in choose_anchors(hashes, supervised, segments, 4) if t >= before}

    assert anchors_of(3) == anchors_of(8) and len(anchors_of(3)) == 4


@pytest.mark.parametrize("M", [1, 4])
def test_targets_follow_the_definition(M):
    random = np.random.default_rng(0)
    text = random.integers(0, 99, T + 1)
    segments = np.array([1] * 8 + [2] * 9 + [0] * 3)[None]
    supervised = (random.random(T) < 0.7)[None] & (segments > 0)
    positions = np.concatenate([np.arange(8), np.arange(9), np.zeros(3, int)])[None]
    anchors = np.array([[0, 3, 5, 6, 9, 14, -1]])
    blocks = blocks_of(*map(jnp.asarray, (anchors, positions, segments)))
    of = targets_of(blocks, M, *map(jnp.asarray, (text[None, :-1], text[None, 1:], supervised, segments)))
    members: dict[int, int] = {}
    for i in anchors[0][:-1]:
        for j in range(1, M + 1):
            if i + j < T and segments[0, i + j] == segments[0, i]:
                members[i + j] = members.get(i + j, 0) + 1
    for b, i in enumerate(anchors[0]):
        for j in range(1, M + 1):
            t = i + j
            exists = i >= 0 and t < T and segments[0, t] == segments[0, i]
            assert of.exists[0, b, j - 1] == exists
            assert of.labelled[0, b, j - 1] == (exists and supervised[0, t])
            assert of.share[0, b, j - 1] == pytest.approx(1 / members[t] if exists else 0)
            if exists:
                assert (of.label[0, b, j - 1], of.previous[0, b, j - 1]) == (text[t + 1], text[t])
                assert of.row[0, b, j - 1] == t


def test_noise_is_drawn_evenly_anew_for_every_epoch_document_anchor_and_offset():
    noise = Noise(5, 15)
    places = [(epoch, document) for epoch in range(3) for document in range(3)]
    rows = [noise_ids(hash_positions(0, *place, np.arange(500)), 4, noise) for place in places]
    assert {ids.shape for ids in rows} == {(500, 4)} and {ids.dtype for ids in rows} == {np.dtype(np.int32)}
    drawn = np.stack(rows)  # [places, anchors, offsets]
    counts = np.bincount(drawn.ravel(), minlength=15)
    assert counts[:5].sum() == 0 and len(counts) == 15
    expected = drawn.size / 10
    assert np.sum((counts[5:] - expected) ** 2 / expected) < 27.9  # chi-square, 9 degrees of freedom, p = 0.001
    for axis in range(3):  # neighbours are alike no more often than chance has it
        alike = np.mean(np.diff(drawn, axis=axis) == 0)
        assert abs(alike - 0.1) < 0.02, axis


def test_noise_of_one_id_is_that_id():
    assert (noise_ids(hash_positions(0, 0, 0, np.arange(9)), 3, Noise(7, 8)) == 7).all()
