"""The base head: logits of latents."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from mtp_jax.model.attention import capped
from mtp_jax.model.geometry import Geometry
from mtp_jax.sharding import place


class Head(NamedTuple):
    """What latents are multiplied with for the logits of V tokens, of all or of some."""

    table: Num[Array, "V D"]
    scale: Float[Array, " V"] | None = None  # of the rows of a table of whole numbers

    def __call__(self, latents: Float[Array, "... D"], g: Geometry) -> Float[Array, "... V"]:
        """Logits, float32."""
        table = self.table.astype(latents.dtype)
        products = jnp.einsum("...d,vd->...v", latents, table, preferred_element_type=jnp.float32)
        return as_logits(products if self.scale is None else products * self.scale, g)

    def of(self, tokens: Int[Array, " U"]) -> "Head":
        """The head of some tokens alone."""
        return Head(self.table[tokens], None if self.scale is None else self.scale[tokens])

    def rows(self, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
        """What a latent is multiplied with for each of these tokens."""
        rows = self.table[tokens]
        return rows if self.scale is None else rows * self.scale[tokens][..., None]

    def placed(self) -> "Head":
        """Gathered but for its tokens, which stay spread over the tensor axis."""
        scale = None if self.scale is None else place(self.scale, "vocab")
        return Head(place(self.table, "vocab", None), scale)


def as_logits(products: Float[Array, "..."], g: Geometry) -> Float[Array, "..."]:
    """Products of latents and rows of the base head's table as logits."""
    return capped(products if g.logit_divisor == 1 else products / g.logit_divisor, g.logit_cap)
