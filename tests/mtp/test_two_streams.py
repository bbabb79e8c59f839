"""The two-stream forward computes the literal packed formulation: latents, every loss term, every gradient."""

import dataclasses

import families
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from tiny import SHAPE, T, geometry, latents_of, make_batch, noisy

from mtp_jax.model.decoder import Decoder
from mtp_jax.model.mask_kernel import Tiling
from mtp_jax.model.weights import init_params
from mtp_jax.mtp.adapter import init_adapter
from mtp_jax.mtp.blocks import Noise
from mtp_jax.mtp.losses import LossTerms, MultiTokenLoss

PAPER = LossTerms(target="data", sampler_on_real=True)
STEP = jnp.int32(0)


def near(ours, theirs, bound):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert np.linalg.norm(ours - theirs) <= bound * max(np.linalg.norm(theirs), 1e-6)


NOISE = Noise(2, 23)
NOISY = dataclasses.replace(SHAPE, sampler="none", noise=NOISE)

# Rows in a loss chunk, blocks in an attention chunk, blocks computed at a time.
WHOLE, PIECES = (1024, 1024, None), (7, 2, 3)
# One choice at a time says what is wrong.
CASES = {
    "all anchors": ({}, SHAPE, PAPER, {}),
    "sampled anchors": ({"anchors": 4}, SHAPE, PAPER, {}),
    "padded anchors": ({"anchors": 5, "documents": ((4, 3), (12,))}, SHAPE, PAPER, {}),
    "packed documents": ({"documents": ((5, 7), (3, 4, 5))}, SHAPE, PAPER, {}),
    "prompt without blocks": ({"documents": ((5, 7), (12,)), "prompt": 3}, SHAPE, PAPER, {}),
    "ungated": ({"anchors": 6}, dataclasses.replace(SHAPE, gated=False), PAPER, {}),
    "paper sampler": ({"anchors": 4}, dataclasses.replace(SHAPE, sampler="paper"), PAPER, {}),
    "no sampler": ({"anchors": 4}, dataclasses.replace(SHAPE, sampler="none"), LossTerms(target="data"), {}),
    "noise rows": ({"documents": ((5, 7), (3, 4, 5)), "noise": NOISE}, NOISY, LossTerms(), {}),
    "few targets": ({"anchors": 4}, dataclasses.replace(SHAPE, targets=("q", "v")), PAPER, {}),
    "hard base targets": ({"anchors": 6}, SHAPE, LossTerms(target="base_hard"), {}),
    "soft base targets": ({"documents": ((5, 7), (12,))}, SHAPE, LossTerms(target="base_soft"), {}),
    "total variation": ({"anchors": 6}, SHAPE, LossTerms(target="total_variation"), {}),
    "ungated soft": ({"anchors": 6}, dataclasses.replace(SHAPE, gated=False), LossTerms(target="base_soft"), {}),
    "decaying weights": ({"anchors": 6}, SHAPE, LossTerms(target="data", offset_weights="decay", decay=0.7), {}),
    "weights by expected length": ({"anchors": 6}, SHAPE, LossTerms(offset_weights="expected_length"), {}),
    "weights of terms": ({"anchors": 6}, SHAPE, LossTerms("data", 0.5, 2.0, 3.0), {}),
    "sliding windows": (
        {"documents": ((12,), (5, 7))},
        SHAPE,
        PAPER,
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "tied": ({"anchors": 4}, SHAPE, PAPER, {"tie_word_embeddings": True}),
    "biases": ({"anchors": 4}, SHAPE, PAPER, {"model_type": "qwen2"}),
    "biases, tied and few targets": (
        {"anchors": 4},
        dataclasses.replace(SHAPE, targets=("q", "v")),
        PAPER,
        {"model_type": "qwen2", "tie_word_embeddings": True},
    ),
}
# Several choices at a time, which together hold each.
TOGETHER = {
    "padded sequences of packed documents with prompts, paper sampler and all weights": (
        {"anchors": 5, "documents": ((6, 4), (12,)), "prompt": 3},
        dataclasses.replace(SHAPE, sampler="paper"),
        LossTerms("data", 0.5, 2.0, 3.0, sampler_on_real=True, offset_weights="decay", decay=0.7),
        {},
    ),
    "no sampler and hard base targets": (
        {"documents": ((5, 7), (3, 4, 5))},
        dataclasses.replace(SHAPE, sampler="none"),
        LossTerms(target="base_hard"),
        {},
    ),
    "sampler alone, without base head and consistency": (
        {"anchors": 5},
        SHAPE,
        LossTerms("base_soft", 0.0, 1.0, 0.0),
        {},
    ),
    "total variation by expected length, biases, tied and few targets": (
        {"anchors": 4},
        dataclasses.replace(SHAPE, targets=("q", "v")),
        LossTerms(target="total_variation", offset_weights="expected_length"),
        {"model_type": "qwen2", "tie_word_embeddings": True},
    ),
}
# Every family beside Llama's, with all that it has.
for name, options in families.USUAL.items():
    targets = SHAPE.targets[:4] if name in ("qwen3_moe", "mixtral") else SHAPE.targets
    changes = {"model_type": name, "num_hidden_layers": 3, "head_dim": 4, **options}
    if name == "phi3":  # as many frequencies as a head of 6 has pairs, three of four of which are rotated
        changes["rope_parameters"] = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
        changes |= {"hidden_size": 16, "num_attention_heads": 2}
    CASES[name] = (
        {"documents": ((5, 7), (12,)), "anchors": 6},
        dataclasses.replace(SHAPE, targets=targets),
        LossTerms(target="base_soft", sampler_on_real=True),
        changes,
    )
QUICK = ("all anchors", "noise rows", "ungated soft", *TOGETHER, *families.USUAL)
# Chunked where the shape of a case makes a difference to it.
CHUNKED = (
    "all anchors",
    "gemma2",
    "mixtral",
    "noise rows",
    "padded anchors",
    "ungated",
    "sliding windows",
    "total variation",
)
RUNS = [pytest.param(case, WHOLE, marks=() if case in QUICK else pytest.mark.slow) for case in CASES | TOGETHER] + [
    pytest.param(case, PIECES, marks=() if case == "sliding windows" else pytest.mark.slow) for case in CHUNKED
]


@pytest.mark.parametrize(("case", "chunks"), RUNS)
def test_equals_literal_packing(case, chunks):
    batch_spec, shape, terms, changes = (CASES | TOGETHER)[case]
    g, batch = geometry(**changes), make_batch(**batch_spec)
    with jax.default_matmul_precision("highest"):
        params = noisy(init_params(g, jax.random.key(0)), jax.random.key(3), 0.1)
        adapter = init_adapter(g, shape, params["embed"]["embedding"], jax.random.key(1))
        adapter = noisy(adapter, jax.random.key(2), 0.2)
        model = Decoder(g, remat="full" if chunks == PIECES else "none")
        ours = MultiTokenLoss(model, shape, terms, *(chunks if shape.gated else chunks[:2]))
        totals = ours.totals(batch)
        frozen = {"params": params}

        def compute(adapter):
            share = lambda a: ours.loss(a, frozen, batch, totals, STEP)  # noqa: E731
            return jax.value_and_grad(share, has_aux=True)(adapter), latents_of(ours, adapter, frozen, batch)

        ((total, values), gradient), (z_real, z) = jax.jit(compute)(adapter)
        literal = jax.value_and_grad(oracle.losses, has_aux=True)
        (their_total, (their_values, latents)), their_gradient = jax.jit(
            lambda a: literal(a, params, g, shape, terms, jax.tree.map(np.asarray, batch))
        )(adapter)
    for b, theirs in enumerate(latents):
        text = batch["segments"][b] > 0  # what padding computes means nothing
        near(z_real[b][text], theirs[:T][text], 1e-5)
        kept = np.asarray(z[b])[batch["anchors"][b] >= 0].reshape(-1, g.D)
        near(kept, theirs[T:], 1e-5)
    near(total, their_total, 1e-5)
    for name, value in their_values.items():
        if name in values:
            near(values[name], value, 1e-5)
        else:
            assert name in ("sampler_real_loss", "lcm_loss") or (name == "base_loss" and not terms.base_weight)
    ours_leaves, theirs_leaves = jax.tree.leaves_with_path(gradient), jax.tree.leaves(their_gradient)
    assert len(ours_leaves) == len(theirs_leaves)
    for (_, a), b in zip(ours_leaves, theirs_leaves, strict=True):
        near(a, b, 1e-4)


GATED = [case for case, (_, shape, *_) in (CASES | TOGETHER).items() if shape.gated and case != "gemma2"]  # with a cap
KERNELS = [
    pytest.param(case, platform, marks=() if case in ("sliding windows", *TOGETHER) else pytest.mark.slow)
    for case in GATED
    for platform in ("tpu", "gpu")
]


@pytest.mark.parametrize(("case", "platform"), KERNELS)
def test_the_kernel_of_mask_rows_equals_xla(case, platform):
    batch_spec, shape, terms, changes = (CASES | TOGETHER)[case]
    g, batch = geometry(**changes), make_batch(**batch_spec)
    with jax.default_matmul_precision("highest"):
        params = noisy(init_params(g, jax.random.key(0)), jax.random.key(3), 0.1)
        adapter = noisy(init_adapter(g, shape, params["embed"]["embedding"], jax.random.key(1)), jax.random.key(2), 0.2)

        def of(tiles):
            loss = MultiTokenLoss(Decoder(g, mask_tiles=tiles), shape, terms, 1024, 1024)
            share = lambda a: loss.loss(a, {"params": params}, batch, loss.totals(batch), STEP)  # noqa: E731
            return jax.jit(jax.value_and_grad(share, has_aux=True))(adapter)

        (total, _), gradient = of(Tiling(8, 4, platform, interpret=True))
        (their_total, _), their_gradient = of(None)
    near(total, their_total, 1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(their_gradient), strict=True):
        near(a, b, 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_real_rows_do_not_depend_on_the_adapter(dtype):
    g, batch = geometry(), make_batch(anchors=4)
    params = init_params(g, jax.random.key(0))
    adapter = init_adapter(g, SHAPE, params["embed"]["embedding"], jax.random.key(1))
    loss = MultiTokenLoss(Decoder(g, jnp.dtype(dtype)), SHAPE, PAPER, 64, 64)
    of = jax.jit(lambda a: latents_of(loss, a, {"params": params}, batch))
    calm, noise = of(adapter), of(noisy(adapter, jax.random.key(5), 100.0))
    assert np.array_equal(np.asarray(calm[0]), np.asarray(noise[0]))
    assert not np.allclose(np.asarray(calm[1], np.float32), np.asarray(noise[1], np.float32))


def test_standard_lora_moves_real_rows():
    g, batch = geometry(), make_batch(anchors=4)
    params = init_params(g, jax.random.key(0))
    adapter = init_adapter(g, SHAPE, params["embed"]["embedding"], jax.random.key(1))
    loss = MultiTokenLoss(Decoder(g), dataclasses.replace(SHAPE, gated=False), PAPER, 64, 64)
    calm = latents_of(loss, adapter, {"params": params}, batch)
    noise = latents_of(loss, noisy(adapter, jax.random.key(5), 1.0), {"params": params}, batch)
    assert not np.allclose(calm[0], noise[0])


def test_adapter_starts_as_the_base():
    g, batch = geometry(), make_batch(anchors=4)
    params = init_params(g, jax.random.key(0))
    adapter = init_adapter(g, SHAPE, params["embed"]["embedding"], jax.random.key(1))
    assert all(not np.any(leaf["b"]) for leaf in adapter["lora"]["layers"].values())
    loss = MultiTokenLoss(Decoder(g), SHAPE, LossTerms("data"), 64, 64)
    values = loss.loss(adapter, {"params": params}, batch, loss.totals(batch), STEP)[1]
    near(values["base_loss"], values["sampler_loss"], 1e-6)  # the residual sampler adds nothing yet
