"""Held-out loss and next-token accuracy, the same figures in training, in `mtp_jax.evaluate` and on model cards."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mtp_jax.data.batches import Batch
from mtp_jax.training.next_token import NextToken


def make_evaluate(
    objective: NextToken, place: Callable[[Batch], Any], everywhere: jax.sharding.Sharding | None = None
) -> Callable[[Any, Iterable[Batch]], dict[str, float]]:
    """A function (params, batches) -> means over all supervised tokens; `place` puts a batch on the devices.

    Where several processes evaluate, `everywhere` puts the figures on the devices of each.
    """

    @partial(jax.jit, out_shardings=everywhere)
    def sums(params: Any, batch: Batch) -> dict[str, jax.Array]:
        return objective.sums(params, batch) | {"tokens": jnp.sum(batch["supervised"])}

    def evaluate(params: Any, batches: Iterable[Batch]) -> dict[str, float]:
        total = {"loss": 0.0, "accuracy": 0.0, "tokens": 0.0}
        for batch in batches:
            for name, value in sums(params, place(batch)).items():
                total[name] += float(value)
        tokens = max(total["tokens"], 1.0)
        return {"loss": total["loss"] / tokens, "accuracy": total["accuracy"] / tokens, "tokens": int(total["tokens"])}

    return evaluate
