"""The decoder computes what transformers computes, after every layer."""

import dataclasses

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mtp_jax.model.decoder import Decoder
from mtp_jax.model.weights import unstack_layers

B, T = 2, 48
THETA = {"rope_theta": 100.0}
DEFAULT = {"rope_parameters": {"rope_type": "default", **THETA}}


def rope(kind, **values):
    return {"rope_parameters": {"rope_type": kind, **THETA, **values}}


def yarn(**values):
    return rope("yarn", **{"factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 4.0, **values})


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
SHORT = {"max_position_embeddings": 16}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

# name: family, config, and the config that it must differ from (None: the feature is in the shapes or a no-op).
CASES = {
    "llama": ("llama", {}, {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}),
    "llama tied": ("llama", {"tie_word_embeddings": True}, None),
    "llama one key head": ("llama", {"num_key_value_heads": 1}, None),
    "llama a key head per query head": ("llama", {"num_key_value_heads": 4}, None),
    "llama head_dim D/N": ("llama", {"head_dim": None}, None),
    "llama attention_bias": ("llama", {"attention_bias": True}, None),
    "llama mlp_bias": ("llama", {"mlp_bias": True}, None),
    "llama epsilon": ("llama", {"rms_norm_eps": 0.1}, {}),
    "llama linear": ("llama", rope("linear", factor=3.0), {}),
    "llama dynamic": ("llama", rope("dynamic", factor=3.0), None),
    "llama llama3": ("llama", LLAMA3, {}),
    "llama yarn": ("llama", yarn(), {}),
    "llama yarn mscale": ("llama", yarn(mscale=1.0, mscale_all_dim=0.4), yarn()),
    "llama yarn attention_factor": ("llama", yarn(attention_factor=0.7), yarn()),
    "llama yarn not truncated": ("llama", yarn(truncate=False), yarn()),
    "llama yarn default betas": ("llama", yarn(beta_fast=None), yarn(beta_fast=2.0, truncate=False)),
    "llama linear beyond": ("llama", rope("linear", factor=3.0) | SHORT, None),
    "llama dynamic beyond": ("llama", rope("dynamic", factor=4.0) | SHORT, SHORT),
    "llama yarn beyond": ("llama", yarn(original_max_position_embeddings=16) | SHORT, SHORT),
    "mistral": ("mistral", {"sliding_window": None}, None),
    "mistral window": ("mistral", {"sliding_window": 7}, {"sliding_window": 8}),
    "mistral tied linear": (
        "mistral",
        {"tie_word_embeddings": True, "sliding_window": 5, **rope("linear", factor=2.0)},
        {"tie_word_embeddings": True, "sliding_window": 5},
    ),
    "qwen2": ("qwen2", {}, None),
    "qwen2 tied yarn": ("qwen2", {"tie_word_embeddings": True, **yarn()}, {"tie_word_embeddings": True}),
    "qwen2 window by max_window_layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    ),
    "qwen2 window by layer_types": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "layer_types": MIXED},
        {"use_sliding_window": True, "sliding_window": 6, "layer_types": MIXED[1:] + MIXED[:1]},
    ),
    "qwen2 window set but not used": (
        "qwen2",
        {"use_sliding_window": False, "sliding_window": 6, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0},
    ),
    "qwen3": ("qwen3", {}, None),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}, None),
    "qwen3 attention_bias": ("qwen3", {"attention_bias": True}, None),
    "qwen3 dynamic": ("qwen3", rope("dynamic", factor=2.0), None),
    "qwen3 yarn": ("qwen3", yarn(), {}),
    "qwen3 window by layer_types": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 5, "layer_types": MIXED},
        {},
    ),
    "qwen3 window by max_window_layers": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
        {},
    ),
}

CASES |= {f"{family} {name}".strip(): (family, *rest) for family, name, *rest in families.CASES}


def reference(model, tokens):
    """Residual stream after every layer [L, B, T, D] and logits, from transformers."""
    residuals = []
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out: residuals.append(out[0] if isinstance(out, tuple) else out))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens)).logits.float().numpy()
    for hook in hooks:
        hook.remove()
    return np.stack([r.float().numpy() for r in residuals]), logits


def ours(g, params, tokens, scanned=True):
    model = Decoder(g, scanned=scanned)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    @jax.jit
    def run(params, tokens):
        variables = {"params": params}
        (latents, _), seen = model.apply(variables, tokens, positions, mutable=["intermediates"])
        return seen["intermediates"], model.apply(variables, latents, method="logits")

    with jax.default_matmul_precision("highest"):
        seen, logits = run(params, tokens)
    if scanned:
        return np.asarray(seen["layers"]["residual"][0]), np.asarray(logits)
    return np.stack([seen[f"layer_{i}"]["residual"][0] for i in range(g.L)]), np.asarray(logits)


def distance(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def tokens_for(model):
    return np.random.default_rng(1).integers(0, model.config.vocab_size, (B, T))


@pytest.mark.parametrize("name", CASES)
def test_every_layer_equals_transformers(name, models, tmp_path):
    family, config, other = CASES[name]
    model = models.make(family, **config)
    tokens = tokens_for(model)
    residuals, logits = reference(model, tokens)
    if other is not None:
        assert distance(reference(models.make(family, **other), tokens)[1], logits) > 1e-3, "the option is idle"
    model.save_pretrained(tmp_path)
    g, params = models.load(tmp_path)
    our_residuals, our_logits = ours(g, params, tokens)
    assert our_residuals.shape == residuals.shape
    assert [distance(a, b) <= 1e-5 for a, b in zip(our_residuals, residuals, strict=True)] == [True] * g.L
    assert distance(our_logits, logits) <= 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen3 window by layer_types"])
def test_unstacked_layers_equal_transformers(name, models, tmp_path):
    family, config, _ = CASES[name]
    model = models.make(family, **config)
    residuals, logits = reference(model, tokens_for(model))
    model.save_pretrained(tmp_path)
    g, params = models.load(tmp_path)
    our_residuals, our_logits = ours(g, unstack_layers(params), tokens_for(model), scanned=False)
    assert max(distance(a, b) for a, b in zip(our_residuals, residuals, strict=True)) <= 1e-5
    assert distance(our_logits, logits) <= 1e-5


def test_bfloat16_is_as_close_to_float32_as_transformers_bfloat16(models, tmp_path):
    model = models.make("qwen3")
    tokens = tokens_for(model)
    model.save_pretrained(tmp_path)
    exact = reference(model, tokens)[1]
    theirs = distance(reference(model.to(torch.bfloat16), tokens)[1], exact)
    g, params = models.load(tmp_path, dtype=jnp.bfloat16)
    decoder = Decoder(g, jnp.bfloat16)
    latents, _ = decoder.apply({"params": params}, jnp.asarray(tokens), jnp.broadcast_to(jnp.arange(T), (B, T)))
    assert distance(np.asarray(decoder.apply({"params": params}, latents, method="logits")), exact) < 1.25 * theirs


def test_remat_changes_no_value(models, tmp_path):
    model = models.make("llama")
    tokens = tokens_for(model)
    model.save_pretrained(tmp_path)
    g, params = models.load(tmp_path)

    def loss(params, remat):
        decoder = Decoder(g, remat=remat)
        latents, _ = decoder.apply({"params": params}, jnp.asarray(tokens), jnp.broadcast_to(jnp.arange(T), (B, T)))
        return jnp.mean(latents**3)

    plain = jax.jit(jax.grad(loss), static_argnums=1)(params, "none")
    for remat in ("dots", "full"):
        gradient = jax.jit(jax.grad(loss), static_argnums=1)(params, remat)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, plain)


def test_stories_equals_transformers(stories, models):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32, attn_implementation="eager")
    residuals, logits = reference(model, tokens_for(model))
    our_residuals, our_logits = ours(*models.load(stories), tokens_for(model))
    assert max(distance(a, b) for a, b in zip(our_residuals, residuals, strict=True)) <= 1e-5
    assert distance(our_logits, logits) <= 1e-5


def test_geometry_is_hashable(models, tmp_path):
    models.make("qwen3").save_pretrained(tmp_path)
    g, _ = models.load(tmp_path)
    assert hash(g) == hash(dataclasses.replace(g)) and g == dataclasses.replace(g)
