"""What drafts buy on this device in the real loop, with acceptance that is drawn from a curve instead of compared.

Random weights accept nothing. Here the number of accepted drafts of each step is drawn by depth from the paper's
figures for GSM8k, so that tokens per step are the paper's and the time is this device's. Everything else is computed.
"""

import statistics
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
from random_model import Behind, random_generator

from mtp_jax.decoding.loop import DecodeState, Decoding, keys_for
from mtp_jax.decoding.options import Options
from mtp_jax.decoding.plan import parse_plan
from mtp_jax.evaluating.paper import TABLE_1
from on_device import Cases, Setting
from on_device.geometries import geometry

PLANS = ("none", "linear:4", "linear:8", "quadratic:1", "quadratic:2", "quadratic:4", "quadratic:8")
_FORCED = 7  # the purpose of a key
_ROUNDS = 3
_TRACED = 8  # steps of a trace


def reach(tokens_per_step: tuple[float, ...]) -> tuple[float, ...]:
    """How likely the first j drafts are all accepted, from tokens per step with 1, 2, ... masks."""
    return tuple(after - before for before, after in zip((1.0, *tokens_per_step), tokens_per_step, strict=False))


@dataclass(frozen=True)
class Forced(Decoding):
    """Decoding whose acceptance is drawn."""

    curve: tuple[float, ...] = ()

    def accept(self, state: DecodeState, choice: Int[Array, "B R"]) -> Int[Array, " B"]:
        """As many drafts as one number drawn for each sequence reaches on the curve, and no more than are valid."""
        del choice
        drawn = jax.vmap(jax.random.uniform)(keys_for(_FORCED, state.keys, state.length))
        deep = jnp.sum(drawn[:, None] < jnp.asarray(self.curve[: self.plan.drafts]), axis=1)
        return jnp.minimum(deep, state.valid).astype(jnp.int32)


def cases(setting: Setting) -> Cases:
    """One case for each batch size."""
    plans = ("none", "linear:2", "quadratic:2") if setting.tiny else PLANS
    context, new = (64, 32) if setting.tiny else (1024, 256)
    generator = random_generator(geometry(setting.decoding), 8, setting.rank, jnp.dtype(setting.dtype), Options())
    curve = reach(TABLE_1["gsm8k"].tokens_per_step)

    def measure(batch: int) -> dict[str, Any]:
        runs = {}
        for name in plans:
            options = generator.options.using(plan=parse_plan(name))
            runs[name] = Behind(generator, Forced(generator.forward, options, curve=curve), batch, context, new)
        rates: dict[str, list[float]] = {name: [] for name in runs}
        depth = {}
        for turn in range(_ROUNDS + 1):
            for name, run in runs.items():
                seconds, state = run.run(run.fresh(), 1 << 30)
                depth[name] = batch * new / float(jnp.sum(state.steps))
                if turn:
                    rates[name].append(batch * new / seconds)
        for name, run in runs.items():
            place = "decode", f"batch_{batch}", name.replace(":", "_")
            setting.trace(lambda run=run: run.run(run.fresh(), _TRACED), *place)
        middle = {name: statistics.median(found) for name, found in rates.items()}
        return {
            "acceptance": "forced: GSM8k of the paper's Table 1",
            "batch": batch,
            "context": context,
            "new_tokens": new,
            "plans": {
                name: {
                    "tokens_per_step": depth[name],
                    "tokens_per_second": middle[name],
                    "range": [min(rates[name]), max(rates[name])],
                    "speedup": middle[name] / middle["none"],
                }
                for name in runs
            },
        }

    for batch in (1, 2) if setting.tiny else (1, 8, 32):
        yield f"batch {batch}", lambda batch=batch: measure(batch)
