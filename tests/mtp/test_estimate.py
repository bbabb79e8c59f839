"""Estimated tokens per step equal what a decoder reaches that is written out step by step on the literal packing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from tiny import SHAPE, V, geometry, noisy

from mtp_jax.model.decoder import Decoder
from mtp_jax.model.weights import init_params
from mtp_jax.mtp.adapter import init_adapter
from mtp_jax.mtp.estimate import Continuations, Estimator, tokens_per_step, usable, walk, walk_twice

PROMPT, NEW = 5, 14


def literal(params, adapter, g, shape, tokens, length, anchor):
    """Latents of all rows of one sequence padded to a fixed length, with one block behind row `anchor`."""
    S = len(tokens)
    segments = (np.arange(S) < length).astype(np.int32)
    batch = {"tokens": tokens[None], "segments": segments[None], "positions": np.arange(S)[None]}
    z = oracle.forward(params, adapter, g, shape, batch | {"anchors": np.array([[anchor]])}, 0)
    return z[:S], z[S:]


def decode_by_hand(params, adapter, g, shape, prompt, new, masks, ids):
    """Greedy continuation and decoding steps of quadratic decoding: draft, verify, accept the matching prefix.

    Tokens of `ids` alone are drafted.
    """
    table, tokens, steps = params["unembed"]["embedding"], list(prompt), 0

    def draft(anchor, known):
        padded = np.array(tokens + [0] * (PROMPT + NEW + 8 - len(tokens)))
        _, z = literal(params, adapter, g, shape, padded, len(tokens), anchor)
        previous, drafts = known, []
        for j in range(masks):
            latent = z[j]
            if shape.sampler != "none":
                latent = oracle.sampler_latents(adapter, shape, params["embed"]["embedding"][previous], latent)
            previous = max(ids, key=lambda token: (table @ latent)[token])
            drafts.append(previous)
        return drafts

    def base(ids):
        padded = np.array(ids + [0] * (PROMPT + NEW + 8 - len(ids)))
        z, _ = literal(params, adapter, g, shape, padded, len(ids), 0)
        return np.asarray(jnp.argmax(z @ table.T, -1))

    limit = PROMPT + new
    first = int(base(tokens)[len(tokens) - 1])
    drafts = draft(len(tokens) - 1, first)
    tokens.append(first)
    while len(tokens) < limit:
        choice = base(tokens + drafts)
        at, accepted = len(tokens) - 1, 0
        while accepted < masks and drafts[accepted] == choice[at + accepted]:
            accepted += 1
        emitted = [*drafts[:accepted], int(choice[at + accepted])]
        steps += 1
        tokens += emitted[:-1]
        drafts = draft(len(tokens) - 1, emitted[-1])
        tokens.append(emitted[-1])
    return tokens[:limit], steps


@pytest.mark.parametrize(("sampler", "ids"), [("residual", range(V)), ("none", range(V)), ("residual", range(1, V, 2))])
def test_estimate_is_what_a_decoder_reaches(sampler, ids):
    few = None if len(ids) == V else len(ids)
    g, shape = geometry(), dataclasses.replace(SHAPE, sampler=sampler, vocabulary=few)
    with jax.default_matmul_precision("highest"), jax.disable_jit(False):
        params = noisy(init_params(g, jax.random.key(0)), jax.random.key(4), 0.05)
        # A base that repeats itself, so that some drafts are right without training.
        params["unembed"]["embedding"] = params["embed"]["embedding"] * 4
        adapter = noisy(
            init_adapter(g, shape, params["embed"]["embedding"], jax.random.key(1)), jax.random.key(2), 0.01
        )
        adapter["mtp"]["masks"] = jnp.zeros_like(adapter["mtp"]["masks"]) + params["embed"]["embedding"][3]
        prompt = [3, 3, 3, 7, 3]
        reached = []
        for masks in (1, 3):
            tokens, steps = decode_by_hand(params, adapter, g, shape, prompt, NEW, masks, ids)
            of = Continuations(np.array([tokens]), np.array([PROMPT]), np.array([len(tokens)]))
            frozen = {"params": params, "vocabulary": jnp.asarray(ids)}
            accepted = jax.jit(Estimator(Decoder(g), shape).accepted)(adapter, frozen, of)
            assert walk(np.asarray(accepted)[0], PROMPT, len(tokens), masks) == (NEW - 1, steps)
            reached.append(steps)
        assert reached[1] < NEW - 1, "no draft was ever right: this compares nothing"


def test_walk_of_known_acceptances():
    accepted = np.array([0, 0, 2, 9, 9, 0, 9, 9])  # row 2 is the last prompt token
    # rows 2 -> 5 (two accepted) -> 6 (none), where the token after row 6, the last, is emitted
    assert walk(accepted, 3, 8, 8) == (4, 2)
    assert walk(accepted, 3, 8, 1) == (4, 2)  # rows 2 -> 4 -> 6
    assert walk(np.zeros(8), 3, 8, 8) == (4, 4)  # nothing accepted: a token a step
    assert walk(accepted, 3, 4, 8) == (0, 0)
    of = Continuations(np.zeros((1, 8)), np.array([3]), np.array([8]))
    assert tokens_per_step(accepted[None], of, 8) == 2.0
    assert usable(8) == [1, 2, 4, 8] and usable(6) == [1, 2, 4, 6] and usable(1) == [1]


def test_walk_in_two_passes_of_known_acceptances():
    accepted = np.array([9, 9, 9, 2, 9, 0, 9, 9, 9, 9])  # prefill gave the token of row 3, the first seed
    # Row 3 emits rows 4, 5, 6 and, verified behind them, 7: the next seed; its drafts reach the end.
    assert walk_twice(accepted, 3, 10, 8) == (6, 4)
    # One draft: 3 -> 6 -> 9, the last.
    assert walk_twice(accepted, 3, 10, 1) == (6, 4)
    assert walk_twice(np.zeros(10, int), 3, 10, 8) == (6, 6)  # nothing accepted: still two tokens in two passes
    assert walk_twice(accepted, 3, 4, 8) == (0, 0)
    of = Continuations(np.zeros((1, 10)), np.array([3]), np.array([10]))
    assert tokens_per_step(accepted[None], of, 8, walk_twice) == 1.5
