"""A block whose loss grows: at every step the loss of the method with as many masks as it covers by then."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from tiny import SHAPE, T, geometry, make_batch, noisy

from mtp_jax.model.decoder import Decoder
from mtp_jax.model.weights import init_params
from mtp_jax.mtp.adapter import init_adapter
from mtp_jax.mtp.losses import LossTerms, MultiTokenLoss

M, N = 5, 6  # masks, and the steps over which the loss comes to cover them
LONG = dataclasses.replace(SHAPE, masks=M)


def near(ours, theirs, bound):
    assert np.linalg.norm(np.asarray(ours) - np.asarray(theirs)) <= bound * max(np.linalg.norm(theirs), 1e-6)


def counts(masks, grow, steps):
    loss = MultiTokenLoss(Decoder(geometry()), dataclasses.replace(SHAPE, masks=masks), LossTerms(grow_steps=grow), 64)
    return [loss.at(step).masks_now for step in range(steps)]


@pytest.mark.parametrize(
    ("masks", "grow", "expected"),
    [
        (5, 6, [2, 2, 3, 3, 4, 4, 5, 5]),
        (4, 5, [2, 2, 2, 3, 3, 4, 4]),
        (3, 4, [1, 1, 2, 2, 3, 3]),
        (6, 2, [2, 4, 6, 6]),
        (1, 3, [1, 1, 1, 1]),
        (5, 0, [5, 5]),
    ],
)
def test_a_block_grows_evenly(masks, grow, expected):
    assert counts(masks, grow, len(expected)) == expected


def literal_rows(batch, masks, target):
    """How many of the first masks of every block have a target."""
    supervised, segments = np.asarray(batch["supervised"]), np.asarray(batch["segments"])
    return sum(
        at < T and segments[b, at] == segments[b, anchor] and (target != "data" or bool(supervised[b, at]))
        for b, anchors in enumerate(np.asarray(batch["anchors"]))
        for anchor in anchors[anchors >= 0]
        for at in range(anchor + 1, anchor + 1 + masks)
    )


@pytest.mark.parametrize(
    ("terms", "chunk", "step", "masks"),
    [
        (LossTerms("data", 0.5, 2.0, 3.0, sampler_on_real=True, offset_weights="decay", decay=0.7), None, 2, 3),
        (LossTerms("base_soft", offset_weights="expected_length"), 3, 1, 2),
    ],
    ids=["paper", "soft, in chunks"],
)
def test_the_loss_is_that_of_shorter_blocks(terms, chunk, step, masks):
    terms = dataclasses.replace(terms, grow_steps=N)
    g, batch = geometry(), make_batch(anchors=5, documents=((3, 9),), prompt=2)
    with jax.default_matmul_precision("highest"):
        params = noisy(init_params(g, jax.random.key(0)), jax.random.key(3), 0.1)
        adapter = noisy(init_adapter(g, LONG, params["embed"]["embedding"], jax.random.key(1)), jax.random.key(2), 0.2)
        loss = MultiTokenLoss(Decoder(g), LONG, terms, 64, anchor_chunk=chunk)

        def ours(adapter, step):
            now = loss.at(step)
            of = lambda a: now.loss(a, {"params": params}, batch, now.totals(batch), jnp.int32(step))  # noqa: E731
            return jax.jit(jax.value_and_grad(of, has_aux=True))(adapter)

        (_, of_all), _ = ours(adapter, N)
        assert of_all["mask_rows"] == literal_rows(batch, M, terms.target)
        (total, values), gradient = ours(adapter, step)

        def literal(adapter):
            adapter = adapter | {"mtp": adapter["mtp"] | {"masks": adapter["mtp"]["masks"][:masks]}}
            short = dataclasses.replace(LONG, masks=masks)
            return oracle.losses(adapter, params, g, short, terms, jax.tree.map(np.asarray, batch))

        of_literal = jax.jit(jax.value_and_grad(literal, has_aux=True))
        (their_total, (their_values, _)), their_gradient = of_literal(adapter)
    near(total, their_total, 1e-5)
    for name in ("base_loss", "sampler_loss", "lcm_loss"):
        near(values[name], their_values[name], 1e-5)
    for a, b in zip(*map(jax.tree.leaves, (gradient, their_gradient)), strict=True):
        near(a, b, 1e-4)
    assert not np.any(gradient["mtp"]["masks"][masks:])
    assert values["mask_rows"] == literal_rows(batch, masks, terms.target)
    near(values["agreement"], of_all["agreement"][:masks], 1e-6)
