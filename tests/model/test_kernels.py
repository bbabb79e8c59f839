"""Paths of attention agree, and none holds the scores of all rows and heads of a long sequence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.model.attention import (
    Blocks,
    LayerCache,
    RealRows,
    Scores,
    attend,
    attend_blocks,
    attend_rows,
    visibility,
)
from mtp_jax.model.kernels import misfit, splash

SCORES = Scores(0.2)  # not 1/sqrt(H), which a path could have taken by itself


def inputs(B, R, N, K, H):
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (B, R, N, H))
    k, v = (jax.random.normal(key, (B, R, K, H)) for key in keys[1:])
    return q, LayerCache.of_rows(k, v)


def packed(B, R):
    """Two documents in each sequence, and padding."""
    segments = np.ones((B, R), np.int32)
    segments[:, R // 3 :] = 2
    segments[:, R - 9 :] = 0
    positions = np.concatenate([np.arange(R // 3), np.arange(R - 9 - R // 3), np.arange(9)])
    return jnp.asarray(segments), jnp.broadcast_to(jnp.asarray(positions), (B, R))


@pytest.mark.parametrize("window", [None, 50])
def test_splash_computes_what_xla_does(window):
    q, real = inputs(1, 256, 4, 2, 64)
    segments, positions = packed(1, 256)
    visible = visibility(positions, positions, segments, segments, window)
    weights = jax.random.normal(jax.random.key(7), q.shape)

    def loss(path, q, real):
        out = path(q, real)
        return jnp.sum(out * weights), out

    paths = [
        lambda q, real: attend(q, real, visible, SCORES),
        functools.partial(splash, segments=segments, scale=SCORES.scale, window=window, interpret=True),
    ]
    with jax.default_matmul_precision("highest"):
        runs = [jax.jit(jax.value_and_grad(functools.partial(loss, path), (0, 1), has_aux=True)) for path in paths]
        (ours, ours_gradient), (theirs, theirs_gradient) = (run(q, real) for run in runs)
    np.testing.assert_allclose(ours[1], theirs[1], atol=1e-5)
    for a, b in zip(jax.tree.leaves(ours_gradient), jax.tree.leaves(theirs_gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_chunks_of_rows_change_nothing(monkeypatch):
    q, real = inputs(2, 50, 4, 2, 8)
    segments, positions = packed(2, 50)
    visible = visibility(positions, positions, segments, segments)
    whole = jax.grad(lambda q, real: jnp.sum(jnp.sin(attend(q, real, visible, SCORES))), (0, 1))(q, real)
    monkeypatch.setattr("mtp_jax.model.attention._SCORE_BYTES", 4 * 2 * 4 * 50 * 7)  # seven rows
    parts = jax.grad(lambda q, real: jnp.sum(jnp.sin(attend_rows(q, real, visible, SCORES))), (0, 1))(q, real)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_scores_of_a_long_sequence_never_exist_all_at_once():
    B, T, G, M, N, K, H = 1, 4096, 256, 8, 8, 2, 64
    of = jax.ShapeDtypeStruct
    real = LayerCache(*[of((B, K, T, H), jnp.float32)] * 2)
    numbers, flags = of((B, G), jnp.int32), of((B, T, T), jnp.bool_)

    def rows(q, real, visible):
        return jnp.sum(attend_rows(q, real, visible, SCORES))

    def masks(q, own, real, at):
        seen = RealRows(jnp.arange(T)[None], jnp.ones((B, T), jnp.int32))
        return jnp.sum(attend_blocks(q, own, real, Blocks(at, at, jnp.ones_like(at)), seen, None, None, SCORES))

    own = (of((B, G, M, K, H), jnp.float32),) * 2
    for f, arguments, scores in (
        (rows, (of((B, T, N, H), jnp.float32), real, flags), 4 * N * T * T),
        (masks, (of((B, G, M, N, H), jnp.float32), own, real, numbers), 4 * N * G * M * T),
    ):
        options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        step = jax.jit(jax.grad(f)).lower(*arguments).compile(compiler_options=options)
        assert 1 << 20 < step.memory_analysis().temp_size_in_bytes < scores * 2 + (64 << 20)


def test_what_a_kernel_does_not_take_is_said():
    for kernel in ("splash", "cudnn"):
        assert misfit(kernel, 2048, 128, jnp.bfloat16, SCORES) is None
        assert "capped" in misfit(kernel, 2048, 128, jnp.bfloat16, Scores(0.2, 50.0))
    assert "multiple of 128" in misfit("splash", 100, 128, jnp.bfloat16, SCORES)
    assert "float32" in misfit("cudnn", 2048, 128, jnp.float32, SCORES)
