"""From the latents of one block of masks to its drafts, chosen one after another by the sampler head."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from mtp_jax.decoding.choice import likeliest
from mtp_jax.decoding.sampling import Proposal, SamplingKind, Tempering, distribution, draw
from mtp_jax.model.decoder import Decoder
from mtp_jax.mtp.sampler import sample_latent


def choose_drafts(
    model: Decoder,
    params: Any,
    sampler: Any | None,
    form: str,
    latents: Float[Array, "B M D"],
    scores: Float[Array, "B M V"] | None,
    first: Int[Array, " B"],
    shortlist: int | None,
    sampling: tuple[SamplingKind, Tempering, Key[Array, " B"]] | None,
) -> tuple[Int[Array, "B M"], Proposal | None]:
    """The drafts of a block behind the token `first`, and what they were drawn from where drafts are sampled.

    Args:
        sampler: weights of the sampler head; without one, drafts are those of the base head.
        scores: the base head's logits of the block; not needed by a sampler without shortlist.
        shortlist: how many candidates of each mask row, by the base head, the sampler may choose from; None for all.
    """
    B, M, _ = latents.shape
    table = model.apply(params, method="unembedding")
    V = table.shape[0]
    ids, rows = None, None
    if sampler is not None and shortlist is not None and shortlist < V:
        _, ids = jax.lax.top_k(scores, shortlist)
        rows = table[ids].astype(latents.dtype)
    drafts, proposed = [], []
    previous = first
    for j in range(M):
        if sampler is None:
            assert scores is not None
            logits = scores[:, j]
        else:
            embedding = model.apply(params, previous, method="embeddings")
            latent = sample_latent(sampler, form, embedding, latents[:, j])
            if rows is None:
                logits = model.apply(params, latent, method="logits")
            else:
                logits = jnp.einsum("bd,bcd->bc", latent, rows[:, j], preferred_element_type=jnp.float32)
        if sampling is not None and sampling[0].sampled_drafts:
            kind, how, keys = sampling
            q = distribution(logits, how, kind.truncated)
            chosen = draw(q, jax.vmap(jax.random.fold_in, (0, None))(keys, j))
            proposed.append(q)
        else:
            chosen = likeliest(logits)
        previous = chosen if ids is None else jnp.take_along_axis(ids[:, j], chosen[:, None], axis=1)[:, 0]
        drafts.append(previous)
    chain = jnp.stack(drafts, axis=1)
    if sampling is None:
        return chain, None
    if not sampling[0].sampled_drafts:
        return chain, Proposal(chain[..., None], jnp.ones((B, M, 1), jnp.float32))
    every = jnp.broadcast_to(jnp.arange(V), (B, M, V)) if ids is None else ids
    return chain, Proposal(every, jnp.stack(proposed, axis=1))
