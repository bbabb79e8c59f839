"""Generators of random weights for timing, states that stand behind a context, and what a step must read."""

import time
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from mtp_jax.cpu import fastest_forward
from mtp_jax.decoding.generator import Generator
from mtp_jax.decoding.loop import DecodeState, Decoding, Limits
from mtp_jax.decoding.options import Options
from mtp_jax.errors import UserError
from mtp_jax.model.decoder import Decoder
from mtp_jax.model.geometry import Geometry
from mtp_jax.model.weights import PROJECTIONS, init_params, unstack_layers
from mtp_jax.mtp.adapter import AdapterShape, init_adapter


def bandwidth() -> float:
    """Bytes per second that a large sum reads."""
    x = jnp.ones(1 << 28 if jax.default_backend() != "cpu" else 1 << 26, jnp.float32)
    total = jax.jit(jnp.sum)
    total(x).block_until_ready()
    times = []
    for _ in range(7):
        begin = time.perf_counter()
        total(x).block_until_ready()
        times.append(time.perf_counter() - begin)
    return x.nbytes / min(times)


def random_generator(g: Geometry, masks: int, rank: int, dtype: Any, options: Options) -> Generator:
    """A generator of random weights, bfloat16 numbers as in most checkpoints, whose adapter has `masks` masks."""
    if g.experts:
        raise UserError("a step of a mixture of experts reads those that its rows choose; give a dense model.")
    params = jax.jit(lambda key: init_params(g, key, jnp.bfloat16))(jax.random.key(0))
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    shape = AdapterShape(masks, rank, 2.0 * rank, PROJECTIONS, "residual")
    adapter = init_adapter(g, shape, params["embed"]["embedding"][:256].astype(jnp.float32), jax.random.key(1))
    adapter = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), adapter)
    forward = fastest_forward(Decoder(g, dtype, scanned=False), shape)
    return Generator(forward, forward.prepare(unstack_layers(params), adapter), None, (), options)


def without_sampler(generator: Generator) -> Generator:
    """The same weights without the sampler head."""
    assert generator.shape is not None
    forward = replace(generator.forward, shape=replace(generator.shape, sampler="none"))  # type: ignore[type-var]
    mtp = {"masks": generator.variables["mtp"]["masks"]}
    return Generator(forward, generator.variables | {"mtp": mtp}, None, (), generator.options)


class Behind:
    """Decoding steps of one plan behind a context that nobody prefilled: the cache holds zeros, which cost the same."""

    def __init__(self, generator: Generator, decoding: Decoding, batch: int, context: int, new: int):
        """`new`: tokens that there is room for."""
        d = decoding.plan.drafts
        self.variables, self.slots, self.context = generator.variables, context + new + d + 1, context
        full = jnp.full(batch, context + new, jnp.int32)
        self.limits = Limits(full, jnp.zeros(0, jnp.int32))
        one, length = jnp.zeros((batch, 1), jnp.int32), jnp.ones(batch, jnp.int32)

        def prefill(variables: Any) -> DecodeState:
            return decoding.prefill(variables, one, length, self.limits, self.slots, generator.dtype)

        shapes = jax.eval_shape(prefill, self.variables)

        def fresh() -> DecodeState:
            keys = jax.vmap(jax.random.key)(jnp.arange(batch))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes._replace(keys=None))
            ready = {"length": jnp.full(batch, context, jnp.int32), "valid": jnp.full(batch, d, jnp.int32)}
            return zeros._replace(keys=keys, **ready)

        self.fresh = jax.jit(fresh)
        state = jax.eval_shape(fresh)
        advance = jax.jit(decoding.advance, donate_argnums=1)
        self.program = advance.lower(self.variables, state, self.limits, jnp.int32(0), None).compile()

    def run(self, state: DecodeState, steps: int) -> tuple[float, DecodeState]:
        """Seconds of so many steps, or of fewer where all sequences end, and the state behind them."""
        jax.block_until_ready(state)
        begin = time.perf_counter()
        state = self.program(self.variables, state, self.limits, jnp.int32(steps), None)
        jax.block_until_ready(state.length)
        return time.perf_counter() - begin, state


class Bytes:
    """What a decoding step must read: weights with one whole table, adapter and cache."""

    def __init__(self, generator: Generator):
        sizes = [(str(path), leaf.nbytes) for path, leaf in jax.tree.leaves_with_path(generator.variables)]
        self.adapter = sum(s for path, s in sizes if any(part in path for part in ("'mtp'", "loras", "['a']", "['b']")))
        tables = [size for path, size in sizes if any(part in path for part in ("embed'", "'head'"))]
        self.base = sum(size for _, size in sizes) - self.adapter - sum(tables) + tables[0]  # that of the head
        self.g, self.itemsize = generator.g, generator.dtype.itemsize

    def of_step(self, mask_rows: int, batch: int, context: int) -> int:
        """Bytes of one step behind a context."""
        cache = 2 * self.g.L * batch * self.g.K * self.g.H * context * self.itemsize
        return self.base + cache + (self.adapter if mask_rows else 0)
