"""AdamW with warm-up, clipping and decay on matrices only."""

from typing import Any

import optax

from mtp_jax.config import Train


def learning_rate(train: Train) -> optax.Schedule:
    """Linear warm-up from 0, then flat, or a cosine down to a tenth at the last step."""
    if train.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            0.0, train.learning_rate, train.warmup_steps, train.steps, end_value=train.learning_rate / 10
        )
    warmup = optax.linear_schedule(0.0, train.learning_rate, train.warmup_steps)
    return optax.join_schedules([warmup, optax.constant_schedule(train.learning_rate)], [train.warmup_steps])


def make_optimizer(train: Train, decays: Any) -> optax.GradientTransformation:
    """The optimizer; `decays` is a tree of booleans, true where weight decay applies."""
    adamw = optax.adamw(learning_rate(train), train.beta1, train.beta2, weight_decay=train.weight_decay, mask=decays)
    return adamw if train.clip_norm is None else optax.chain(optax.clip_by_global_norm(train.clip_norm), adamw)
