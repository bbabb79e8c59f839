"""One step: parts of a batch, rematerialisation and chunks change how it is computed, not what."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import unflatten_dict

from mtp_jax.config import Train
from mtp_jax.model.decoder import Decoder
from mtp_jax.model.geometry import Geometry
from mtp_jax.model.weights import init_params, weight_table
from mtp_jax.training.objectives import NextToken
from mtp_jax.training.step import WEIGHTS_FINITE, TrainState, learning_rate, make_optimizer, make_train_step

B, T = 8, 21
SETTINGS = Train(steps=100, batch_size=B, sequence_length=T, learning_rate=1e-2)


@pytest.fixture(scope="module")
def g(llama_config):
    return Geometry.from_config(llama_config)


@pytest.fixture(scope="module")
def params(g):
    return init_params(g, jax.random.key(1))


def random_batch(V, seed=0):
    """Sequences of two documents and padding, with an unlike number of supervised rows in each."""
    rng = np.random.default_rng(seed)
    cut, end = rng.integers(3, 10, (B, 1)), rng.integers(11, T, (B, 1))
    at = np.arange(T)[None]
    segments = np.where(at < cut, 1, np.where(at < end, 2, 0))
    tokens = rng.integers(0, V, (B, T + 1))
    after = np.concatenate([segments[:, 1:], np.zeros((B, 1), int)], 1)
    return {
        "tokens": tokens[:, :-1].astype(np.int32),
        "labels": tokens[:, 1:].astype(np.int32),
        "supervised": (segments == after) & (segments > 0),
        "positions": np.where(segments == 2, at - cut, at).astype(np.int32),
        "segments": segments.astype(np.int32),
    }


def step_with(g, params, tx, accumulation=1, chunk=40, **decoder):
    step = make_train_step(NextToken(Decoder(g, **decoder), chunk), tx, lambda _: 0.0, accumulation)
    with jax.default_matmul_precision("highest"):
        return jax.jit(step)(TrainState(jnp.int32(0), params, tx.init(params)), None, random_batch(g.V))


def change(before, after):
    """How far a step moved, as one vector."""
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return np.concatenate([np.asarray(b - a, np.float64).ravel() for a, b in pairs])


def distance(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.fixture(scope="module")
def reference(g, params):
    state, metrics = step_with(g, params, optax.sgd(1.0))
    return change(params, state.trained), metrics


@pytest.mark.parametrize(
    "how",
    [
        {"accumulation": 2},
        {"accumulation": 4},
        {"chunk": 10_000},
        {"remat": "dots"},
        {"remat": "full"},
        {"remat": "full", "accumulation": 2},
    ],
    ids=str,
)
def test_the_step_is_the_same_however_it_is_computed(g, params, reference, how):
    state, metrics = step_with(g, params, optax.sgd(1.0), **how)
    assert distance(change(params, state.trained), reference[0]) <= 1e-5
    for name, value in reference[1].items():
        assert np.isclose(metrics[name], value, rtol=1e-5), name


def test_the_loss_is_the_mean_over_supervised_rows(g, params, reference):
    batch = random_batch(g.V)
    model = Decoder(g)

    def logits_of(*rows):
        latents, _ = model.apply({"params": params}, *rows)
        return model.apply({"params": params}, latents, method="logits")

    with jax.default_matmul_precision("highest"):
        logits = jax.jit(logits_of)(*(jnp.asarray(batch[name]) for name in ("tokens", "positions", "segments")))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    right = np.asarray(logits.argmax(-1) == batch["labels"])
    assert np.isclose(reference[1]["loss"], losses[batch["supervised"]].mean(), rtol=1e-5)
    assert np.isclose(reference[1]["accuracy"], right[batch["supervised"]].mean())
    assert np.isclose(reference[1]["gradient_norm"], np.linalg.norm(reference[0]), rtol=1e-5)


def test_bfloat16_gives_a_float32_loss_close_to_float32(g, params, reference):
    state, metrics = step_with(g, params, optax.sgd(1.0), dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trained)} == {jnp.dtype(jnp.float32)}
    assert metrics["loss"].dtype == jnp.float32
    assert metrics["loss"] != reference[1]["loss"]
    assert np.isclose(metrics["loss"], reference[1]["loss"], rtol=5e-3)
    assert distance(change(params, state.trained), reference[0]) < 0.05


def test_weights_that_are_not_finite_are_noticed(g, params, reference):
    assert reference[1][WEIGHTS_FINITE] == 1
    assert step_with(g, params, optax.sgd(float("inf")))[1][WEIGHTS_FINITE] == 0


# ---- optimizer


@pytest.mark.parametrize("schedule", ["flat", "cosine"])
@pytest.mark.parametrize("warmup", [0, 10])
def test_the_learning_rate_follows_the_formula(schedule, warmup):
    settings = SETTINGS.model_copy(update={"schedule": schedule, "warmup_steps": warmup})
    rate, peak, steps = learning_rate(settings), settings.learning_rate, settings.steps

    def expected(step):
        if step < warmup:
            return peak * step / warmup
        if schedule == "flat":
            return peak
        share = (step - warmup) / (steps - warmup)
        return peak * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * share)))

    for step in [0, 1, 5, 9, 10, 11, 50, 99, 100]:
        assert np.isclose(rate(step), expected(step), rtol=1e-5, atol=1e-12), step


def optimizer_for(g, **settings):
    decays = unflatten_dict({weight.path: weight.decays for weight in weight_table(g)})
    return make_optimizer(SETTINGS.model_copy(update=settings), decays)


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True}, {"model_type": "qwen3"}], ids=str)
def test_weight_decay_touches_matrices_only(llama_config, changes):
    g = Geometry.from_config({**llama_config, **changes})
    shapes = jax.eval_shape(lambda: init_params(g, jax.random.key(0)))
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
    zeros = jax.tree.map(np.zeros_like, params)
    tx = optimizer_for(g, weight_decay=0.5)
    updates = jax.jit(lambda: tx.update(zeros, tx.init(params), params)[0])()
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        per_layer = update.ndim - (path[0].key == "layers")
        expected = -0.5 * SETTINGS.learning_rate if per_layer == 2 else 0.0
        assert np.allclose(update, expected, rtol=1e-6), path


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_gradients_are_clipped_by_their_global_norm(g, params, scale):
    gradient = jax.tree.map(lambda x: scale * jnp.ones_like(x), params)
    norm = scale * np.sqrt(sum(leaf.size for leaf in jax.tree.leaves(params)))
    clipped = jax.tree.map(lambda x: x * min(1.0, 0.5 / norm), gradient)

    def moments(clip, gradient):
        tx = optimizer_for(g, clip_norm=clip)
        return jax.jit(lambda: optax.tree.get(tx.update(gradient, tx.init(params), params)[1], "mu"))()

    ours, expected = moments(0.5, gradient), moments(None, clipped)
    for a, b in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


# ---- against torch


def torch_losses(model, batches, settings):
    """Losses of a training loop written with torch alone."""
    import torch

    matrices = [w for w in model.parameters() if w.ndim == 2]
    others = [w for w in model.parameters() if w.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=1e-8,
    )
    losses = []
    for batch in batches:
        tokens = torch.from_numpy(batch["tokens"]).long()
        labels = torch.from_numpy(np.where(batch["supervised"], batch["labels"], -100)).long()
        logits = model(tokens).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses


def one_document(batch):
    """A batch as a model without segments sees it: a single document per sequence."""
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    return {**batch, "positions": positions, "segments": np.ones((B, T), np.int32)}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_training_is_what_torch_does(llama_config, tied, tmp_path):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from mtp_jax.model.base import open_base

    torch.manual_seed(0)
    # Without a padding token: torch gives the embedding of that one no gradient.
    changes = {"tie_word_embeddings": tied, "pad_token_id": None}
    config = LlamaConfig(**{**llama_config, **changes}, attn_implementation="eager")
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "before")
    base = open_base(str(tmp_path / "before"))
    g = base.g
    settings = SETTINGS.model_copy(update={"weight_decay": 0.3, "clip_norm": 0.5, "beta2": 0.99})
    batches = [one_document(random_batch(g.V, seed)) for seed in range(5)]

    tx = optimizer_for(g, **{name: getattr(settings, name) for name in ("weight_decay", "clip_norm", "beta2")})
    step = jax.jit(make_train_step(NextToken(Decoder(g), 40), tx, learning_rate(settings), 1))
    params = base.load()
    state, losses = TrainState(jnp.int32(0), params, jax.jit(tx.init)(params)), []
    with jax.default_matmul_precision("highest"):
        for batch in batches:
            state, metrics = step(state, None, batch)
            losses.append(float(metrics["loss"]))
            assert metrics["gradient_norm"] > settings.clip_norm  # clipping is at work

    expected = torch_losses(model, batches, settings)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert abs(expected[0] - expected[-1]) > 1e-2
    model.save_pretrained(tmp_path / "after")
    trained = open_base(str(tmp_path / "after")).load()
    for (path, ours), theirs, start in zip(
        jax.tree_util.tree_leaves_with_path(state.trained), *map(jax.tree.leaves, (trained, params)), strict=True
    ):
        moved = np.linalg.norm(theirs - start)
        assert moved > 0 and np.linalg.norm(ours - theirs) <= 1e-3 * moved, jax.tree_util.keystr(path)
