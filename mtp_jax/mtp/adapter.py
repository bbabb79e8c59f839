"""What is trained beside the frozen base: gated LoRA, mask embeddings and sampler head, in two collections.

An adapter whose mask rows hold noise is the LoRA alone: it has no collection `mtp`. One with a draft vocabulary has a
third collection, `vocabulary`, which is not trained: [U] int32, ascending token ids.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jaxtyping import PRNGKeyArray

from mtp_jax.model.geometry import Geometry
from mtp_jax.model.weights import Params, Weight
from mtp_jax.mtp.blocks import Noise
from mtp_jax.mtp.lora import init_lora, lora_table, scaled
from mtp_jax.mtp.sampler import init_sampler, sampler_table

SAMPLERS = ("paper", "residual", "none")  # forms of the sampler head


@dataclass(frozen=True)
class AdapterShape:
    """What an adapter consists of. Hashable, so that it can be a static argument."""

    masks: int  # M
    rank: int  # R
    alpha: float
    targets: tuple[str, ...]
    sampler: str  # one of SAMPLERS
    gated: bool = True
    vocabulary: int | None = None  # U, tokens that are drafted; None for all
    noise: Noise | None = None  # what mask rows hold; None for learned embeddings

    @property
    def scale(self) -> float:
        """alpha / R."""
        return self.alpha / self.rank


def adapter_table(g: Geometry, shape: AdapterShape) -> tuple[Weight, ...]:
    """Every trainable array once; `path` starts with its collection, `lora` or `mtp`, and `key` is its stored name."""

    def within(collection: str, weight: Weight) -> Weight:
        return Weight((collection, *weight.path), weight.shape, weight.axes, weight.key)

    masks = () if shape.noise else (Weight(("masks",), (shape.masks, g.D), (None, None), "mtp.masks"),)
    sampler = () if shape.sampler == "none" else sampler_table(g.D)
    lora = lora_table(g, shape.targets, shape.rank)
    return tuple([within("lora", w) for w in lora] + [within("mtp", w) for w in (*masks, *sampler)])


def init_adapter(g: Geometry, shape: AdapterShape, embedding: jax.Array, key: PRNGKeyArray) -> Params:
    """Fresh arrays of `adapter_table`, float32.

    Mask embeddings are normal with the mean and deviation of the base's input embeddings; they are never one of these.

    Args:
        embedding: the base's embedding table, as stored.
    """
    lora_key, mask_key, sampler_key = jax.random.split(key, 3)
    lora = {"lora": init_lora(g, shape.targets, shape.rank, lora_key)}
    if shape.noise:
        return lora
    table = embedding.astype(jnp.float32) * g.embed_scale
    masks = table.mean() + table.std() * jax.random.normal(mask_key, (shape.masks, g.D))
    mtp: dict[str, Any] = {"masks": masks}
    if shape.sampler != "none":
        mtp["sampler"] = init_sampler(g.D, shape.sampler, jnp.sqrt(jnp.mean(table * table)), sampler_key)
    return lora | {"mtp": mtp}


def abstract_adapter(g: Geometry, shape: AdapterShape) -> Params:
    """Shapes of all arrays of an adapter."""
    trained = unflatten_dict({w.path: jax.ShapeDtypeStruct(w.shape, jnp.float32) for w in adapter_table(g, shape)})
    if shape.vocabulary is None:
        return trained
    return trained | {"vocabulary": jax.ShapeDtypeStruct((shape.vocabulary,), jnp.int32)}


def sampler_of(adapter: Params) -> Params | None:
    """The weights of the sampler head, where there is one."""
    return adapter.get("mtp", {}).get("sampler")


def with_adapter(params: Params, adapter: Params, shape: AdapterShape) -> Params:
    """The variables that the decoder is applied to: the base, and the LoRA at its scale."""
    return {"params": params, "lora": scaled(adapter["lora"], shape.scale)}
