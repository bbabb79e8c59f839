"""Decoding as one jitted `lax.while_loop` over a documented state of static shape.

A step verifies the drafts it was given and finds the next ones, in one pass of the model over real rows and mask rows;
the block plan says how many of each (docs/how-it-works.md, section 7). Plain decoding is the plan without drafts.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from mtp_jax.decoding.drafting import choose_drafts
from mtp_jax.decoding.forward import Forward, Variables
from mtp_jax.decoding.lookup import look_up
from mtp_jax.decoding.options import Options
from mtp_jax.decoding.plan import BlockPlan
from mtp_jax.decoding.processors import Processors
from mtp_jax.decoding.sampling import Proposal, SamplingKind, Tempering, distribution, draw, prefix, verify
from mtp_jax.model.attention import empty_cache
from mtp_jax.model.decoder import Cache
from mtp_jax.model.step_rows import MaskRows

# Prompts are prefilled this many rows at a time, which bounds the memory of attention scores.
PREFILL_CHUNK = 512


class DecodeState(NamedTuple):
    """What the loop carries. A sequence's newest token is in `tokens` but not yet in the cache."""

    tokens: Int[Array, "B S"]  # prompt, then emitted tokens; what is beyond `length` has no meaning
    emitted_by: Int[Array, "B S"]  # the step that emitted each token; 0 for prefill
    length: Int[Array, " B"]  # verified tokens of each sequence, prompt included
    done: Bool[Array, " B"]  # a stop id was emitted or the limit reached; the sequence changes no more
    steps: Int[Array, " B"]  # decoding steps each sequence took part in; prefill is none
    accepted: Int[Array, "B d+1"]  # how many of its steps emitted 0, 1, ... drafts
    drafts: Int[Array, "B d"]  # what the next step verifies
    valid: Int[Array, " B"]  # how many of these there are, from the first on
    proposal: Proposal | None  # what they were drawn from, when sampling
    keys: Key[Array, " B"]  # one for each sequence, whatever batch it is in
    cache: Cache  # slot s holds position s; slots from length - 1 on are overwritten before they are seen
    drafter: Any = None  # a drafter's own state, such as a draft model's cache


class Limits(NamedTuple):
    """When sequences end."""

    length: Int[Array, " B"]  # tokens, prompt included
    stop_ids: Int[Array, " stops"]
    prompt: Int[Array, " B"] | None = None  # length of the prompts, which processors ask for


@dataclass(frozen=True)
class Decoding:
    """Everything static about a decoding loop. Hashable."""

    forward: Forward
    options: Options = field(default_factory=Options)
    sampling: SamplingKind | None = None  # None for greedy decoding
    processors: Processors | None = None  # changes to the logits before a token is chosen

    @property
    def plan(self) -> BlockPlan:
        """The block plan."""
        return self.options.plan

    def decode(
        self,
        variables: Variables,
        prompts: Int[Array, "B P"],
        prompt_length: Int[Array, " B"],
        limits: Limits,
        slots: int,
        cache_dtype: DTypeLike,
        how: Tempering | None = None,
        keys: Key[Array, " B"] | None = None,
    ) -> DecodeState:
        """Prefill and steps until every sequence is done.

        Args:
            slots: cache length S; at least P, and at least the largest limit + d + 1: a step writes d + 1 tokens, for
                finished sequences too.
        """
        state = self.prefill(variables, prompts, prompt_length, limits, slots, cache_dtype, how, keys)
        return self.advance(variables, state, limits, None, how)

    def advance(
        self,
        variables: Variables,
        state: DecodeState,
        limits: Limits,
        steps: Int[Array, ""] | None,
        how: Tempering | None = None,
    ) -> DecodeState:
        """Steps until every sequence is done, or no more than `steps` of them."""

        def unfinished(carry: tuple[Any, DecodeState]) -> Bool[Array, ""]:
            taken, state = carry
            going = ~jnp.all(state.done)
            return going if steps is None else going & (taken < steps)

        def step(carry: tuple[Any, DecodeState]) -> tuple[Any, DecodeState]:
            taken, state = carry
            return taken + 1, self.step(variables, state, limits, how)

        return jax.lax.while_loop(unfinished, step, (jnp.int32(0), state))[1]

    def prefill(
        self,
        variables: Variables,
        prompts: Int[Array, "B P"],
        prompt_length: Int[Array, " B"],
        limits: Limits,
        slots: int,
        cache_dtype: DTypeLike,
        how: Tempering | None = None,
        keys: Key[Array, " B"] | None = None,
    ) -> DecodeState:
        """Fill the cache with right-padded prompts, emit the first token of each, and draft behind it.

        A sequence whose limit does not exceed its prompt is done from the start (padding of a batch).
        """
        B, P = prompts.shape
        model, M, d = self.forward.model, self.plan.block, self.plan.drafts
        cache: Any = empty_cache(model.g, B, slots, cache_dtype, stacked=model.scanned)
        keys = jax.vmap(jax.random.key)(jnp.zeros(B, jnp.uint32)) if keys is None else keys
        last = jnp.zeros((B, model.g.D), model.dtype)
        block = jnp.zeros((B, 0, model.g.D), model.dtype)
        for start in range(0, P, PREFILL_CHUNK):
            rows = prompts[:, start : start + PREFILL_CHUNK]
            masks = None
            if M and start + PREFILL_CHUNK >= P:  # by now all keys of every prompt are there
                anchors = jnp.broadcast_to(prompt_length[:, None] - 1, (B, M))
                offsets = np.arange(1, M + 1)
                embeddings = self.mask_embeddings(variables, keys, prompt_length, offsets)
                masks = MaskRows(embeddings, anchors, offsets, np.zeros(M, int))
            latents, block, cache = self.forward.rows(
                variables, rows, jnp.full(B, start), cache, masks, start == 0, prompt_length
            )
            at = prompt_length - 1 - start
            here = jnp.take_along_axis(latents, jnp.clip(at, 0, rows.shape[1] - 1)[:, None, None], axis=1)[:, 0]
            last = jnp.where(((at >= 0) & (at < rows.shape[1]))[:, None], here, last)
        zeros = jnp.zeros(B, jnp.int32)
        empty = jnp.zeros((B, d), jnp.int32)
        state = DecodeState(
            tokens=jnp.zeros((B, slots), jnp.int32).at[:, :P].set(prompts),
            emitted_by=jnp.zeros((B, slots), jnp.int32),
            length=prompt_length,
            done=limits.length <= prompt_length,
            steps=zeros,
            accepted=jnp.zeros((B, d + 1), jnp.int32),
            drafts=empty,
            valid=zeros,
            proposal=None,
            keys=keys,
            cache=cache,
        )
        scores = self._processed(self.forward.logits(variables, last)[:, None], state, empty[:, :0], limits)[:, 0]
        if self.sampling is None:
            token = self.forward.likeliest(scores)
        else:
            assert how is not None
            p = distribution(scores, how, self.sampling.truncated)
            token = draw(p, keys_for(0, state.keys, state.length))
        keys = keys_for(1, state.keys, state.length)
        state = _emit(state, empty, zeros, token, limits)
        if self.options.drafter is not None:
            own = self.options.drafter.prefill(variables, prompts, prompt_length, slots, PREFILL_CHUNK)
            state = self._unmasked(variables, state._replace(drafter=own), scores[:, None], zeros, limits)
        else:
            state = self._drafted(variables, state, block, None, jnp.full(B, M), token, keys, limits, how)
        return state

    def step(self, variables: Variables, state: DecodeState, limits: Limits, how: Tempering | None) -> DecodeState:
        """Verify the drafts, emit what is accepted and the base model's token behind it, and draft again."""
        plan, d = self.plan, self.plan.drafts
        B = len(state.length)
        newest = jnp.take_along_axis(state.tokens, state.length[:, None] - 1, axis=1)
        start = state.length - 1
        masks = None
        if plan.mask_rows:
            behind, offsets = plan.blocks()
            row = jnp.where(behind >= 0, behind, state.valid[:, None])
            embeddings = self.mask_embeddings(variables, state.keys, state.length, offsets)
            masks = MaskRows(embeddings, start[:, None] + row, offsets, behind)
        rows = jnp.concatenate([newest, state.drafts], axis=1)
        real, latents, cache = self.forward.rows(variables, rows, start, state.cache, masks)

        all_scores: Any = None
        if self.options.one_head and plan.mask_rows:
            all_scores = self.forward.logits(variables, jnp.concatenate([real, latents], axis=1))
            scores = all_scores[:, : d + 1]
        else:
            scores = self.forward.logits(variables, real)
        scores = self._processed(scores, state, state.drafts, limits)
        if self.sampling is None:
            # Of all rows, where these are the logits of some: to cut rows off is to copy the others.
            cut = all_scores is not None and self.processors is None
            choice = self.forward.likeliest(all_scores if cut else scores)[:, : d + 1]
            accepted = self.accept(state, choice)
            token = jnp.take_along_axis(choice, accepted[:, None], axis=1)[:, 0]
        else:
            assert how is not None
            p = distribution(scores, how, self.sampling.truncated)
            proposal = state.proposal or Proposal(jnp.zeros((B, 0, 1), jnp.int32), jnp.zeros((B, 0, 1)))
            accepted, token = verify(p, state.drafts, state.valid, proposal, keys_for(0, state.keys, state.length))

        keys = keys_for(1, state.keys, state.length)
        emitted = state._replace(cache=cache, steps=state.steps + ~state.done)
        emitted = _emit(emitted, state.drafts, accepted, token, limits)
        if self.options.drafter is not None:
            emitted = self._unmasked(variables, emitted, scores, accepted, limits)
        else:
            sizes = np.asarray(plan.masks)
            block, block_scores, valid = latents, None, jnp.asarray(sizes)[accepted]
            if plan.floating:
                valid = jnp.where(accepted == state.valid, plan.floating, 0)
                block_scores = None if all_scores is None else all_scores[:, d + 1 :]
            elif plan.block:  # the block behind the last accepted row
                begins = jnp.asarray(np.cumsum(sizes) - sizes)[accepted]
                at = jnp.minimum(begins[:, None] + np.arange(plan.block), plan.mask_rows - 1)[..., None]
                block = jnp.take_along_axis(latents, at, axis=1)
                block_scores = None if all_scores is None else jnp.take_along_axis(all_scores, d + 1 + at, axis=1)
            emitted = self._drafted(variables, emitted, block, block_scores, valid, token, keys, limits, how)
        return emitted

    def accept(self, state: DecodeState, choice: Int[Array, "B R"]) -> Int[Array, " B"]:
        """How many drafts, from the first on, are what the base model chooses itself."""
        d = self.plan.drafts
        return prefix((state.drafts == choice[:, :d]) & (jnp.arange(d) < state.valid[:, None]))

    def mask_embeddings(
        self, variables: Variables, keys: Key[Array, " B"], length: Int[Array, " B"], offsets: Int[np.ndarray, " Q"]
    ) -> Float[Array, "Q D"] | Float[Array, "B Q D"]:
        """What mask rows of these offsets hold: learned embeddings, or those of tokens drawn anew in every step."""
        assert self.forward.shape is not None
        if (noise := self.forward.shape.noise) is None:
            return variables["mtp"]["masks"][offsets - 1]
        ids = jax.vmap(lambda key: jax.random.randint(key, offsets.shape, noise.low, noise.high))(
            keys_for(2, keys, length)
        )
        return self.forward.embedded(variables, ids)

    def _processed(
        self, scores: Float[Array, "B R V"], state: DecodeState, drafts: Int[Array, "B d"], limits: Limits
    ) -> Float[Array, "B R V"]:
        """Scores of rows that stand behind what was emitted and 0, 1, ... drafts."""
        if self.processors is None:
            return scores
        assert limits.prompt is not None
        return self.processors(scores, state.tokens, state.length, drafts, limits.prompt, limits.stop_ids)

    def _drafted(
        self,
        variables: Variables,
        state: DecodeState,
        block: Float[Array, "B M D"],
        scores: Float[Array, "B M V"] | None,
        valid: Int[Array, " B"],
        first: Int[Array, " B"],
        keys: Key[Array, " B"],
        limits: Limits,
        how: Tempering | None,
    ) -> DecodeState:
        """The state with drafts behind the newest token, `first`: `valid` of a block, then by prompt lookup."""
        plan, B = self.plan, len(valid)
        drafts, proposal = state.drafts[:, :0], None
        if plan.block:
            drafts, proposal = self._drafts(variables, state, block, scores, first, keys, limits, how)
        elif plan.lookup and self.sampling is not None:
            proposal = Proposal(jnp.zeros((B, 0, 1), jnp.int32), jnp.zeros((B, 0, 1)))
        if plan.lookup:
            drafts, valid, proposal = _with_lookup(state, drafts, valid, proposal, plan.drafts)
        return state._replace(drafts=drafts, valid=valid, proposal=proposal)

    def _drafts(
        self,
        variables: Variables,
        state: DecodeState,
        block: Float[Array, "B M D"],
        scores: Float[Array, "B M V"] | None,
        first: Int[Array, " B"],
        keys: Key[Array, " B"],
        limits: Limits,
        how: Tempering | None,
    ) -> tuple[Array, Proposal | None]:
        """Drafts of a block behind the newest token, `first`."""
        sampling = None if self.sampling is None or how is None else (self.sampling, how, keys)

        def process(scores: Float[Array, "B V"], chain: Int[Array, "B j"]) -> Float[Array, "B V"]:
            rows = jnp.broadcast_to(scores[:, None], (len(scores), chain.shape[1] + 1, scores.shape[1]))
            return self._processed(rows, state, chain, limits)[:, -1]

        changed = None if self.processors is None else process
        return choose_drafts(self.forward, variables, block, scores, first, self.options.shortlist, sampling, changed)

    def _unmasked(
        self,
        variables: Variables,
        state: DecodeState,
        scores: Float[Array, "B R V"],
        accepted: Int[Array, " B"],
        limits: Limits,
    ) -> DecodeState:
        """The state with the drafter's drafts behind what was emitted."""
        drafter = self.options.drafter
        assert drafter is not None

        def process(scores: Float[Array, "B V"], tokens: Int[Array, "B S"], length: Int[Array, " B"]) -> Array:
            behind = state._replace(tokens=tokens, length=length)
            return self._processed(scores[:, None], behind, tokens[:, :0], limits)[:, 0]

        changed = None if self.processors is None else process
        drafts, valid, own = drafter.draft(
            variables, state.drafter, state.tokens, state.length, scores, accepted, changed
        )
        certain = None if self.sampling is None else Proposal(drafts[..., None], jnp.ones((*drafts.shape, 1)))
        return state._replace(drafts=drafts, valid=valid, proposal=certain, drafter=own)


def keys_for(purpose: int, keys: Key[Array, " B"], length: Int[Array, " B"]) -> Key[Array, " B"]:
    """Fresh keys for a step of each sequence, as its length grows with every step."""
    return jax.vmap(lambda key, n: jax.random.fold_in(jax.random.fold_in(key, n), purpose))(keys, length)


def _with_lookup(
    state: DecodeState, drafts: Int[Array, "B M"], valid: Int[Array, " B"], proposal: Proposal | None, d: int
) -> tuple[Array, Array, Proposal | None]:
    """d drafts, how many are valid, and their proposal: the first `valid` ones, and what the text has behind these."""
    place = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))
    text = place(state.tokens, drafts, state.length)
    found, count = look_up(text, state.length + valid, d)
    behind = jnp.arange(d) - valid[:, None]  # number among the looked-up ones; below 0 for drafts of masks

    def longer(x: Array) -> Array:
        return jnp.pad(x, [(0, 0), (0, d - x.shape[1])] + [(0, 0)] * (x.ndim - 2))

    drafts = jnp.where(behind < 0, longer(drafts), jnp.take_along_axis(found, jnp.maximum(behind, 0), axis=1))
    if proposal is not None:  # looked-up drafts are certain
        ids, probabilities, certain = longer(proposal.ids), longer(proposal.probabilities), (behind >= 0)[..., None]
        first = jnp.arange(ids.shape[-1]) == 0
        ids = jnp.where(certain & first, drafts[..., None], ids)
        proposal = Proposal(ids, jnp.where(certain, first.astype(jnp.float32), probabilities))
    return drafts, jnp.minimum(valid + count, d), proposal


def _emit(
    state: DecodeState, drafts: Int[Array, "B d"], accepted: Int[Array, " B"], token: Int[Array, " B"], limits: Limits
) -> DecodeState:
    """Append accepted drafts and the token behind them, up to a stop id or the limit."""
    d = drafts.shape[1]
    index = jnp.arange(d + 1)
    run = jnp.concatenate([drafts, token[:, None]], axis=1)
    run = jnp.where(index == accepted[:, None], token[:, None], run).astype(jnp.int32)
    stop = jnp.any(run[..., None] == limits.stop_ids, axis=-1) & (index <= accepted[:, None])
    until_stop = jnp.where(jnp.any(stop, axis=1), jnp.argmax(stop, axis=1) + 1, d + 2)
    room = limits.length - state.length
    count = jnp.minimum(jnp.minimum(accepted + 1, until_stop), room)
    count = jnp.where(state.done, 0, count)
    # Written whole: what is beyond the new length has no meaning.
    write = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))
    steps = jnp.broadcast_to(state.steps[:, None], run.shape)
    length = state.length + count
    stopped = (until_stop <= count) | (length >= limits.length)
    took_part = (state.steps > 0) & ~state.done  # not prefill
    histogram = state.accepted.at[jnp.arange(len(count)), jnp.maximum(count - 1, 0)].add(took_part.astype(jnp.int32))
    return state._replace(
        tokens=write(state.tokens, run, state.length),
        emitted_by=write(state.emitted_by, steps, state.length),
        length=length,
        done=state.done | stopped,
        accepted=histogram,
    )
