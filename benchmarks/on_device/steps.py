"""The time of a decoding step against its rows, beside the bytes that it must read at the bandwidth of a large sum."""

import statistics
from typing import Any

import jax.numpy as jnp
from random_model import Behind, Bytes, bandwidth, random_generator, without_sampler

from mtp_jax.decoding.generator import Generator
from mtp_jax.decoding.loop import Decoding
from mtp_jax.decoding.options import Options
from mtp_jax.decoding.plan import parse_plan
from on_device import Cases, Setting
from on_device.geometries import geometry

PLANS = ("none", *(f"{kind}:{masks}" for masks in (1, 2, 4, 8) for kind in ("linear", "quadratic")))
_MOST, _STEPS, _ROUNDS = 8, 8, 5


def cases(setting: Setting) -> Cases:
    """One case for each batch size and context, and one for what drafting takes of a step."""
    if setting.tiny:
        shapes, plans = [(1, 64)], ("none", "linear:2", "quadratic:2")
    else:
        shapes = [(batch, context) for context in (1024, 8192) for batch in (1, 8, 32)]
        plans = PLANS
    g = geometry(setting.decoding)
    generator = random_generator(g, _MOST, setting.rank, jnp.dtype(setting.dtype), Options())
    read, rate = Bytes(generator), bandwidth()

    def table(batch: int, context: int) -> dict[str, Any]:
        runs = {name: _Steps(generator, name, {}, batch, context) for name in plans}
        times = _in_turns(runs)
        for name, run in runs.items():
            place = "steps", f"batch_{batch}_context_{context}", name.replace(":", "_")
            setting.trace(lambda run=run: run.seconds(1), *place)
        return {"bytes_per_second": rate, "batch": batch, "context": context} | {
            "plans": {
                name: _figures(seconds, read.of_step(parse_plan(name).mask_rows, batch, context), rate)
                | {"rows": parse_plan(name).rows}
                for name, seconds in times.items()
            }
        }

    def drafting() -> dict[str, Any]:
        batch, context = shapes[0]
        plan = plans[-1] if setting.tiny else "quadratic:4"
        runs = {
            "none": _Steps(generator, "none", {}, batch, context),
            "without sampler": _Steps(without_sampler(generator), plan, {}, batch, context),
            "shortlist of 256": _Steps(generator, plan, {"shortlist": 256}, batch, context),
            "whole vocabulary": _Steps(generator, plan, {"shortlist": None}, batch, context),
        }
        found = {name: statistics.median(seconds) for name, seconds in _in_turns(runs).items()}
        return {"plan": plan, "batch": batch, "context": context, "seconds": found}

    batch, context = shapes[0]
    yield f"batch {batch}, context {context}", lambda: table(batch, context)
    yield "drafting", drafting
    for batch, context in shapes[1:]:
        yield f"batch {batch}, context {context}", lambda batch=batch, context=context: table(batch, context)


class _Steps:
    """Steps of one plan that go on behind one another."""

    def __init__(self, generator: Generator, plan: str, options: dict[str, Any], batch: int, context: int):
        parsed = parse_plan(plan)
        decoding = Decoding(generator.forward, generator.options.using(plan=parsed, **options))
        room = _STEPS * (parsed.drafts + 1) * (_ROUNDS + 2)
        self.behind = Behind(generator, decoding, batch, context, room)

    def seconds(self, rounds: int) -> float:
        """Of one step; the state is made anew for each timing, so that only one cache exists at a time."""
        steps = _STEPS * rounds
        seconds, _ = self.behind.run(self.behind.fresh(), steps)
        return seconds / steps


def _in_turns(runs: dict[str, _Steps]) -> dict[str, list[float]]:
    """Seconds of a step in rounds in which the runs take turns."""
    for run in runs.values():
        run.seconds(1)
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(_ROUNDS):
        for name, run in runs.items():
            found[name].append(run.seconds(1))
    return found


def _figures(seconds: list[float], read: int, rate: float) -> dict[str, Any]:
    middle = statistics.median(seconds)
    return {"seconds": middle, "range": [min(seconds), max(seconds)], "bytes": read, "of_bound": read / rate / middle}
