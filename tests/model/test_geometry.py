"""`config.json` is read as transformers reads it, in both spellings; what the decoder cannot compute is refused."""

import copy
import json
import re

import families
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mtp_jax.errors import UserError
from mtp_jax.model.attention import Scores
from mtp_jax.model.families import FAMILIES
from mtp_jax.model.folder import read_geometry
from mtp_jax.model.geometry import Geometry, text_config
from mtp_jax.model.weights import weight_table

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
    new = geometry(head_dim=H, rope_parameters={**scaling, "rope_theta": theta}).layers[0].rope
    old = geometry(head_dim=H, rope_theta=theta, rope_scaling=scaling).layers[0].rope
    typed = {("type" if key == "rope_type" else key): value for key, value in scaling.items()}
    oldest = geometry(head_dim=H, rope_theta=theta, rope_scaling=typed).layers[0].rope
    assert new == old == oldest
    config = AutoConfig.for_model("llama", **SIZES, head_dim=H, rope_theta=theta, rope_scaling=copy.deepcopy(scaling))
    theirs = LlamaRotaryEmbedding(config)
    np.testing.assert_allclose(np.array(new.inv_freq, np.float32), theirs.inv_freq.numpy(), rtol=3e-7)
    assert new.scale == pytest.approx(theirs.attention_scaling, rel=1e-7)


def test_no_rope_scaling_is_null_in_old_configs():
    old = geometry(head_dim=8, rope_theta=500.0, rope_scaling=None).layers[0].rope
    assert old == geometry(head_dim=8, rope_parameters={"rope_theta": 500.0}).layers[0].rope
    assert old != geometry(head_dim=8).layers[0].rope == geometry(head_dim=8, rope_theta=10_000.0).layers[0].rope


def test_original_length_beside_rope_scaling_wins():
    scaling = {**YARN, "rope_theta": 10_000.0}
    config = AutoConfig.for_model(
        "llama", **SIZES, head_dim=16, original_max_position_embeddings=512, rope_parameters=copy.deepcopy(scaling)
    )
    ours = geometry(head_dim=16, original_max_position_embeddings=512, rope_parameters=scaling).layers[0].rope
    np.testing.assert_allclose(np.array(ours.inv_freq, np.float32), LlamaRotaryEmbedding(config).inv_freq, rtol=3e-7)
    assert ours != geometry(head_dim=16, rope_parameters=scaling).layers[0].rope


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_config_and_its_old_spelling_give_one_geometry(family, models, tmp_path):
    said = families.USUAL.get(family, {"rope_parameters": {**LLAMA3, "rope_theta": 100.0}, "sliding_window": 7})
    models.make(family, **said).save_pretrained(tmp_path)
    new = read_geometry(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    if family == "gemma3_text":
        bases = {kind: of["rope_theta"] for kind, of in scaling.items()}
        config |= {"rope_theta": bases["full_attention"], "rope_local_base_freq": bases["sliding_attention"]}
    else:
        config |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    if family == "gemma3_text":  # which kind a layer is, too, by a pattern
        del config["layer_types"]
        config["sliding_window_pattern"] = said["sliding_window_pattern"]
    config |= {"torch_dtype": config.pop("dtype")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_geometry(tmp_path) == new


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_absent_keys_take_the_values_of_transformers(family, used):
    said = {**SIZES, "pad_token_id": 0} | ({"use_sliding_window": True, "sliding_window": 9} if used else {})
    g, config = Geometry.from_config({"model_type": family, **said}), AutoConfig.for_model(family, **said)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    attention = model.model.layers[0].self_attn
    assert (config.num_attention_heads, config.num_key_value_heads) == (g.N, g.K)
    assert (attention.head_dim, attention.scaling) == (g.H, Scores.of(g).scale)
    assert getattr(config, "attn_logit_softcapping", None) == g.score_cap
    assert getattr(config, "final_logit_softcapping", None) == g.logit_cap
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    plain = family in ("llama", "olmo2", "granite")  # others without kinds of layers have one window for all
    kinds = kinds or ["full_attention" if plain else "sliding_attention"] * 3
    assert g.windows == tuple(window if kind == "sliding_attention" else None for kind in kinds)
    ropes = getattr(config, "rope_parameters", None)
    for kind, layer in zip(kinds, g.layers, strict=True):
        said = ropes.get(kind, ropes)
        if layer.rope is not None:
            second = np.float32(1) / np.float32(said["rope_theta"]) ** np.float32(2 / g.H)
            assert len(layer.rope.inv_freq) == 1 or np.isclose(layer.rope.inv_freq[1], second)
    assert [layer.rope is not None for layer in g.layers] == list(map(bool, getattr(config, "no_rope_layers", [1] * 3)))
    assert (g.tied, g.norm_epsilon) == (config.tie_word_embeddings, config.rms_norm_eps)
    ours = {key for weight in weight_table(g) for key in weight.stored_keys()}
    # Experts are one tensor in memory, and one each in a file: reading files has tests of its own.
    expert = re.compile(r".*\.(mlp|block_sparse_moe)\.(experts|gate)\..*")
    theirs = {name for name, _ in model.named_parameters()}
    assert {key for key in ours if not expert.match(key)} == {name for name in theirs if not expert.match(name)}
    if g.experts:
        chosen = config.num_experts_per_tok
        assert (config.num_local_experts, chosen) == (g.experts.total, g.experts.chosen)
        assert getattr(config, "moe_intermediate_size", config.intermediate_size) == g.F


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
    "query scale without a head width": (
        {"model_type": "gemma3_text", "query_pre_attn_scalar": 24},
        ["query_pre_attn_scalar", "head_dim"],
    ),
    "cap of 0": ({"model_type": "gemma2", "attn_logit_softcapping": 0}, ["attn_logit_softcapping is 0"]),
    "window pattern of another length": (
        {"model_type": "gemma2", "layer_types": ["sliding_attention"] * 2},
        ["layer_types", "3 layers"],
    ),
    "window pattern of 0": (
        {"model_type": "gemma3_text", "sliding_window_pattern": 0},
        ["sliding_window_pattern is 0"],
    ),
    "rows that see what follows": (
        {"model_type": "gemma3_text", "use_bidirectional_attention": True},
        ["use_bidirectional_attention"],
    ),
    "layers without rope of another length": (
        {"model_type": "smollm3", "no_rope_layers": [1, 0]},
        ["no_rope_layers", "3 layers"],
    ),
    "more experts per token than experts": (
        {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 5},
        ["num_experts_per_tok=5", "num_local_experts=4"],
    ),
    "layers without experts": ({"model_type": "qwen3_moe", "mlp_only_layers": [1]}, ["mlp_only_layers"]),
    "longrope of another width": (
        {"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0, 2.0]}},
        ["short_factor", "1 numbers"],
    ),
    "longrope without factors": (
        {"model_type": "phi3", "rope_scaling": {"type": "su", "short_factor": [1.0]}},
        ["'longrope' needs long_factor"],
    ),
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


def test_ids_of_a_checkpoint_of_several_modalities_are_those_of_the_whole():
    config = {"model_type": "gemma3", "eos_token_id": [1, 106], "text_config": {"eos_token_id": 1, "pad_token_id": 0}}
    text = text_config(config)
    assert (text["model_type"], text["eos_token_id"], text["pad_token_id"]) == ("gemma3_text", [1, 106], 0)
