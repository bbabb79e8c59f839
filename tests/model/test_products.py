"""The C++ calls against numpy in float64: products, LoRA of the last rows, attention over a cache; without them too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.model import products
from mtp_jax.model.products import Transposed, TransposedLora, adapted_times, attend_slots, times

needs_compiler = pytest.mark.skipif(not products.native(), reason="needs a C++ compiler")
DRAW = np.random.default_rng(0)


def normal(*shape):
    return DRAW.normal(size=shape).astype(np.float32)


@needs_compiler
@pytest.mark.parametrize("rows", [1, 2, 6, 7, 9, 13, 40])
@pytest.mark.parametrize(("K", "N"), [(64, 128), (70, 101), (5, 3)])
def test_products_are_those_of_numpy(rows, K, N):
    x, w = normal(rows, K), normal(N, K)
    got = jax.jit(times)(x, Transposed(w))
    assert np.abs(got - x.astype(float) @ w.T.astype(float)).max() < 1e-5 * K


@needs_compiler
def test_a_row_does_not_depend_on_the_rows_beside_it():
    x, w = normal(25, 96), Transposed(normal(200, 96))
    whole = np.asarray(times(x, w))
    for rows in (1, 3, 8, 11):
        assert (np.asarray(times(x[:rows], w)) == whole[:rows]).all()


@needs_compiler
@pytest.mark.parametrize(("B", "real", "masks"), [(1, 2, 2), (3, 1, 7), (2, 5, 20)])
def test_only_the_last_rows_of_each_sequence_meet_the_lora(B, real, masks):
    x, w = normal(B, real + masks, 70), normal(130, 70)
    parts = {40: normal(40, 8), 130: normal(90, 8)}  # two projections side by side
    lora = TransposedLora(normal(16, 70), np.concatenate(list(parts.values())), tuple(parts), (0, 8))
    got = np.asarray(jax.jit(adapted_times, static_argnums=1)(x, real, Transposed(w), lora))
    plain = x.astype(float) @ w.T
    inner = x.astype(float) @ lora.a.T
    added = np.concatenate([inner[..., :8] @ parts[40].T, inner[..., 8:] @ parts[130].T], -1)
    assert np.abs(got[:, real:] - (plain + added)[:, real:]).max() < 1e-3
    assert (got[:, :real] == np.asarray(times(x, Transposed(w)))[:, :real]).all()
    broken = TransposedLora(lora.a, np.full_like(lora.b, np.nan), lora.ends, lora.offsets)
    left = np.asarray(adapted_times(x, real, Transposed(w), broken))
    assert (left[:, :real] == got[:, :real]).all() and np.isnan(left[:, real:]).all()


@needs_compiler
@pytest.mark.parametrize(("N", "K", "H", "R"), [(4, 2, 32, 3), (8, 1, 64, 9), (2, 2, 16, 1)])
def test_attention_is_a_softmax_over_slots_and_own_keys(N, K, H, R):
    B, S = 2, 50
    q, k, v = 3 * normal(B, R, N, H), normal(B, K, S, H), normal(B, K, S, H)
    own_k, own_v = normal(B, K, R, H), normal(B, K, R, H)
    low = DRAW.integers(0, 10, (B, R)).astype(np.int32)
    high = (low + DRAW.integers(0, 40, (B, R))).astype(np.int32)  # none at all, sometimes
    seen = (DRAW.random((B, R, R)) < 0.5) | np.eye(R, dtype=bool)
    got = np.asarray(jax.jit(attend_slots)(q, (k, v), low, high, (own_k, own_v), seen))
    keys, values = np.concatenate([k, own_k], 2).astype(float), np.concatenate([v, own_v], 2)
    slots = np.arange(S)
    for b in range(B):
        for r in range(R):
            visible = np.concatenate([(low[b, r] <= slots) & (slots < high[b, r]), seen[b, r]])
            for n in range(N):
                scores = keys[b, n * K // N] @ q[b, r, n] / np.sqrt(H)
                weights = np.where(visible, np.exp(scores - scores[visible].max()), 0)
                expected = weights @ values[b, n * K // N] / weights.sum()
                assert np.abs(got[b, r, n] - expected).max() < 1e-5


def test_without_a_compiler_xla_multiplies(monkeypatch, tmp_path):
    def register(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        products._register.cache_clear()
        try:
            return products.native()
        finally:
            products._register.cache_clear()

    monkeypatch.setattr(products, "CACHE", str(tmp_path / "native"))
    assert not register(CXX=str(tmp_path / "no-such-compiler"))
    assert not register(CXX="false")  # a compiler that fails
    assert not list((tmp_path / "native").iterdir())
    assert not register(MTP_JAX_NATIVE="0")
    x, w = jnp.ones((2, 3)), jnp.ones((3, 4))
    assert (times(x, w) == 3).all()
