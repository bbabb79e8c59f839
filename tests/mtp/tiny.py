"""Tiny models, adapters and batches for the tests of the method."""

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.model.geometry import Geometry
from mtp_jax.mtp.adapter import AdapterShape
from mtp_jax.mtp.blocks import blocks_of, choose_anchors, hash_positions

T, M, V = 12, 3, 29
SHAPE = AdapterShape(masks=M, rank=3, alpha=6.0, targets=("q", "k", "v", "o", "gate", "up", "down"), sampler="residual")


def geometry(**changes):
    config = {
        "model_type": "qwen3",
        "vocab_size": V,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 64,
        "initializer_range": 0.4,
    }
    return Geometry.from_config(config | changes)


def noisy(tree, key, scale):
    """Normal noise on every leaf. NumPy draws it: in JAX each shape would be a program to compile."""
    draw = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    return jax.tree.map(lambda x: x + scale * jnp.asarray(draw.standard_normal(x.shape), x.dtype), tree)


def make_batch(anchors=None, documents=((12,), (12,)), prompt=0, noise=None):
    """Packed sequences; `prompt` tokens at each document's start are unsupervised; anchors None for all."""
    random = np.random.default_rng(0)
    B = len(documents)
    text = random.integers(0, V, (B, T + 1)).astype(np.int32)
    segments, positions = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    supervised = np.zeros((B, T), bool)
    for b, lengths in enumerate(documents):
        start = 0
        for number, length in enumerate(lengths, 1):
            span = slice(start, start + length)
            segments[b, span], positions[b, span] = number, np.arange(length)
            last = start + length < T or sum(lengths) < T
            supervised[b, start + max(prompt - 1, 0) : start + length - last] = True
            start += length
    chosen = [
        choose_anchors(hash_positions(1, 0, b, np.arange(T)), supervised[b], segments[b], anchors) for b in range(B)
    ]
    fields = {"positions": positions, "segments": segments, "supervised": supervised, "anchors": np.stack(chosen)}
    if noise is not None:
        fields["noise"] = random.integers(noise.low, noise.high, (*fields["anchors"].shape, M)).astype(np.int32)
    return jax.tree.map(jnp.asarray, {"tokens": text[:, :-1], "labels": text[:, 1:], **fields})


def latents_of(loss, adapter, frozen, batch):
    """Latents of real rows and of mask rows."""
    context, _ = loss.real(adapter, frozen, batch)
    blocks = blocks_of(batch["anchors"], batch["positions"], batch["segments"])
    return context.latents, loss.latents(adapter, frozen, context, blocks, batch.get("noise"))
