"""Where an output departs from plain decoding's: whether rounding may have decided between two tokens."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.model.base import Base
from mtp_jax.model.decoder import Decoder

TIE = 1e-4  # logits closer than this are a tie (docs/how-it-works.md, section 7.1)
_ROWS = 128  # texts are filled up to multiples of this, so that few programs are compiled


class Gaps:
    """The gap between the two best logits of the base model behind a text, in float32; it loads the base once asked."""

    def __init__(self, base: Base):
        self.base, self.model = base, Decoder(base.g, jnp.dtype("float32"))
        self.params: dict[str, Any] = {}
        self.logits = jax.jit(self._logits)

    def _logits(self, params: dict[str, Any], tokens: jax.Array, at: jax.Array) -> jax.Array:
        positions = jnp.arange(tokens.shape[1])[None]
        latents, _ = self.model.apply(params, tokens, positions)
        return self.model.apply(params, latents[:, at], method="logits")

    def __call__(self, ids: Sequence[int]) -> float:
        """The gap behind these tokens."""
        if not self.params:
            self.params = {"params": self.base.load(jnp.dtype("float32"))}
        row = np.zeros((1, -(-len(ids) // _ROWS) * _ROWS), np.int32)
        row[0, : len(ids)] = ids
        with jax.default_matmul_precision("highest"):
            best = np.sort(np.asarray(self.logits(self.params, row, len(ids) - 1))[0])
        return float(best[-1] - best[-2])


def departure(ours: Sequence[int], plain: Sequence[int]) -> int | None:
    """The number of the first token that differs; None where the texts are identical."""
    first = next((n for n, (x, y) in enumerate(zip(ours, plain, strict=False)) if x != y), None)
    return min(len(ours), len(plain)) if first is None and len(ours) != len(plain) else first
