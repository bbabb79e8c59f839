"""The C++ calls: products against numpy in float64, all layers of a step against XLA's; without a compiler too."""

import subprocess
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from whole_numbers import can_round, quantised

from mtp_jax.cpu import fastest_forward, native
from mtp_jax.cpu.forward import CpuForward
from mtp_jax.cpu.native import largest, narrow, pack, times
from mtp_jax.decoding.drafting import choose_drafts
from mtp_jax.decoding.forward import XlaForward
from mtp_jax.errors import UserError
from mtp_jax.model.attention import LayerCache
from mtp_jax.model.decoder import Decoder
from mtp_jax.model.geometry import Geometry
from mtp_jax.model.int8 import quantise
from mtp_jax.model.step_rows import MaskRows
from mtp_jax.model.weights import PROJECTIONS, init_params, unstack_layers
from mtp_jax.mtp.adapter import AdapterShape
from mtp_jax.mtp.lora import init_lora
from mtp_jax.mtp.sampler import init_sampler


def _built():
    try:
        return bool(native.library())
    except native.BuildError:
        return False


needs_compiler = pytest.mark.skipif(not _built(), reason="needs a C++ compiler")
needs_rounding = pytest.mark.skipif(not can_round(), reason="needs a C++ compiler and a processor with AVX-512 VNNI")
DRAW = np.random.default_rng(0)


def normal(*shape):
    return DRAW.normal(size=shape).astype(np.float32)


@needs_compiler
@pytest.mark.parametrize("rows", [1, 2, 6, 7, 12, 13, 40])
@pytest.mark.parametrize(("K", "widths"), [(64, [128]), (70, [101, 32, 7]), (5, [3])])
def test_products_are_those_of_numpy(rows, K, widths):
    x, w = normal(rows, K), [normal(K, width) for width in widths]
    got = jax.jit(times)(x, pack(*map(jnp.asarray, w)))
    assert np.abs(got - x.astype(float) @ np.concatenate(w, 1).astype(float)).max() < 1e-5 * K


@needs_compiler
def test_a_row_does_not_depend_on_the_rows_beside_it():
    x, w = jnp.asarray(normal(25, 96)), pack(jnp.asarray(normal(96, 200)))
    whole = np.asarray(times(x, w))
    for rows in (1, 3, 8, 12, 17):
        assert (np.asarray(times(x[:rows], w)) == whole[:rows]).all()


def whole_by_blocks(x):
    """Rows as whole numbers with a scale for each 32 of them, multiplied out."""
    out = np.zeros(x.shape)
    for at in range(0, x.shape[1], 32):
        block = x[:, at : at + 32].astype(np.float32)
        scale = np.abs(block).max(axis=1, keepdims=True) / np.float32(127)
        out[:, at : at + 32] = np.rint(block / scale) * scale
    return out


@needs_rounding
@pytest.mark.parametrize("K", [64, 72, 101])
@pytest.mark.parametrize("rows", [1, 3, 7, 25])
def test_products_of_rounded_rows_are_those_of_numpy_and_do_not_depend_on_the_rows_beside_them(rows, K):
    x, (values, scale) = normal(25, K), quantise(normal(K, 101))
    x[2] = 0.0
    w = pack(jnp.asarray(values), scale=jnp.asarray(scale), rounds=True)
    with np.errstate(invalid="ignore"):
        want = np.nan_to_num(whole_by_blocks(x)) @ (values * scale).astype(float)
    got = np.asarray(times(jnp.asarray(x[:rows]), w))
    # A number half way between two may be rounded to either.
    assert np.quantile(np.abs(got - want[:rows]), 0.95) < 1e-4 and np.abs(got - want[:rows]).max() < 0.1
    assert (np.asarray(times(jnp.asarray(x), w))[:rows] == got).all()
    exact = x @ (values * scale)
    assert 1e-3 < np.abs(got - exact[:rows]).max() < 0.05 * np.abs(exact).max()


@needs_compiler
@pytest.mark.parametrize("rows", [1, 3, 14])
def test_bfloat16_weights_are_kept_as_such_and_give_the_same_products(rows, monkeypatch):
    w = jnp.asarray(normal(70, 101), jnp.bfloat16).astype(jnp.float32)
    x, halves = jnp.asarray(normal(rows, 70)), pack(w)
    monkeypatch.setattr(native, "narrow", lambda x: x)
    whole = pack(w)
    assert (halves.panels.dtype, whole.panels.dtype) == (jnp.bfloat16, jnp.float32)
    assert (np.asarray(times(x, halves)) == np.asarray(times(x, whole))).all()


def test_only_what_rounds_to_itself_is_narrowed():
    exact = np.asarray([1.0, -0.0, 2.0**-140, 3e38, 0.33203125, np.inf], np.float32)
    exact = jnp.asarray(exact, jnp.bfloat16).astype(jnp.float32)
    assert narrow(exact).dtype == jnp.bfloat16
    assert (np.asarray(narrow(exact), np.float32).view(np.int32) == np.asarray(exact).view(np.int32)).all()
    assert narrow(jnp.append(exact, jnp.float32(1 / 3))).dtype == jnp.float32


BASE = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 40,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,
    "rope_theta": 100.0,
}
GEOMETRIES = {
    "grouped heads": {},
    "heads of a width that no vector has": {"head_dim": 10, "num_key_value_heads": 4},
    "narrow heads": {"head_dim": 6},
    "one wide head of keys": {"head_dim": 64, "num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "norms of heads": {"model_type": "qwen3", "use_sliding_window": False},
    "whole numbers": {"int8": True, "attention_bias": True},
    "windows": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
}
B, S, REAL = 2, 40, 3


class Step:
    """A step of a random model by C++ or by XLA: latents of real rows and of mask rows, and the cache behind it."""

    def __init__(self, in_cpp, targets=PROJECTIONS, change=None, int8=False, rounds=False, **config):
        self.g = g = Geometry.from_config(BASE | config)
        draw = np.random.default_rng(0)
        params = init_params(g, jax.random.key(0))
        params = jax.tree.map(lambda x: jnp.asarray(x + 0.2 * draw.normal(size=x.shape), jnp.float32), params)
        lora = init_lora(g, targets, 8, jax.random.key(1)) or {"layers": {}}
        lora = jax.tree.map(lambda x: jnp.asarray(0.2 * draw.normal(size=x.shape), jnp.float32), lora)
        lora = change(lora) if change else lora
        if int8:
            self.g, params = g, params = quantised(params, g)
        shape, model = AdapterShape(5, 8, 8.0, targets, "none"), Decoder(g, scanned=False)
        self.forward = CpuForward(model, shape, "", rounds) if in_cpp else XlaForward(model, shape)
        self.variables = self.forward.prepare(
            unstack_layers(params), {"lora": lora, "mtp": {"masks": jnp.zeros((5, 1))}}
        )

    def __call__(self, real=REAL, masks=True, first=False, own=False):
        """With `own`, mask rows of each sequence hold other embeddings."""
        g, draw = self.g, np.random.default_rng(1)
        cache = [LayerCache(*draw.normal(size=(2, B, g.K, S, g.H)).astype(np.float32)) for _ in range(g.L)]
        tokens = jnp.asarray(draw.integers(0, g.V, (B, REAL))[:, :real])
        start = jnp.asarray([0, 0] if first else [17, 9], jnp.int32)
        rows = MaskRows(
            jnp.asarray(draw.normal(size=(B, 5, g.D) if own else (5, g.D)), jnp.float32),
            start[:, None] + jnp.asarray([[0, 0, 2, 2, 2], [1, 1, 1, 2, 2]]),
            np.asarray([1, 2, 1, 2, 3]),
            np.asarray([0, 0, 2, 2, 2]),
        )
        step = jax.jit(lambda v, c: self.forward.rows(v, tokens, start, c, rows if masks else None, first))
        return jax.tree.map(np.asarray, step(self.variables, cache))


@needs_compiler
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_step_is_that_of_xla(name, first):
    ways = [Step(in_cpp, **GEOMETRIES[name])(first=first) for in_cpp in (True, False)]
    for got, expected in zip(*map(jax.tree.leaves, ways), strict=True):
        assert np.abs(got - expected).max() < 2e-5 * np.abs(expected).max()


@needs_rounding
def test_a_step_of_rounded_rows_is_near_that_of_xla():
    config = GEOMETRIES["whole numbers"]
    ways = Step(True, rounds=True, **config)(), Step(False, **config)()
    for got, exact in zip(*map(jax.tree.leaves, ways), strict=True):
        assert 1e-4 < np.abs(got - exact).max() / np.abs(exact).max() < 0.1


@needs_compiler
@pytest.mark.parametrize("rounds", [False, pytest.param(True, marks=needs_rounding)])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_text_is_the_same_to_the_last_bit_whatever_steps_it_is_cut_into(name, rounds):
    step = Step(True, rounds=rounds, **GEOMETRIES[name] | ({"int8": True} if rounds else {}))
    g, draw = step.g, np.random.default_rng(1)
    tokens, embeddings = jnp.asarray(draw.integers(0, g.V, (1, 30))), jnp.asarray(normal(3, g.D))

    @jax.jit
    def rows_of(variables, tokens, start, cache, anchor):
        masks = None
        if anchor is not None:
            masks = MaskRows(embeddings, jnp.full((1, 3), anchor), np.arange(1, 4), np.zeros(3, int))
        return step.forward.rows(variables, tokens, start, cache, masks)

    def cut(sizes, masked):
        """Latents and cache; with masks two drafts stand behind a step's rows, which fall and are written over."""
        cache = [LayerCache(*jnp.zeros((2, 1, g.K, S, g.H))) for _ in range(g.L)]
        at, found = 0, []
        for size in sizes:
            rows, start, anchor = tokens[:, at : at + size], jnp.asarray([at], jnp.int32), None
            if masked and at:
                rows, anchor = jnp.concatenate([rows, jnp.full((1, 2), 7)], axis=1), jnp.int32(at + size - 1)
            latents, _, cache = rows_of(step.variables, rows, start, cache, anchor)
            found.append(latents[:, :size])
            at += size
        return np.concatenate(found, axis=1), [np.asarray(part[:, :, :30]) for part in jax.tree.leaves(cache)]

    latents, cache = cut([17, *[1] * 13], False)
    for sizes, masked in (([17, 13], False), ([30], False), ([9, 8, 4, 5, 1, 3], True), ([17, *[1] * 13], True)):
        other, of_other = cut(sizes, masked)
        assert (other == latents).all()
        assert all((a == b).all() for a, b in zip(cache, of_other, strict=True))


@needs_compiler
@pytest.mark.parametrize("lengths", [(20, 12), (14, 14), (12, 13)])
def test_padding_of_prompts_is_not_computed_and_changes_nothing(lengths):
    step, draw = Step(True), np.random.default_rng(3)
    g, lengths = step.g, jnp.asarray(lengths, jnp.int32)
    tokens, start = jnp.asarray(draw.integers(0, g.V, (B, 10))), jnp.full(B, 10, jnp.int32)
    cache = [LayerCache(*draw.normal(size=(2, B, g.K, S, g.H)).astype(np.float32)) for _ in range(g.L)]
    anchors = jnp.broadcast_to(lengths[:, None] - 1, (B, 2))
    masks = MaskRows(jnp.asarray(normal(2, g.D)), anchors, np.asarray([1, 2]), np.zeros(2, int))
    part = step.forward.rows(step.variables, tokens, start, jax.tree.map(jnp.copy, cache), masks, False, lengths)
    whole = step.forward.rows(step.variables, tokens, start, jax.tree.map(jnp.copy, cache), masks)
    used = max(int(lengths.max()) - 10, 1)
    assert (part[0][:, :used] == whole[0][:, :used]).all() and not part[0][:, used:].any()
    assert np.abs(part[1] - whole[1]).max() < 2e-5 * np.abs(whole[1]).max()  # masks stand nearer: sums run otherwise
    for a, b in zip(*map(jax.tree.leaves, (part[2], whole[2])), strict=True):
        assert (a[:, :, : 10 + used] == b[:, :, : 10 + used]).all()


@needs_compiler
def test_mask_rows_of_each_sequence_may_hold_embeddings_of_their_own():
    ways = [Step(in_cpp)(own=True) for in_cpp in (True, False)]
    for got, expected in zip(*map(jax.tree.leaves, ways), strict=True):
        assert np.abs(got - expected).max() < 2e-5 * np.abs(expected).max()


@needs_compiler
@pytest.mark.parametrize("targets", [(), ("q",), ("v", "down"), ("k", "up", "gate")])
def test_a_step_with_few_adapted_projections_is_that_of_xla(targets):
    ways = [Step(in_cpp, targets)() for in_cpp in (True, False)]
    for got, expected in zip(*map(jax.tree.leaves, ways), strict=True):
        assert np.abs(got - expected).max() < 2e-5 * np.abs(expected).max()


@needs_compiler
def test_real_rows_depend_on_no_row_behind_them_and_on_no_adapter():
    whole = Step(True)()
    other = Step(True, change=lambda lora: jax.tree.map(lambda x: 100 * x, lora))()
    assert (whole[0] == other[0]).all() and (whole[1] != other[1]).all()
    assert (Step(True)(masks=False)[0] == whole[0]).all()
    for real in (1, 2):
        assert (Step(True)(real, masks=False)[0] == whole[0][:, :real]).all()


@needs_compiler
def test_rows_beyond_those_whose_scores_exist_at_a_time():
    one = Geometry.from_config(BASE | {"num_attention_heads": 64, "num_key_value_heads": 1})
    assert one.N * REAL > 48
    ways = [Step(in_cpp, num_attention_heads=64, num_key_value_heads=1)() for in_cpp in (True, False)]
    for got, expected in zip(*map(jax.tree.leaves, ways), strict=True):
        assert np.abs(got - expected).max() < 2e-5 * np.abs(expected).max()


@needs_compiler
@pytest.mark.parametrize(("V", "count"), [(1000, 256), (297, 1), (40, 1), (300, 300), (4096, 7), (9000, 64)])
@pytest.mark.parametrize("numbers", ["many equal", "all apart", "few numbers"])
def test_the_largest_numbers_of_which_the_first_are_taken(V, count, numbers):
    x = DRAW.integers(0, 9, (2, 3, V)).astype(np.float32) if numbers == "many equal" else normal(2, 3, V)
    if numbers == "few numbers":
        x[:, 0], x[:, 1, V // 2 :], x[:, 2, :: V - 1] = np.nan, -np.inf, np.nan
    got = np.asarray(jax.jit(largest, static_argnums=1)(x, count))
    expected = np.argsort(-np.nan_to_num(x, nan=-np.inf), axis=-1, kind="stable")[..., :count]
    assert (got == np.sort(expected, axis=-1)).all()


@needs_compiler
@pytest.mark.parametrize(
    ("form", "B", "M", "D", "C", "kept", "tied", "few"),
    [
        ("paper", 1, 1, 64, 32, "float32", False, False),
        ("residual", 3, 4, 38, 20, "float32", True, True),
        ("residual", 2, 8, 32, 1, "bfloat16", False, False),
        ("paper", 3, 4, 38, 20, "bfloat16", True, True),
        ("residual", 1, 1, 64, 32, "bfloat16", True, False),
        ("paper", 2, 8, 32, 100, "float32", False, True),
    ],
)
def test_drafts_are_those_of_xla(form, B, M, D, C, kept, tied, few):
    g = Geometry.from_config(BASE | {"vocab_size": 150, "hidden_size": D, "tie_word_embeddings": tied})
    weights = init_sampler(D, form, jnp.float32(1), jax.random.key(0))
    weights = jax.tree.map(lambda x: x + 0.3 * normal(*x.shape), weights)
    params = init_params(g, jax.random.key(0))
    for name in ("embed", *(() if tied else ("unembed",))):
        params[name]["embedding"] = jnp.asarray(normal(g.V, D), kept).astype(jnp.float32)
    z, first = jnp.asarray(normal(B, M, D)), jnp.asarray(DRAW.integers(0, g.V, B), jnp.int32)
    shape, model = AdapterShape(M, 8, 8.0, PROJECTIONS, form), Decoder(g, scanned=False)
    adapter = {"lora": {"layers": {}}, "mtp": {"masks": normal(M, D), "sampler": weights}}
    ids = np.arange(g.V)
    if few:
        adapter["vocabulary"] = ids = np.arange(1, g.V, 2, dtype=np.int32)

    def drafts(forward):
        variables = forward.prepare(unstack_layers(jax.tree.map(jnp.copy, params)), adapter)
        scores = forward.draft_logits(variables, z)
        np.testing.assert_allclose(scores, forward.logits(variables, z)[..., ids], atol=1e-4)
        chosen = jax.jit(lambda v: choose_drafts(forward, v, z, None, first, C, None)[0])(variables)
        return np.asarray(chosen), np.asarray(scores)

    (got, scores), (expected, theirs) = drafts(CpuForward(model, shape, "")), drafts(XlaForward(model, shape))
    assert (got == expected).all() and np.abs(scores - theirs).max() < 1e-4
    assert np.isin(got, ids).all() and (M == 1 or C == 1 or (got != ids[scores.argmax(-1)]).any())


def test_a_failed_build_is_warned_of_and_xla_computes(monkeypatch, tmp_path, capsys):
    model = Decoder(Geometry.from_config(BASE), scanned=False)

    def chosen(**environment):
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            native.library.cache_clear()
            try:
                return fastest_forward(model, None), capsys.readouterr().err
            finally:
                native.library.cache_clear()

    monkeypatch.setattr(native, "CACHE", str(tmp_path / "native"))
    for compiler in (str(tmp_path / "no-such-compiler"), "false"):
        forward, said = chosen(CXX=compiler)
        assert isinstance(forward, XlaForward) and said.count("warning: ") == 1
        assert "decoding runs in XLA" in said and compiler in said and "MTP_JAX_NATIVE=0" in said
    assert not list((tmp_path / "native").iterdir())
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler" in chosen()[1]
    assert chosen(MTP_JAX_NATIVE="0") == (XlaForward(model, None), "")


@needs_compiler
def test_only_float32_on_one_cpu_is_computed_in_cpp(monkeypatch):
    g = Geometry.from_config(BASE)
    narrow_model, model = Decoder(g, jnp.dtype("bfloat16"), scanned=False), Decoder(g, scanned=False)
    assert isinstance(fastest_forward(model, None), CpuForward)
    assert fastest_forward(narrow_model, None) == XlaForward(narrow_model, None)
    assert fastest_forward(model, None, whole=False) == XlaForward(model, None, joined=False)
    whole, library = Decoder(replace(g, int8=True), scanned=False), native.library()
    monkeypatch.setattr(native, "library", lambda: library._replace(rounds=True))
    chosen = fastest_forward(whole, None, activations="int8")
    assert chosen.rounds and chosen.build != fastest_forward(whole, None).build
    for of in (model, narrow_model):
        with pytest.raises(UserError, match="--activations int8: goes with --weights int8"):
            fastest_forward(of, None, activations="int8")
    monkeypatch.setattr(native, "library", lambda: library._replace(rounds=False))
    with pytest.raises(UserError, match="AVX-512 VNNI"):
        fastest_forward(whole, None, activations="int8")
    with pytest.raises(UserError, match='should be "float" or "int8"'):
        fastest_forward(whole, None, activations="fp8")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert fastest_forward(model, None) == XlaForward(model, None)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_the_arithmetic_is_clean_under_sanitizers(sanitizer, tmp_path):
    """The headers alone, without XLA or Python: sequences of steps of odd shapes by several threads."""
    here = Path(__file__).parent
    program, include = tmp_path / "steps", Path(native.__file__).parent
    flags = ["-std=c++17", "-O1", "-g", "-march=native", "-Wall", "-Wextra", "-Werror", "-pthread"]
    subprocess.run(
        [
            "c++",
            *flags,
            f"-fsanitize={sanitizer}",
            "-fno-sanitize-recover=all",
            "-I",
            include,
            here / "steps.cc",
            "-o",
            program,
        ],
        check=True,
    )
    outcome = subprocess.run([program], capture_output=True, text=True, timeout=600)
    assert outcome.returncode == 0, outcome.stderr
    assert "steps agree" in outcome.stdout
