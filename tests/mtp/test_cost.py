"""What a training step does not compute: nothing of the real stream twice, no LoRA on real rows, no full logits."""

from math import prod
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from tiny import SHAPE, T, geometry, make_batch

from mtp_jax.model.decoder import Decoder
from mtp_jax.model.weights import PROJECTIONS, init_params
from mtp_jax.mtp.adapter import AdapterShape, init_adapter
from mtp_jax.mtp.losses import LossTerms, MultiTokenLoss
from mtp_jax.training.flops import model_flops, peak_flops
from mtp_jax.training.objectives import NextToken

G_BLOCKS = 5
STEP = jnp.int32(0)


def dots(jaxpr, times=1):
    """Every matrix product of a program as (left shape, right shape, how often it runs, its operations)."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            left, right = (tuple(var.aval.shape) for var in eqn.invars)
            summed = prod(left[i] for i in eqn.params["dimension_numbers"][0][0])
            yield left, right, times, 2 * times * summed * prod(eqn.outvars[0].aval.shape)
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
    return sum(times for a, b, times, _ in shapes if len(a) == 3 and a[1] == T and len(b) == 2)


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


@pytest.mark.parametrize(
    ("shape", "terms"),
    [
        ({}, LossTerms("base_soft")),
        ({"vocabulary": 60}, LossTerms("base_soft", 0.0, lcm_weight=0.0)),
        ({"sampler": "none", "targets": ("q", "v")}, LossTerms("data", 0.0)),
        ({"gated": False}, LossTerms("data", sampler_weight=2.0)),
    ],
    ids=["all", "sampler over some tokens", "no sampler", "ungated"],
)
def test_model_flops_are_the_products_of_a_step(shape, terms):
    """Half of the scores of real rows are masked, which the definition leaves out and plain XLA computes."""
    g, batch = geometry(vocab_size=200, hidden_size=64, intermediate_size=96), make_batch(anchors=G_BLOCKS)
    shape = AdapterShape(**{"masks": 3, "rank": 4, "alpha": 8.0, "targets": PROJECTIONS, "sampler": "residual"} | shape)
    objective = MultiTokenLoss(Decoder(g), shape, terms, 1 << 20, 1 << 20)
    params = jax.eval_shape(lambda: init_params(g, jax.random.key(0)))
    table = jax.ShapeDtypeStruct((g.V, g.D), jnp.float32)
    adapter = jax.eval_shape(lambda table: init_adapter(g, shape, table, jax.random.key(1)), table)
    frozen = {"params": params}
    if shape.vocabulary is not None:
        frozen |= {"vocabulary": jax.ShapeDtypeStruct((shape.vocabulary,), jnp.int32)}

    def loss(adapter, frozen):
        return objective.loss(adapter, frozen, batch, objective.totals(batch), STEP)[0]

    counted = sum(of for *_, of in dots(jax.make_jaxpr(jax.grad(loss))(adapter, frozen).jaxpr))
    B = len(batch["tokens"])
    assert 0.93 < model_flops(objective, B, T, G_BLOCKS) / counted <= 1.01


def test_model_flops_of_the_next_token():
    g, batch = geometry(vocab_size=200, hidden_size=64, intermediate_size=96), make_batch()
    objective = NextToken(Decoder(g), 1 << 20)
    params = jax.eval_shape(lambda: init_params(g, jax.random.key(0)))

    def loss(params):
        return objective.loss(params, None, batch, objective.totals(batch))[0]

    counted = sum(of for *_, of in dots(jax.make_jaxpr(jax.grad(loss))(params).jaxpr))
    assert 0.93 < model_flops(objective, len(batch["tokens"]), T) / counted <= 1.01


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("NVIDIA L40S", None),  # no L4
        ("cpu", None),
    ],
)
def test_the_peak_of_a_device(name, peak):
    assert peak_flops(SimpleNamespace(device_kind=name)) == peak
