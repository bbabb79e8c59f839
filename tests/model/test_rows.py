"""Padding, packing and chunked prefill are matters of layout: they change no logit."""

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.decoding import loop
from mtp_jax.decoding.forward import XlaForward
from mtp_jax.decoding.loop import Decoding, Limits
from mtp_jax.model.attention import empty_cache
from mtp_jax.model.decoder import Decoder
from mtp_jax.model.weights import unstack_layers

CLOSE = 1e-5
LENGTH = 29
MODELS = {"llama": {}, "mistral": {"sliding_window": 5}, **families.USUAL}


@pytest.fixture(scope="module", params=MODELS)
def case(request, models, tmp_path_factory):
    """Geometry, weights, and the logits of two plain documents."""
    folder = tmp_path_factory.mktemp(request.param)
    models.make(request.param, **MODELS[request.param]).save_pretrained(folder)
    g, params = models.load(folder)
    documents = np.random.default_rng(3).integers(0, g.V, (2, LENGTH))
    return g, params, documents, logits(g, params, documents, np.broadcast_to(np.arange(LENGTH), documents.shape))


def logits(g, params, tokens, positions, segments=None):
    model = Decoder(g)

    @jax.jit
    def run(params, tokens, positions, segments):
        latents, _ = model.apply({"params": params}, tokens, positions, segments)
        return model.apply({"params": params}, latents, method="logits")

    with jax.default_matmul_precision("highest"):
        return np.asarray(run(params, tokens, positions, segments))


def worst(a, b):
    assert 0.1 < np.std(b) < 10
    return np.max(np.abs(a - b))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_in_segment_0_changes_no_logit(case, side):
    g, params, documents, plain = case
    pad = 9
    widths = ((0, 0), (pad, 0) if side == "left" else (0, pad))
    tokens = np.pad(documents, widths, constant_values=7)
    positions = np.pad(np.broadcast_to(np.arange(LENGTH), documents.shape), widths)
    segments = np.pad(np.ones_like(documents), widths)
    padded = logits(g, params, tokens, positions, segments)
    assert np.isfinite(padded).all()
    assert worst(padded[:, pad:] if side == "left" else padded[:, :LENGTH], plain) <= CLOSE


def test_packed_documents_do_not_see_each_other(case):
    g, params, documents, plain = case
    cut = 11  # of the second document only the beginning: segments of unlike length
    tokens = np.concatenate([documents[0], documents[1, :cut], [3, 3]])[None]
    positions = np.concatenate([np.arange(LENGTH), np.arange(cut), [0, 0]])[None]
    segments = np.repeat([1, 2, 0], [LENGTH, cut, 2])[None]
    packed = logits(g, params, tokens, positions, segments)[0]
    assert worst(packed[:LENGTH], plain[0]) <= CLOSE
    assert worst(packed[LENGTH : LENGTH + cut], plain[1, :cut]) <= CLOSE
    unpacked = logits(g, params, tokens, positions)[0]
    assert worst(unpacked[LENGTH : LENGTH + cut], plain[1, :cut]) > 0.1, "segments make no difference"


@pytest.mark.parametrize("scanned", [True, False], ids=["stacked", "unstacked"])
@pytest.mark.parametrize("chunk", [1, 13])
def test_chunked_prefill_changes_no_logit(case, chunk, scanned):
    g, params, documents, plain = case
    params = params if scanned else unstack_layers(jax.tree.map(jnp.copy, params))
    model = Decoder(g, scanned=scanned)

    @jax.jit
    def run(tokens, start, cache):
        latents, _, cache = model.apply({"params": params}, tokens, jnp.full(2, start), cache, method="step")
        return model.apply({"params": params}, latents, method="logits"), cache

    cache, seen = empty_cache(g, 2, LENGTH + 4, jnp.float32, stacked=scanned), []
    with jax.default_matmul_precision("highest"):
        for start in range(0, LENGTH, chunk):
            out, cache = run(documents[:, start : start + chunk], start, cache)
            seen.append(out)
    assert worst(np.concatenate(seen, axis=1), plain) <= CLOSE


def test_what_a_cache_holds_beyond_a_row_is_not_seen(case):
    g, params, documents, plain = case
    model = Decoder(g)
    cache = jax.tree.map(lambda a: jnp.full_like(a, 1e3), empty_cache(g, 2, LENGTH + 4, jnp.float32, stacked=True))

    def run(tokens, cache):
        latents, _, _ = model.apply({"params": params}, tokens, jnp.zeros(2, int), cache, method="step")
        return model.apply({"params": params}, latents, method="logits")

    with jax.default_matmul_precision("highest"):
        out = jax.jit(run)(jnp.asarray(documents), cache)
    assert worst(np.asarray(out), plain) <= CLOSE


def test_rows_of_a_batch_may_be_at_different_positions(case):
    g, params, documents, plain = case
    model = Decoder(g)
    begins = jnp.asarray([LENGTH - 4, 10])
    cache = empty_cache(g, 2, LENGTH, jnp.float32, stacked=True)
    at = begins[:, None] + jnp.arange(3)

    def run(tokens, cache):
        _, _, cache = model.apply({"params": params}, tokens, jnp.zeros(2, int), cache, method="step")
        again = jnp.take_along_axis(tokens, at, 1)
        latents, _, _ = model.apply({"params": params}, again, begins, cache, method="step")
        return model.apply({"params": params}, latents, method="logits")

    with jax.default_matmul_precision("highest"):
        out = jax.jit(run)(jnp.asarray(documents), cache)
    assert worst(np.asarray(out), np.take_along_axis(plain, np.asarray(at)[..., None], 1)) <= CLOSE


@pytest.mark.parametrize("chunk", [8, 64])
def test_prefill_of_ragged_prompts_gives_the_first_token_of_each(case, chunk, monkeypatch):
    g, params, documents, plain = case
    monkeypatch.setattr(loop, "PREFILL_CHUNK", chunk)
    lengths = np.array([LENGTH, 6])
    limits = Limits(jnp.asarray(lengths + 1), jnp.zeros(0, int))
    decoding = Decoding(XlaForward(Decoder(g)))
    with jax.default_matmul_precision("highest"):
        state = jax.jit(
            lambda params, prompts, lengths: decoding.prefill(
                {"params": params}, prompts, lengths, limits, LENGTH + 3, jnp.float32
            )
        )(params, documents, lengths)
    first = np.take_along_axis(np.asarray(state.tokens), lengths[:, None], axis=1)[:, 0]
    assert first.tolist() == [plain[0, -1].argmax(), plain[1, 5].argmax()]
    assert state.done.all() and state.steps.tolist() == [0, 0]
