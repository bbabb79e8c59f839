"""From the latents of one block of masks to its drafts, chosen one after another by the sampler head."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from mtp_jax.decoding.choice import likeliest
from mtp_jax.decoding.sampling import Proposal, SamplingKind, Tempering, distribution, draw
from mtp_jax.model.products import draft, largest, look_up
from mtp_jax.mtp.sampler import panel_sampler, read_latent, sample_latent


def choose_drafts(
    embedding: Float[Array, "V D"],
    head: Callable[[Array], Array],
    table: Float[Array, "V D"],
    sampler: Any | None,
    form: str,
    latents: Float[Array, "B M D"],
    scores: Float[Array, "B M V"] | None,
    first: Int[Array, " B"],
    shortlist: int | None,
    sampling: tuple[SamplingKind, Tempering, Key[Array, " B"]] | None,
    in_cpp: bool = False,
) -> tuple[Int[Array, "B M"], Proposal | None]:
    """The drafts of a block behind the token `first`, and what they were drawn from where drafts are sampled.

    Args:
        embedding: table of input embeddings.
        head: logits of latents.
        table: the base head's.
        sampler: weights of the sampler head; without one, drafts are those of the base head.
        scores: the base head's logits of the block; not needed by a sampler without shortlist.
        shortlist: how many candidates of each mask row (`candidates`) the sampler may choose from; None for all.
        in_cpp: call C++ for what it has.
    """
    B, M, _ = latents.shape
    V = table.shape[0]
    ids, rows = None, None
    drawn = sampling is not None and sampling[0].sampled_drafts
    if in_cpp and sampler is not None and scores is not None and shortlist is not None and shortlist < V and not drawn:
        parts = panel_sampler(sampler)
        chain = draft(latents, scores, first, embedding, table, parts, shortlist, form == "residual")
        return chain, None if sampling is None else _certain(chain)
    if sampler is not None and shortlist is not None and shortlist < V:
        ids = candidates(scores, shortlist, in_cpp)
        rows = None if in_cpp else table[ids].astype(latents.dtype)
    drafts, proposed = [], []
    previous = first
    read = None if sampler is None else read_latent(sampler, latents)
    for j in range(M):
        if sampler is None:
            assert scores is not None
            logits = scores[:, j]
        else:
            latent = sample_latent(sampler, form, embedding[previous], latents[:, j], read[:, j])
            if ids is None:
                logits = head(latent)
            elif rows is None:
                logits = look_up(latent, table, ids[:, j])
            else:
                logits = jnp.einsum("bd,bcd->bc", latent, rows[:, j], preferred_element_type=jnp.float32)
        if drawn:
            assert sampling is not None
            kind, how, keys = sampling
            q = distribution(logits, how, kind.truncated)
            chosen = draw(q, jax.vmap(jax.random.fold_in, (0, None))(keys, j), None if ids is None else ids[:, j])
            proposed.append(q)
        else:
            chosen = likeliest(logits, in_cpp)
        previous = chosen if ids is None else jnp.take_along_axis(ids[:, j], chosen[:, None], axis=1)[:, 0]
        drafts.append(previous)
    chain = jnp.stack(drafts, axis=1)
    if sampling is None:
        return chain, None
    if not drawn:
        return chain, _certain(chain)
    every = jnp.broadcast_to(jnp.arange(V), (B, M, V)) if ids is None else ids
    return chain, Proposal(every, jnp.stack(proposed, axis=1))


def _certain(chain: Int[Array, "B M"]) -> Proposal:
    return Proposal(chain[..., None], jnp.ones((*chain.shape, 1), jnp.float32))


def candidates(scores: Float[Array, "... V"], count: int, in_cpp: bool = False) -> Int[Array, "... C"]:
    """The `count` likeliest tokens, in no certain order.

    On TPU, where sorting would cost more than the sampler saves, each is found with a probability of 0.99.
    """
    if in_cpp:
        return largest(scores, count)

    def nearly(scores: Array) -> Array:
        return jax.lax.approx_max_k(scores, count, recall_target=0.99)[1]

    def exactly(scores: Array) -> Array:
        return jax.lax.top_k(scores, count)[1]

    return jax.lax.platform_dependent(scores, tpu=nearly, default=exactly)
