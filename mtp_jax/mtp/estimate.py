"""Tokens per step without decoding: walk the base model's own continuations as the decoder would."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from mtp_jax.model.attention import Blocks, RealRows
from mtp_jax.model.decoder import Decoder
from mtp_jax.model.weights import Params
from mtp_jax.mtp.adapter import AdapterShape, sampler_of, with_adapter
from mtp_jax.mtp.sampler import corrected_latent


class Continuations(NamedTuple):
    """Prompts with the base model's greedy continuations, right-padded."""

    tokens: Int[Array, "B S"]
    prompt_length: Int[Array, " B"]
    length: Int[Array, " B"]  # prompt and continuation


@dataclass(frozen=True)
class Estimator:
    """Accepted prefix of the sampler chain, fed its own drafts, at every position of fixed continuations.

    What is frozen is that of `MultiTokenLoss`.
    """

    model: Decoder
    shape: AdapterShape
    draft_chunk: int = 512  # blocks, over the batch, whose draft logits exist at a time

    def accepted(self, trained: Params, frozen: Params, of: Continuations) -> Int[Array, "B S"]:
        """For a block behind each row: how many of its M drafts, from the first on, are what the base goes on with.

        Rows before the last prompt token and after the second last token of a continuation are 0.
        """
        B, S = of.tokens.shape
        M = self.shape.masks
        positions = jnp.broadcast_to(jnp.arange(S), (B, S))
        segments = (positions < of.length[:, None]).astype(jnp.int32)
        variables = with_adapter(frozen["params"], trained, self.shape)
        adapted = not self.shape.gated
        _, kept = self.model.apply(variables, of.tokens, positions, segments, adapted=adapted, keep=True)
        blocks = Blocks(positions, positions, segments)
        ids, noise = None if self.shape.vocabulary is None else frozen["vocabulary"], self.shape.noise
        if noise is None:
            masks = trained["mtp"]["masks"]
        else:
            drawn = jax.random.randint(jax.random.key(0), (B, S, M), noise.low, noise.high)
            masks = self.model.apply(variables, drawn, method="embeddings")
        head = self.model.apply(variables, method="head")
        if ids is not None:
            head = head.of(ids)
        z = self.model.apply(variables, masks, blocks, RealRows(positions, segments), kept, method="masks")
        # The token after row i is known; draft j is to be token i+1+j.
        ahead = jnp.minimum(positions[..., None] + 1 + jnp.arange(M + 1), S - 1)
        following = jnp.take_along_axis(of.tokens, ahead.reshape(B, -1), axis=1).reshape(B, S, M + 1)
        exists = positions[..., None] + 1 + jnp.arange(M + 1) < of.length[:, None, None]

        def chain(rows: tuple[Array, Array, Array]) -> Array:
            z, following, exists = rows  # [M, D], [M+1], [M+1]
            sampler = sampler_of(trained)
            previous, drafts = following[0], []
            for j in range(M):
                latent = z[j]
                if sampler is not None:
                    embedding = self.model.apply(variables, previous, method="embeddings")
                    latent = corrected_latent(sampler, self.shape.sampler, embedding, latent)
                previous = jnp.argmax(head(latent, self.model.g))
                if ids is not None:
                    previous = ids[previous]
                drafts.append(previous)
            right = (jnp.stack(drafts) == following[1:]) & exists[1:]
            return jnp.sum(jnp.cumprod(right))

        flat = jax.tree.map(lambda x: x.reshape(B * S, *x.shape[2:]), (z, following, exists))
        accepted = jax.lax.map(chain, flat, batch_size=min(self.draft_chunk, B * S)).reshape(B, S)
        valid = (positions >= of.prompt_length[:, None] - 1) & (positions < of.length[:, None] - 1)
        return jnp.where(valid, accepted, 0)


def walk(accepted: np.ndarray, prompt_length: int, length: int, masks: int) -> tuple[int, int]:
    """Walk one continuation as quadratic decoding with `masks` masks does.

    Returns:
        new tokens after the one that prefill gives, and decoding steps.
    """
    row, steps = prompt_length - 1, 0
    while row < length - 2:  # the token after `row` is emitted; anything beyond it takes another step
        row += 1 + min(int(accepted[row]), masks)
        steps += 1
    return max(length - prompt_length - 1, 0), steps


def walk_twice(accepted: np.ndarray, prompt_length: int, length: int, masks: int) -> tuple[int, int]:
    """Walk one continuation as an engine does that drafts in one pass and verifies in the next.

    The drafting pass gives the base model's own next token too, so a cycle of two passes emits at least two tokens; its
    masks stand behind the newest one. The first token is that of prefill, which drafts nothing.

    Returns:
        new tokens after the one that prefill gives, and passes.
    """
    row, passes = prompt_length, 0
    while row < length - 1:
        row += 2 + min(int(accepted[row]), masks)
        passes += 2
    return max(length - prompt_length - 1, 0), passes


def mean_tokens(counts: Iterable[tuple[int, int]]) -> float:
    """Tokens per step over several texts (docs/how-it-works.md, section 7.1).

    Args:
        counts: of each text, new tokens behind the one that prefill gives, and decoding steps.
    """
    pairs = list(counts)
    return sum(tokens for tokens, _ in pairs) / max(sum(steps for _, steps in pairs), 1)


def tokens_per_step(accepted: np.ndarray, of: Continuations, masks: int, along: Any = walk) -> float:
    """Mean tokens per pass over all continuations: of our decoder, in [1, masks + 1], or along `walk_twice`."""
    rows = zip(accepted, of.prompt_length, of.length, strict=True)
    return mean_tokens(along(row, int(start), int(end), masks) for row, start, end in rows)


def usable(masks: int) -> list[int]:
    """The numbers of masks that estimates are shown for: 1, 2, 4, ... up to all."""
    return sorted({min(2**i, masks) for i in range(masks.bit_length() + 1)})


def table(accepted: Any, of: Continuations, masks: int, along: Any = walk) -> dict[str, float]:
    """Estimated tokens per pass for 1, 2, 4, ... masks."""
    of = jax.tree.map(np.asarray, of)
    return {str(m): tokens_per_step(np.asarray(accepted), of, m, along) for m in usable(masks)}
