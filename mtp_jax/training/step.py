"""One training step: gradients of whatever the objective trains, accumulated over parts of the batch, and AdamW."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from mtp_jax.config import Train

Metrics = dict[str, Float[Array, "..."] | Int[Array, ""]]
WEIGHTS_FINITE = "weights_finite"  # 1 where all weights are finite after the step; checked, not logged


class TrainState(NamedTuple):
    """What a run changes, and what its checkpoints hold. The frozen base is not in it."""

    step: Int[Array, ""]
    trained: Any
    optimizer: Any


@runtime_checkable
class Objective(Protocol):
    """What a step minimises. Losses are means over a whole batch, so its parts need the batch's totals."""

    def totals(self, batch: Any) -> Any:
        """What the sums over the whole batch are divided by."""

    def loss(
        self, trained: Any, frozen: Any, part: Any, totals: Any, step: Int[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        """This part's share of the loss and of every metric: shares add up to the batch's values."""


def make_train_step(
    objective: Objective,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    accumulation: int,
    shardings: Any = None,
) -> Callable[[TrainState, Any, Any], tuple[TrainState, Metrics]]:
    """A step as a pure function (state, frozen, batch) -> (state, metrics).

    Args:
        accumulation: parts that the batch is computed in.
        shardings: of what is trained.
    """

    def train_step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, Metrics]:
        totals = objective.totals(batch)
        gradient = jax.grad(objective.loss, has_aux=True)

        def share(part: Any) -> tuple[Any, Metrics]:
            gradients, metrics = gradient(state.trained, frozen, part, totals, state.step)
            if shardings is not None:  # or each device would hold the sums of all of them
                gradients = jax.lax.with_sharding_constraint(gradients, shardings)
            return gradients, metrics

        if accumulation == 1:
            gradients, metrics = share(batch)
        else:
            # Parts take every accumulation-th sequence, so that each device keeps its own sequences.
            parts = jax.tree.map(lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch)
            zero = jax.tree.map(
                lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(share, jax.tree.map(lambda x: x[0], parts))
            )
            (gradients, metrics), _ = jax.lax.scan(
                lambda sums, part: (jax.tree.map(jnp.add, sums, share(part)), None), zero, parts
            )
        updates, optimizer = tx.update(gradients, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(trained)]))
        metrics |= {WEIGHTS_FINITE: finite.astype(jnp.float32)}
        metrics |= {"gradient_norm": optax.tree.norm(gradients), "learning_rate": schedule(state.step)}
        return TrainState(state.step + 1, trained, optimizer), metrics

    return train_step


def make_optimizer(train: Train, decays: Any) -> optax.GradientTransformation:
    """AdamW with clipping; `decays` is a tree of booleans, true where weight decay applies."""
    adamw = optax.adamw(learning_rate(train), train.beta1, train.beta2, weight_decay=train.weight_decay, mask=decays)
    return adamw if train.clip_norm is None else optax.chain(optax.clip_by_global_norm(train.clip_norm), adamw)


def learning_rate(train: Train) -> optax.Schedule:
    """Linear warm-up from 0, then flat, or a cosine down to a tenth at the last step."""
    if train.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            0.0, train.learning_rate, train.warmup_steps, train.steps, end_value=train.learning_rate / 10
        )
    warmup = optax.linear_schedule(0.0, train.learning_rate, train.warmup_steps)
    return optax.join_schedules([warmup, optax.constant_schedule(train.learning_rate)], [train.warmup_steps])
