"""Held-out figures: the same computation in training, in `mtp_jax.evaluate` and on model cards."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import Evaluation
from mtp_jax.data.batches import Batch
from mtp_jax.data.documents import Document
from mtp_jax.data.held_out import held_out_prompts
from mtp_jax.decoding.forward import XlaForward
from mtp_jax.decoding.loop import Decoding, Limits
from mtp_jax.model.base import Base
from mtp_jax.model.weights import Params
from mtp_jax.mtp.estimate import Continuations, Estimator, table, walk_twice
from mtp_jax.mtp.losses import MultiTokenLoss
from mtp_jax.sharding import replicated
from mtp_jax.training.objectives import NextToken

Place = Callable[[Batch], Any]  # puts a batch on the devices


class NextTokenEvaluation:
    """Loss and next-token accuracy of a model, means over all supervised tokens."""

    def __init__(self, objective: NextToken, place: Place, everywhere: jax.sharding.Sharding | None = None):
        """Where several processes evaluate, `everywhere` puts the figures on the devices of each."""

        @partial(jax.jit, out_shardings=everywhere)
        def sums(params: Any, batch: Batch) -> dict[str, jax.Array]:
            return objective.sums(params, batch) | {"tokens": jnp.sum(batch["supervised"])}

        self.sums, self.place = sums, place

    def __call__(self, params: Params, batches: Iterable[Batch]) -> dict[str, Any]:
        """`loss` in nats per token, `accuracy`, and how many `tokens` they are means over."""
        total = {"loss": 0.0, "accuracy": 0.0, "tokens": 0.0}
        for batch in batches:
            for name, value in self.sums(params, self.place(batch)).items():
                total[name] += float(value)
        tokens = max(total["tokens"], 1.0)
        return {"loss": total["loss"] / tokens, "accuracy": total["accuracy"] / tokens, "tokens": int(total["tokens"])}


class AdapterEvaluation:
    """Loss terms, agreement by offset and estimated tokens per step of an adapter (docs/how-it-works.md, section 8).

    Tokens per step are estimated on prompts from held-out documents, which the base model continues greedily, once.
    """

    def __init__(
        self,
        base: Base,
        frozen: Params,
        objective: MultiTokenLoss,
        mesh: jax.sharding.Mesh,
        place: Place,
        wanted: Evaluation,
        documents: Sequence[Document],
        step: int,
    ):
        """
        Args:
            frozen: the base's weights, as collection `params`.
            wanted: how many prompts to estimate tokens per step on, and how long they and their continuations are.
            documents: what prompts are taken from; where there are none, tokens per step are not estimated.
            step: the training step whose losses are computed; at the last one they cover all masks.
        """
        self.frozen, self.objective, self.place = frozen, objective, place
        everywhere = replicated(mesh)  # every process reads all figures

        @partial(jax.jit, out_shardings=everywhere)
        def sums(trained: Params, frozen: Params, batch: Any) -> tuple[Any, Any]:
            at = jnp.int32(step)
            return objective.sums(trained, frozen, batch, at), objective.totals(batch)

        self.sums = sums
        self.accepted = jax.jit(Estimator(objective.model, objective.shape).accepted, out_shardings=everywhere)
        limit = min(wanted.prompt_tokens + wanted.new_tokens, base.g.max_positions)
        length = max(1, min(wanted.prompt_tokens, limit - 2))
        prompts = held_out_prompts(documents, base.tokenizer, wanted.prompts, length) if documents else []
        self.continuations: Continuations | None = None
        if prompts:
            model = objective.model

            @partial(jax.jit, out_shardings=everywhere)
            def continued(variables: Any, prompts: Any) -> Continuations:
                lengths = jnp.full(len(prompts), length, jnp.int32)
                limits = Limits(lengths + limit - length, jnp.asarray(base.stops, jnp.int32))
                decoding = Decoding(XlaForward(model))
                state = decoding.decode(variables, prompts, lengths, limits, limit + 1, model.dtype)
                return Continuations(state.tokens, lengths, state.length)

            self.continuations = continued(frozen, np.asarray(prompts, np.int32))

    def __call__(self, trained: Params, batches: Iterable[Batch]) -> dict[str, Any]:
        """Figures by name, as numbers and lists of numbers."""
        total = None
        for batch in batches:
            part = jax.device_get(self.sums(trained, self.frozen, self.place(batch)))
            part = jax.tree.map(lambda x: np.asarray(x, np.float64), part)
            total = part if total is None else jax.tree.map(np.add, total, part)
        assert total is not None
        figures = {name: plain(value) for name, value in self.objective.values(*total)[1].items()}
        if self.continuations is not None:
            accepted = jax.device_get(self.accepted(trained, self.frozen, self.continuations))
            masks = self.objective.shape.masks
            figures["tokens_per_step"] = table(accepted, self.continuations, masks)
            if self.objective.shape.noise is not None:
                figures["tokens_per_pass_of_two"] = table(accepted, self.continuations, masks, walk_twice)
        return figures


def plain(value: Any) -> Any:
    """A number, or a list of numbers, for a line of JSON."""
    return np.asarray(value).tolist()
