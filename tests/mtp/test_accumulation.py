"""Blocks computed a chunk at a time: the same loss, figures and gradient as all at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import SHAPE, geometry, make_batch, noisy

from mtp_jax.model.chunks import cut
from mtp_jax.model.decoder import Decoder
from mtp_jax.model.weights import init_params
from mtp_jax.mtp.accumulation import accumulated
from mtp_jax.mtp.adapter import init_adapter
from mtp_jax.mtp.losses import LossTerms, MultiTokenLoss


def near(ours, theirs, bound):
    assert np.linalg.norm(ours - theirs) <= bound * np.linalg.norm(theirs)


@pytest.mark.parametrize(
    "terms",
    [
        LossTerms(target="data", sampler_on_real=True),
        LossTerms(target="base_soft", offset_weights="expected_length"),
    ],
    ids=["paper", "soft"],
)
def test_chunks_of_blocks_change_nothing(terms):
    g, batch = geometry(), make_batch(anchors=7, documents=((5, 7), (12,)))
    with jax.default_matmul_precision("highest"):
        params = noisy(init_params(g, jax.random.key(0)), jax.random.key(3), 0.1)
        adapter = noisy(init_adapter(g, SHAPE, params["embed"]["embedding"], jax.random.key(1)), jax.random.key(2), 0.2)
        whole = MultiTokenLoss(Decoder(g, remat="full"), SHAPE, terms, 64)
        totals = whole.totals(batch)

        def compute(loss, adapter):
            of = lambda a: loss.loss(a, {"params": params}, batch, totals, jnp.int32(0))  # noqa: E731
            return jax.value_and_grad(of, has_aux=True)(adapter)

        (total, values), gradient = jax.jit(lambda a: compute(whole, a))(adapter)
        chunked = dataclasses.replace(whole, anchor_chunk=3)  # the last chunk is filled up
        (ours_total, ours_values), ours = jax.jit(lambda a: compute(chunked, a))(adapter)
    near(ours_total, total, 1e-5)
    assert ours_values.keys() == values.keys()
    for name in values:
        near(ours_values[name], values[name], 1e-5)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(gradient), strict=True):
        near(a, b, 1e-5)


def test_the_gradient_is_summed_beside_the_sums():
    rows = jnp.arange(10.0).reshape(1, 5, 2)

    def share(trained, rest, chunk):
        values = jnp.sin(chunk * trained["w"]) * rest
        return jnp.sum(values), {"rows": jnp.sum(jnp.where(chunk > 0, 1.0, 0.0))}

    def loss(trained):
        total, sums = accumulated(share, lambda tree: tree, trained, jnp.float32(3), cut(rows, 2))
        return 2 * total, sums

    trained = {"w": jnp.float32(0.3)}
    (total, sums), gradient = jax.value_and_grad(loss, has_aux=True)(trained)
    np.testing.assert_allclose(total, 6 * np.sin(0.3 * np.arange(10)).sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient["w"], 6 * (np.arange(10) * np.cos(0.3 * np.arange(10))).sum(), rtol=1e-5)
    assert sums["rows"] == 9
