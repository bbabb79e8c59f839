"""Losses of mask rows over few tokens are those of the definitions, and over all tokens those without a vocabulary."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from tiny import SHAPE, T, V, geometry, make_batch, noisy

from mtp_jax.model.decoder import Decoder
from mtp_jax.model.weights import init_params
from mtp_jax.mtp.adapter import init_adapter
from mtp_jax.mtp.losses import LossTerms, MultiTokenLoss
from mtp_jax.mtp.vocabulary import index_in

FEW = np.sort(np.random.default_rng(6).permutation(V)[:11]).astype(np.int32)
STEP = jnp.int32(0)


def near(ours, theirs, bound):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert np.linalg.norm(ours - theirs) <= bound * max(np.linalg.norm(theirs), 1e-6)


@pytest.fixture(scope="module")
def parts():
    g = geometry()
    params = noisy(init_params(g, jax.random.key(0)), jax.random.key(3), 0.1)
    adapter = init_adapter(g, SHAPE, params["embed"]["embedding"], jax.random.key(1))
    return g, params, noisy(adapter, jax.random.key(2), 0.2), make_batch(anchors=7, documents=((5, 7), (12,)), prompt=2)


def computed(parts, terms, ids, chunk=None):
    """The loss with every figure, and its gradient."""
    g, params, adapter, batch = parts
    shape = dataclasses.replace(SHAPE, vocabulary=None if ids is None else len(ids))
    loss = MultiTokenLoss(Decoder(g), shape, terms, 7, anchor_chunk=chunk)
    frozen = {"params": params} | ({} if ids is None else {"vocabulary": jnp.asarray(ids)})

    @jax.jit
    def of(adapter):
        share = lambda a: loss.loss(a, frozen, batch, loss.totals(batch), STEP)  # noqa: E731
        return jax.value_and_grad(share, has_aux=True)(adapter)

    with jax.default_matmul_precision("highest"):
        return of(adapter)


def agreement(parts, latents):
    """By offset, how often the likeliest of FEW at a mask row is the base model's choice among all tokens."""
    _, params, adapter, batch = parts
    table, found = np.asarray(params["unembed"]["embedding"]), {j: [] for j in range(1, SHAPE.masks + 1)}
    for b, z in enumerate(map(np.asarray, latents)):
        segments, tokens = np.asarray(batch["segments"][b]), np.asarray(batch["tokens"][b])
        for r, (kind, anchor, j, document, _) in enumerate(oracle.rows_of(batch, b, SHAPE.masks)):
            if kind == "mask" and anchor + j < T and segments[anchor + j] == document:
                embedding = params["embed"]["embedding"][tokens[anchor + j]]
                corrected = np.asarray(oracle.sampler_latents(adapter, SHAPE, embedding, z[r]))
                choice = np.argmax(z[anchor + j] @ table.T)
                found[j].append(FEW[np.argmax(corrected @ table[FEW].T)] == choice)
    return [np.mean(found[j]) for j in found]


SLOW = pytest.mark.slow
CASES = [
    (LossTerms("base_soft", offset_weights="expected_length"), None),
    pytest.param(LossTerms("base_hard", offset_weights="expected_length"), 3, marks=SLOW),
    (LossTerms("data", 0.5, 2.0, 3.0, sampler_on_real=True, offset_weights="expected_length"), 3),
    pytest.param(LossTerms("total_variation"), None, marks=SLOW),
]


@pytest.mark.parametrize(("terms", "chunk"), CASES)
def test_the_loss_is_that_of_the_definitions(parts, terms, chunk):
    g, params, adapter, batch = parts
    (total, values), gradient = computed(parts, terms, FEW, chunk)
    literal = jax.jit(
        jax.value_and_grad(
            lambda a: oracle.losses(a, params, g, SHAPE, terms, jax.tree.map(np.asarray, batch), FEW), has_aux=True
        )
    )
    with jax.default_matmul_precision("highest"):
        (their_total, (their_values, latents)), their_gradient = literal(adapter)
        found = agreement(parts, latents)
    near(total, their_total, 1e-5)
    for name in ("base_loss", "sampler_loss", "lcm_loss", "real_loss"):
        near(values[name], their_values[name], 1e-5)
    for a, b in zip(*map(jax.tree.leaves, (gradient, their_gradient)), strict=True):
        near(a, b, 1e-4)
    near(values["agreement"], found, 1e-6)
    assert 0 < np.mean(found) < 1


@pytest.mark.parametrize("terms", [LossTerms("base_soft"), pytest.param(LossTerms("base_hard"), marks=SLOW)])
def test_with_all_tokens_it_is_the_loss_without(parts, terms):
    ours, theirs = computed(parts, terms, np.arange(V)), computed(parts, terms, None)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        near(a, b, 1e-6)


def test_index_in_ascending_ids():
    tokens = np.arange(V).reshape(1, V)
    expected = [[FEW.tolist().index(token) if token in FEW else -1 for token in range(V)]]
    assert np.array_equal(index_in(jnp.asarray(FEW), jnp.asarray(tokens)), expected)
