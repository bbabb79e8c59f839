"""`config.json` is read as transformers reads it, in both spellings; what the decoder cannot compute is refused."""

import copy
import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mtp_jax.errors import UserError
from mtp_jax.model.folder import read_geometry
from mtp_jax.model.geometry import FAMILIES, Geometry

pytestmark = pytest.mark.quick

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
    "vocab_size": 96,
    "max_position_embeddings": 4096,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": LLAMA3,
    "llama3 of max_position_embeddings": {**LLAMA3, "original_max_position_embeddings": None},
    "yarn": YARN,
    "yarn mscale": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
    "yarn mscale_all_dim 0": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.0},
    "yarn attention_factor": {**YARN, "attention_factor": 0.9},
    "yarn not truncated": {**YARN, "truncate": False},
    "yarn betas": {**YARN, "beta_fast": 8.0, "beta_slow": 2.0},
}


def geometry(**config):
    return Geometry.from_config({"model_type": "llama", **SIZES, **config})


def without_none(values):
    return {key: value for key, value in values.items() if value is not None}


@pytest.mark.parametrize("H", [16, 128])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("name", ROPES)
def test_frequencies_equal_transformers_in_both_spellings(name, theta, H):
    scaling = without_none(ROPES[name])
    new = geometry(head_dim=H, rope_parameters={**scaling, "rope_theta": theta}).rope
    old = geometry(head_dim=H, rope_theta=theta, rope_scaling=scaling).rope
    typed = {("type" if key == "rope_type" else key): value for key, value in scaling.items()}
    oldest = geometry(head_dim=H, rope_theta=theta, rope_scaling=typed).rope
    assert new == old == oldest
    config = AutoConfig.for_model("llama", **SIZES, head_dim=H, rope_theta=theta, rope_scaling=copy.deepcopy(scaling))
    theirs = LlamaRotaryEmbedding(config)
    np.testing.assert_allclose(np.array(new.inv_freq, np.float32), theirs.inv_freq.numpy(), rtol=3e-7)
    assert new.scale == pytest.approx(theirs.attention_scaling, rel=1e-7)


def test_no_rope_scaling_is_null_in_old_configs():
    old = geometry(head_dim=8, rope_theta=500.0, rope_scaling=None).rope
    assert old == geometry(head_dim=8, rope_parameters={"rope_theta": 500.0}).rope
    assert old != geometry(head_dim=8).rope == geometry(head_dim=8, rope_theta=10_000.0).rope


def test_original_length_beside_rope_scaling_wins():
    scaling = {**YARN, "rope_theta": 10_000.0}
    config = AutoConfig.for_model(
        "llama", **SIZES, head_dim=16, original_max_position_embeddings=512, rope_parameters=copy.deepcopy(scaling)
    )
    ours = geometry(head_dim=16, original_max_position_embeddings=512, rope_parameters=scaling).rope
    np.testing.assert_allclose(np.array(ours.inv_freq, np.float32), LlamaRotaryEmbedding(config).inv_freq, rtol=3e-7)
    assert ours != geometry(head_dim=16, rope_parameters=scaling).rope


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_config_and_its_old_spelling_give_one_geometry(family, models, tmp_path):
    model = models.make(family, rope_parameters={**LLAMA3, "rope_theta": 100.0}, sliding_window=7)
    model.save_pretrained(tmp_path)
    new = read_geometry(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling, "torch_dtype": config.pop("dtype")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_geometry(tmp_path) == new


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_absent_keys_take_the_values_of_transformers(family, used):
    said = {**SIZES, "use_sliding_window": True} if used else SIZES
    said = said if family.startswith("qwen") or not used else SIZES
    g, config = Geometry.from_config({"model_type": family, **said}), AutoConfig.for_model(family, **said)
    H = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    assert (config.num_attention_heads, config.num_key_value_heads, H) == (g.N, g.K, g.H)
    kinds = (
        getattr(config, "layer_types", None) or ["sliding_attention" if family == "mistral" else "full_attention"] * 3
    )
    window = getattr(config, "sliding_window", None)
    assert g.windows == tuple(window if kind == "sliding_attention" else None for kind in kinds)
    assert (g.tied, g.norm_epsilon) == (config.tie_word_embeddings, config.rms_norm_eps)
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        names = {name for name, _ in AutoModelForCausalLM.from_config(config).named_parameters()}
    assert g.qkv_bias == ("model.layers.0.self_attn.q_proj.bias" in names)
    assert g.o_bias == ("model.layers.0.self_attn.o_proj.bias" in names)
    assert g.mlp_bias == ("model.layers.0.mlp.up_proj.bias" in names)
    assert g.qk_norm == ("model.layers.0.self_attn.q_norm.weight" in names)


REFUSED = {
    "unknown architecture": ({"model_type": "gpt2"}, ["'gpt2'", "llama, mistral, qwen2, qwen3"]),
    "no architecture": ({"model_type": None}, ["None"]),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, ["quantised (gptq)"]),
    "activation": ({"hidden_act": "gelu"}, ["hidden_act='gelu'"]),
    "rope type": ({"rope_scaling": {"rope_type": "longrope", "factor": 2}}, ["'longrope'"]),
    "rope without factor": ({"rope_scaling": {"rope_type": "yarn"}}, ["'yarn' needs factor"]),
    "rope per layer type": ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["per layer type"]),
    "partial rotary": ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
    "partial rotary in rope": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor=0.5"]),
    "ministral": (
        {"model_type": "mistral", "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        ["Ministral"],
    ),
    "layer_types of another length": (
        {"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["full_attention"]},
        ["layer_types", "3 layers"],
    ),
    "unknown layer type": (
        {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["chunked_attention"] * 3},
        ["layer_types"],
    ),
    "heads": ({"num_attention_heads": 6, "num_key_value_heads": 4, "head_dim": 8}, ["=6", "=4"]),
    "odd head_dim": ({"head_dim": 7}, ["head_dim=7"]),
    "no size": ({"hidden_size": None, "vocab_size": "many"}, ["hidden_size is missing", "vocab_size is 'many'"]),
    "several": ({"hidden_act": "relu", "num_hidden_layers": 0}, ["hidden_act", "num_hidden_layers"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name(name):
    change, words = REFUSED[name]
    with pytest.raises(UserError) as error:
        geometry(**change)
    assert all(word in str(error.value) for word in ["config.json", *words])


def test_quantization_config_of_any_kind_is_refused():
    with pytest.raises(UserError, match="quantised"):
        geometry(quantization_config="awq")
