"""What a training step does not compute: nothing of the real stream twice, no LoRA on real rows, no full logits."""

import jax
import jax.numpy as jnp
import pytest
from tiny import SHAPE, T, geometry, make_batch

from mtp_jax.model.decoder import Decoder
from mtp_jax.model.weights import init_params
from mtp_jax.mtp.adapter import init_adapter
from mtp_jax.mtp.losses import LossTerms, MultiTokenLoss

G_BLOCKS = 5
STEP = jnp.int32(0)


def dots(jaxpr, times=1):
    """Every matrix product of a program as (left shape, right shape, how often it runs)."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield *(tuple(var.aval.shape) for var in eqn.invars), times
        inner = times * eqn.params.get("length", 1) if eqn.primitive.name == "scan" else times
        for value in eqn.params.values():
            for sub in value if isinstance(value, tuple | list) else [value]:
                if hasattr(sub, "eqns"):
                    yield from dots(sub, inner)
                elif hasattr(sub, "jaxpr"):
                    yield from dots(sub.jaxpr, inner)


def products_of_real_rows(program, *arguments):
    """How many products have all real rows of a layer on one side and one of its weight matrices on the other."""
    shapes = dots(jax.make_jaxpr(program)(*arguments).jaxpr)
    return sum(times for a, b, times in shapes if len(a) == 3 and a[1] == T and len(b) == 2)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_the_real_stream_is_computed_once(remat):
    g, batch = geometry(), make_batch(anchors=G_BLOCKS)
    params = init_params(g, jax.random.key(0))
    adapter = init_adapter(g, SHAPE, params["embed"]["embedding"], jax.random.key(1))
    loss = MultiTokenLoss(Decoder(g, remat=remat), SHAPE, LossTerms(target="data", lcm_weight=0.0), 4, 2)

    def total(adapter):
        return loss.loss(adapter, {"params": params}, batch, loss.totals(batch), STEP)[0]

    def plain(params):
        return Decoder(g).apply({"params": params}, batch["tokens"], batch["positions"], batch["segments"])[0]

    once = products_of_real_rows(plain, params)
    assert once == 7 * g.L
    assert products_of_real_rows(jax.grad(total), adapter) == once


def test_no_logits_of_all_rows_at_once():
    g, batch = geometry(vocab_size=1000), make_batch(anchors=G_BLOCKS)
    params = init_params(g, jax.random.key(0))
    adapter = init_adapter(g, SHAPE, params["embed"]["embedding"], jax.random.key(1))

    def temporaries(loss_chunk):
        loss = MultiTokenLoss(Decoder(g, remat="full"), SHAPE, LossTerms(), loss_chunk, 64)
        step = jax.jit(jax.grad(lambda a: loss.loss(a, {"params": params}, batch, loss.totals(batch), STEP)[0]))
        return step.lower(adapter).compile().memory_analysis().temp_size_in_bytes

    rows = 2 * G_BLOCKS * SHAPE.masks
    assert temporaries(6) < temporaries(10_000) - 4 * rows * 1000
