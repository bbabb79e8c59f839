"""The objective `next_token`: train or fine-tune all base weights on the text itself."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from mtp_jax.data.batches import Batch
from mtp_jax.model.chunks import sum_over_chunks
from mtp_jax.model.decoder import Decoder, head
from mtp_jax.mtp.vocabulary import cross_entropy_sums, rows_at_a_time
from mtp_jax.sharding import place
from mtp_jax.training.step import Metrics


@dataclass(frozen=True)
class NextToken:
    """Mean cross-entropy of the next token over supervised rows; nothing is frozen."""

    model: Decoder
    loss_chunk: int

    def totals(self, batch: Batch) -> Float[Array, ""]:
        """Number of supervised rows."""
        return jnp.maximum(jnp.sum(batch["supervised"]), 1).astype(jnp.float32)

    def loss(
        self, trained: Any, frozen: Any, part: Batch, totals: Float[Array, ""], step: Any = None
    ) -> tuple[Array, Metrics]:
        """Share of the loss in nats per token, and of `loss` and `accuracy`."""
        del frozen, step
        shares = {name: value / totals for name, value in self.sums(trained, part).items()}
        return shares["loss"], shares

    def sums(self, params: Any, batch: Batch) -> Metrics:
        """Cross-entropy and right guesses summed over the supervised rows."""
        variables = {"params": params}
        table = place(self.model.apply(variables, method="unembedding"), "vocab", None)
        latents, _ = self.model.apply(variables, batch["tokens"], batch["positions"], batch["segments"])

        def chunk(rows: tuple[Array, Array, Array]) -> Metrics:
            latents, labels, supervised = rows
            return cross_entropy_sums(head(latents, table), labels, supervised)

        rows = (latents, batch["labels"], batch["supervised"])
        return sum_over_chunks(chunk, rows, rows_at_a_time(self.loss_chunk, len(latents)))
