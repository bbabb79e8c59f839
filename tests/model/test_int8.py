"""An int8 base is the model of its rounded weights: loaded, computed, trained on, decoded, told from the stored one."""

import dataclasses
import json
import shutil

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from exported import export, noisy_adapter
from whole_numbers import as_floats, can_round, quantised

import mtp_jax
from mtp_jax.config_file import validate
from mtp_jax.decoding.plan import parse_plan
from mtp_jax.errors import UserError
from mtp_jax.model import folder
from mtp_jax.model.base import open_base
from mtp_jax.model.decoder import Decoder
from mtp_jax.model.geometry import Geometry
from mtp_jax.model.int8 import quantise
from mtp_jax.model.projection import product
from mtp_jax.model.weights import weight_table
from mtp_jax.mtp.adapter import AdapterShape, init_adapter
from mtp_jax.mtp.adapter_folder import open_adapter
from mtp_jax.mtp.blocks import choose_anchors
from mtp_jax.mtp.losses import LossTerms, MultiTokenLoss

needs_rounding = pytest.mark.skipif(not can_round(), reason="needs a C++ compiler and a processor with AVX-512 VNNI")
MODELS = {"llama": {"attention_bias": True}, **{name: families.USUAL[name] for name in ("gemma2", "phi3", "qwen3_moe")}}


@pytest.fixture(scope="module", params=MODELS)
def bases(request, models, tmp_path_factory):
    """A random model as it is stored and as int8."""
    folder = tmp_path_factory.mktemp(request.param)
    models.make(request.param, **MODELS[request.param]).save_pretrained(folder)
    return open_base(str(folder)), open_base(str(folder), weights="int8")


def test_rounding_and_product_are_those_of_qwix():
    draw = np.random.default_rng(0)
    matrix, x = draw.standard_normal((70, 33)).astype(np.float32), draw.standard_normal((5, 70)).astype(np.float32)
    matrix[:, 3] = 0
    values, scale = quantise(matrix)
    theirs = qwix.quantize(jnp.asarray(matrix), jnp.int8, channelwise_axes=(1,))
    some = np.arange(33) != 3
    assert values.dtype == np.int8 and np.abs(values[:, some]).max(axis=0).tolist() == [127] * 32
    # Of a column's largest number qwix makes -128 or -127, as its rounding of the scale has it.
    assert np.array_equal(values[:, some], np.maximum(np.asarray(theirs.qvalue), -127)[:, some])
    np.testing.assert_allclose(scale[some], np.asarray(theirs.scale)[0, some], rtol=1e-6)
    want = qwix.dot_general(jnp.asarray(x), theirs, (((1,), (0,)), ((), ())))
    np.testing.assert_allclose(
        product(jnp.asarray(x), jnp.asarray(values), jnp.asarray(scale)), want, atol=2e-2 * np.abs(want).max()
    )
    np.testing.assert_allclose(
        product(jnp.asarray(x), jnp.asarray(values), jnp.asarray(scale)), x @ (values * scale), atol=1e-4
    )
    assert not values[:, 3].any() and scale[3] == 1


def test_loaded_weights_are_the_rounded_ones(bases):
    stored, int8 = bases
    g, want = quantised(stored.load(np.float32), stored.g)
    found = int8.load(np.float32)
    assert int8.g == g and jax.tree.structure(found) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and np.allclose(np.asarray(a, float), np.asarray(b, float), rtol=1e-6), path


def run(g, params, tokens):
    model, tokens = Decoder(g), jnp.asarray(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    def logits(params):
        latents, _ = model.apply({"params": params}, tokens, positions)
        return model.apply({"params": params}, latents, method="logits")

    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(logits)(params))


def test_logits_are_those_of_the_rounded_weights(bases):
    stored, int8 = bases
    tokens, params = np.random.default_rng(1).integers(0, stored.g.V, (2, 24)), int8.load(np.float32)
    found, want = run(int8.g, params, tokens), run(*as_floats(params, stored.g), tokens)
    assert np.abs(found - want).max() < 1e-5 * np.abs(want).max()
    exact = run(stored.g, stored.load(np.float32), tokens)
    assert 1e-3 < np.abs(found - exact).max() / np.abs(exact).max() < 0.3, "rounding makes no difference, or too much"


def test_losses_and_gradients_are_those_of_the_rounded_weights(bases):
    stored, int8 = bases
    params, draw = int8.load(np.float32), np.random.default_rng(2)
    targets = ("q", "k", "v", "o") if stored.g.experts else ("q", "k", "v", "o", "gate", "up", "down")
    shape = AdapterShape(2, 3, 6.0, targets, "residual")
    adapter = init_adapter(stored.g, shape, params["embed"]["embedding"], jax.random.key(0))
    adapter = jax.tree.map(lambda x: x + 0.1 * draw.standard_normal(x.shape).astype(np.float32), adapter)
    text = draw.integers(0, stored.g.V, (2, 13)).astype(np.int32)
    here = np.ones((2, 12), bool)
    anchors = np.stack([choose_anchors(np.arange(12, dtype=np.uint64), here[0], here[0].astype(int), 5)] * 2)
    batch = {"tokens": text[:, :-1], "labels": text[:, 1:], "supervised": here, "segments": here.astype(np.int32)}
    batch |= {"positions": np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12)), "anchors": anchors}
    batch = jax.tree.map(jnp.asarray, batch)

    def of(g, params):
        loss = MultiTokenLoss(Decoder(g), shape, LossTerms("base_soft"), 64, 64)
        share = lambda a: loss.loss(a, {"params": params}, batch, loss.totals(batch), jnp.int32(0))  # noqa: E731
        with jax.default_matmul_precision("highest"):
            return jax.jit(jax.value_and_grad(share, has_aux=True))(adapter)

    (loss, _), gradient = of(int8.g, params)
    (want, _), of_floats = of(*as_floats(params, stored.g))
    assert abs(loss - want) < 1e-5 * abs(want)
    for (path, a), b in zip(jax.tree.leaves_with_path(gradient), jax.tree.leaves(of_floats), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * max(np.linalg.norm(b), 1e-6), path


@pytest.fixture(scope="module")
def pair(small_folder, tmp_path_factory):
    """Adapters of the small model as it is stored and as int8."""
    folder = tmp_path_factory.mktemp("pair")
    for weights in ("stored", "int8"):
        noisy_adapter(small_folder, folder / weights, 3)
    base, config = open_base(str(small_folder), weights="int8"), folder / "int8" / "mtp_config.json"
    held = json.loads(config.read_text())
    held["base"] |= {"fingerprint": base.fingerprint, "values": base.values, "weights": "int8"}
    config.write_text(json.dumps(held))
    return small_folder, folder


@pytest.mark.parametrize("native", ["1", "0"])
def test_decoding_is_lossless_and_the_int8_models_own(pair, native, monkeypatch):
    monkeypatch.setenv("MTP_JAX_NATIVE", native)
    model, folder = pair
    prompts, texts = [[5, 6, 7], [9, 10, 11, 12, 13, 14]], {}
    for weights in ("stored", "int8"):
        for plan in ("none", "linear:3", "quadratic:3"):
            generator = mtp_jax.load(
                str(model), adapter=str(folder / weights), plan=parse_plan(plan), dtype="float32", weights=weights
            )
            generator.stops = ()
            texts[weights, plan] = [done.token_ids for done in generator.complete(prompts, 40, 2)]
    for weights in ("stored", "int8"):
        assert texts[weights, "none"] == texts[weights, "linear:3"] == texts[weights, "quadratic:3"]
    assert texts["stored", "none"] != texts["int8", "none"]


@needs_rounding
def test_decoding_with_rounded_activations_is_lossless(pair):
    model, folder = pair
    texts = {}
    for plan in ("none", "linear:3", "quadratic:3"):
        options = {"plan": parse_plan(plan), "dtype": "float32", "weights": "int8", "activations": "int8"}
        generator = mtp_jax.load(str(model), adapter=str(folder / "int8"), **options)
        generator.stops = ()
        texts[plan] = [done.token_ids for done in generator.complete([[5, 6, 7], [9, 10, 11, 12, 13, 14]], 40, 2)]
    assert texts["none"] == texts["linear:3"] == texts["quadratic:3"]


def test_the_two_models_are_told_apart(pair, capsys, tmp_path):
    model, folder = pair
    stored, int8 = (open_base(str(model), weights=weights) for weights in ("stored", "int8"))
    assert stored.fingerprint != int8.fingerprint and stored.values != int8.values
    assert dataclasses.replace(stored.g, int8=True) == int8.g
    for base, weights in ((stored, "int8"), (int8, "stored"), (int8, "int8")):
        assert open_adapter(str(folder / weights), base).digest
        said = capsys.readouterr().err
        assert (f"was trained on weights held as {weights}" in said) == (base.weights != weights)
    other = json.loads((folder / "int8" / "mtp_config.json").read_text())
    other["base"] |= {"fingerprint": "0" * 64, "values": "0" * 64}
    shutil.copytree(folder / "int8", tmp_path / "other")
    (tmp_path / "other" / "mtp_config.json").write_text(json.dumps(other))
    for base in (stored, int8):
        with pytest.raises(UserError, match="this adapter was trained for"):
            open_adapter(str(tmp_path / "other"), base)


def test_an_export_says_so(pair, tmp_path):
    model, folder = pair
    out = export(folder / "int8", tmp_path / "out", model, base="copy")
    assert json.loads((out / "mtp_config.json").read_text())["base"]["weights"] == "int8"
    assert "int8" in (out / "README.md").read_text()
    again = export(out, tmp_path / "again", model, base="reference")
    assert json.loads((again / "mtp_config.json").read_text())["base"]["weights"] == "int8"


def test_the_commands_take_it(pair, command):
    model, folder = pair
    options = ("--model", model, "--adapter", folder / "int8", "--plan", "quadratic:2", "--prompt", "the cat")
    assert command("generate", *options, "--weights", "int8", "--compare").code == 0
    warned = command("generate", *options)
    assert warned.code == 0 and "--weights int8" in warned.err
    refused = command("generate", *options, "--activations", "int8")
    assert refused.code == 2 and len(refused.errors) == 1 and "goes with --weights int8" in refused.errors[0]


def test_transformers_would_run_another_model(pair, command, tmp_path):
    (tmp_path / "asked.jsonl").write_text('{"prompt": "the cat"}\n')
    options = (
        "--model",
        pair[0],
        "--suite",
        tmp_path / "asked.jsonl",
        "--plans",
        "none,transformers",
        "--out",
        tmp_path / "out",
    )
    refused = command("evaluate", *options, "--weights", "int8")
    assert refused.code == 2 and refused.errors == [
        "--plans transformers: would run the stored weights, another model; leave it out, or --weights int8."
    ]


def test_a_base_that_is_trained_is_refused(tree):
    tree["model"]["weights"] = "int8"
    with pytest.raises(UserError, match="weights: int8 is for a frozen base"):
        validate(tree, "tree")


def test_a_quantised_checkpoint_is_told_of_it():
    with pytest.raises(UserError, match=r"quantised \(awq\).*model.weights: int8"):
        Geometry.from_config({"model_type": "llama", "quantization_config": {"quant_method": "awq"}})


def test_weights_held_otherwise_are_refused(small_folder):
    with pytest.raises(UserError, match='weights=\'INT8\': should be "stored" or "int8"'):
        mtp_jax.load(str(small_folder), weights="INT8")


def test_channels_in_parts_are_quantised_once(small_folder, monkeypatch):
    base, counted, read = open_base(str(small_folder), weights="int8"), [], {}
    monkeypatch.setattr(folder, "quantise", lambda matrix: counted.append(matrix.size) or quantise(matrix))
    weight = next(w for w in weight_table(base.g) if w.path == ("layers", "q", "kernel"))
    sources = [(base.tensors.stored[key], key) for key in weight.stored_keys()]
    L, rows, columns = weight.shape
    parts = [
        folder._part(
            weight, sources, np.dtype(np.int8), read, (slice(0, L), slice(at, at + rows // 4), slice(0, columns))
        )
        for at in range(0, rows, rows // 4)
    ]
    assert sum(counted) == L * rows * columns
    assert (np.concatenate(parts, axis=1) == np.asarray(base.load()["layers"]["q"]["kernel"])).all()
