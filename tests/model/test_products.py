"""The C++ calls against numpy in float64: products, LoRA of the last rows, attention over a cache; without them too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.model import products
from mtp_jax.model.products import PanelLora, adapted_times, add_norm, attend_slots, largest, look_up, pack, times

needs_compiler = pytest.mark.skipif(not products.native(), reason="needs a C++ compiler")
DRAW = np.random.default_rng(0)


def normal(*shape):
    return DRAW.normal(size=shape).astype(np.float32)


@needs_compiler
@pytest.mark.parametrize("rows", [1, 2, 6, 7, 12, 13, 40])
@pytest.mark.parametrize(("K", "widths"), [(64, [128]), (70, [101, 32, 7]), (5, [3])])
def test_products_are_those_of_numpy(rows, K, widths):
    x, w = normal(rows, K), [normal(K, width) for width in widths]
    got = jax.jit(times)(x, pack(*w))
    assert np.abs(got - x.astype(float) @ np.concatenate(w, 1).astype(float)).max() < 1e-5 * K


@needs_compiler
def test_a_row_does_not_depend_on_the_rows_beside_it():
    x, w = normal(25, 96), pack(normal(96, 200))
    whole = np.asarray(times(x, w))
    for rows in (1, 3, 8, 12, 17):
        assert (np.asarray(times(x[:rows], w)) == whole[:rows]).all()


@needs_compiler
@pytest.mark.parametrize(("B", "real", "masks"), [(1, 2, 2), (3, 1, 7), (2, 5, 20)])
def test_only_the_last_rows_of_each_sequence_meet_the_lora(B, real, masks):
    x, w = normal(B, real + masks, 70), [normal(70, 40), normal(70, 90)]  # two projections side by side
    a, b = normal(70, 16), [normal(8, 40), normal(8, 90)]
    packed, lora = pack(*w), PanelLora(pack(a), pack(*b), (0, 8))
    got = np.asarray(jax.jit(adapted_times, static_argnums=1)(x, real, packed, lora))
    plain = x.astype(float) @ np.concatenate(w, 1)
    inner = x.astype(float) @ a
    added = np.concatenate([inner[..., :8] @ b[0], inner[..., 8:] @ b[1]], -1)
    assert np.abs(got[:, real:] - (plain + added)[:, real:]).max() < 1e-3
    assert (got[:, :real] == np.asarray(times(x, packed))[:, :real]).all()
    broken = PanelLora(lora.a, pack(*(np.full_like(part, np.nan) for part in b)), lora.offsets)
    left = np.asarray(adapted_times(x, real, packed, broken))
    assert (left[:, :real] == got[:, :real]).all() and np.isnan(left[:, real:]).all()


@needs_compiler
@pytest.mark.parametrize(("N", "K", "H", "R"), [(4, 2, 32, 3), (8, 1, 64, 9), (2, 2, 16, 1)])
def test_attention_is_a_softmax_over_slots_and_own_keys(N, K, H, R):
    B, S = 2, 50
    projected, k, v = normal(B, R, N + 2 * K, H), normal(B, K, S, H), normal(B, K, S, H)
    projected[:, :, :N] *= 3
    angles = 7 * normal(B, R, 1, H // 2)
    low = DRAW.integers(0, 10, (B, R)).astype(np.int32)
    high = (low + DRAW.integers(0, 40, (B, R))).astype(np.int32)  # none at all, sometimes
    seen = (DRAW.random((B, R, R)) < 0.5) | np.eye(R, dtype=bool)
    turn = (np.cos(angles), np.sin(angles))
    got, own_k, own_v = map(np.asarray, jax.jit(attend_slots)(projected, turn, (k, v), low, high, seen))

    pairs = projected[..., : H // 2].astype(float) + 1j * projected[..., H // 2 :]
    turned = pairs * np.exp(1j * angles.astype(float))
    rotated = np.concatenate([turned.real, turned.imag], -1)
    assert np.abs(own_k - rotated[:, :, N : N + K].swapaxes(1, 2)).max() < 1e-5
    assert (own_v == projected[:, :, N + K :].swapaxes(1, 2)).all()
    keys, values = np.concatenate([k, own_k], 2).astype(float), np.concatenate([v, own_v], 2)
    slots = np.arange(S)
    for b in range(B):
        for r in range(R):
            visible = np.concatenate([(low[b, r] <= slots) & (slots < high[b, r]), seen[b, r]])
            for n in range(N):
                scores = keys[b, n * K // N] @ rotated[b, r, n] / np.sqrt(H)
                weights = np.where(visible, np.exp(scores - scores[visible].max()), 0)
                expected = weights @ values[b, n * K // N] / weights.sum()
                assert np.abs(got[b, r, n] - expected).max() < 1e-5


@needs_compiler
@pytest.mark.parametrize("shape", [(3, 70), (2, 9, 64), (1, 5)])
def test_norm_of_a_sum(shape):
    x, added, scale = normal(*shape), normal(*shape), normal(shape[-1])
    total, normed = jax.jit(add_norm, static_argnums=3)(x, added, scale, 1e-3)
    assert (total == x + added).all()
    wide = (x + added).astype(float)
    assert np.abs(normed - wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-3) * scale).max() < 1e-5


@needs_compiler
@pytest.mark.parametrize(("D", "C"), [(64, 256), (70, 33), (5, 1)])
def test_rows_that_are_looked_up(D, C):
    x, table, ids = normal(3, D), normal(300, D), DRAW.integers(0, 300, (3, C)).astype(np.int32)
    got = jax.jit(look_up)(x, table, ids)
    assert np.abs(got - np.einsum("bd,bcd->bc", x.astype(float), table[ids])).max() < 1e-4


@needs_compiler
@pytest.mark.parametrize(("V", "classes"), [(1000, 256), (297, 1), (40, 1), (300, 300), (4096, 7)])
def test_the_first_of_the_largest_of_each_class(V, classes):
    x = DRAW.integers(0, 9, (2, 3, V)).astype(np.float32)  # with many equal ones
    got = np.asarray(jax.jit(largest, static_argnums=1)(x, classes))
    for c in range(classes):
        members = np.arange(c, V, classes)
        assert (got[..., c] == members[np.argmax(x[..., members], -1)]).all()


def test_without_a_compiler_xla_multiplies(monkeypatch, tmp_path):
    def register(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        products._library.cache_clear()
        try:
            return products.native()
        finally:
            products._library.cache_clear()

    monkeypatch.setattr(products, "CACHE", str(tmp_path / "native"))
    assert not register(CXX=str(tmp_path / "no-such-compiler"))
    assert not register(CXX="false")  # a compiler that fails
    assert not list((tmp_path / "native").iterdir())
    assert not register(MTP_JAX_NATIVE="0")
    x, w = jnp.ones((2, 3)), jnp.ones((3, 4))
    assert (times(x, w) == 3).all()
