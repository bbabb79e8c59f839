"""From the latents of one block of masks to its drafts, chosen one after another by the sampler head."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from mtp_jax.decoding.forward import Forward, Variables
from mtp_jax.decoding.sampling import Proposal, SamplingKind, Tempering, distribution, draw
from mtp_jax.model.head import as_logits
from mtp_jax.mtp.adapter import sampler_of
from mtp_jax.mtp.sampler import corrected_latent, read_latent


def choose_drafts(
    forward: Forward,
    variables: Variables,
    latents: Float[Array, "B M D"],
    scores: Float[Array, "B M V"] | None,
    first: Int[Array, " B"],
    shortlist: int | None,
    sampling: tuple[SamplingKind, Tempering, Key[Array, " B"]] | None,
    process: Callable[[Float[Array, "B V"], Int[Array, "B j"]], Float[Array, "B V"]] | None = None,
) -> tuple[Int[Array, "B M"], Proposal | None]:
    """The drafts of a block behind the token `first`, and what they were drawn from where drafts are sampled.

    Without a sampler head drafts are those of the base head, and with a draft vocabulary they are of its U tokens
    (docs/how-it-works.md, sections 5, 7.4 and 7.5).

    Args:
        scores: the base head's logits of the block, where they are there already.
        shortlist: how many candidates of each mask row the sampler may choose from; None for all.
        process: changes logits that stand behind `first` and j drafts, as those of real rows are changed.
    """
    B, M, _ = latents.shape
    V, sampler, vocabulary = forward.model.g.V, sampler_of(variables), variables.get("vocabulary")
    form = "none" if forward.shape is None else forward.shape.sampler
    U = V if vocabulary is None else len(vocabulary)
    short = sampler is not None and shortlist is not None and shortlist < U
    if scores is None and (sampler is None or short):
        scores = forward.draft_logits(variables, latents)
    elif scores is not None and vocabulary is not None:
        scores = scores[..., vocabulary]
    vectors = read = None
    # The tokens that each mask row chooses from, [B, M, C]; None for all.
    ids = None if vocabulary is None else jnp.broadcast_to(vocabulary, (B, M, U))
    if short:
        assert scores is not None and shortlist is not None
        ids = forward.candidates(scores, shortlist)
        ids = ids if vocabulary is None else vocabulary[ids]
        vectors = forward.unembedded(variables, ids).astype(latents.dtype)
    if sampler is not None:
        read = read_latent(sampler, latents)
    drawn = sampling is not None and sampling[0].sampled_drafts
    drafts, proposed = [], []
    previous = first
    for j in range(M):
        if sampler is None:
            assert scores is not None
            logits = scores[:, j]
        else:
            assert read is not None
            embedding = forward.embedded(variables, previous)
            latent = corrected_latent(sampler, form, embedding, latents[:, j], read[:, j])
            if vectors is None:
                logits = forward.draft_logits(variables, latent)
            else:
                products = jnp.einsum("bd,bcd->bc", latent, vectors[:, j], preferred_element_type=jnp.float32)
                logits = as_logits(products, forward.model.g)
        if process is not None:
            chain = jnp.stack(drafts, axis=1) if drafts else jnp.zeros((B, 0), jnp.int32)
            at = jnp.arange(B)[:, None], slice(None) if ids is None else ids[:, j]
            every = logits if ids is None else jnp.full((B, V), -jnp.inf).at[at].set(logits)
            logits = process(every, chain)[at]
        if drawn:
            assert sampling is not None
            kind, how, keys = sampling
            q, fresh = distribution(logits, how, kind.truncated), jax.vmap(jax.random.fold_in, (0, None))(keys, j)
            chosen = draw(q, fresh, None if ids is None or not short else ids[:, j])
            proposed.append(q)
        else:
            chosen = forward.likeliest(logits)
        previous = chosen if ids is None else jnp.take_along_axis(ids[:, j], chosen[:, None], axis=1)[:, 0]
        drafts.append(previous)
    chain = jnp.stack(drafts, axis=1)
    if sampling is None:
        return chain, None
    if not drawn:  # each was certain
        return chain, Proposal(chain[..., None], jnp.ones((B, M, 1), jnp.float32))
    every = jnp.broadcast_to(jnp.arange(V), (B, M, V)) if ids is None else ids
    return chain, Proposal(every, jnp.stack(proposed, axis=1))
