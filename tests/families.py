"""Random models of families beside Llama's, by the options that each of them has."""

_THETA = {"rope_theta": 100.0}
_DEFAULT = {"rope_type": "default", **_THETA}
_WINDOWS = {"sliding_window": 5}
# Per kind of layer, as transformers 5 spells it.
_TWO_ROPES = {"full_attention": _DEFAULT, "sliding_attention": {"rope_type": "default", "rope_theta": 10.0}}
_SCALED = {**_TWO_ROPES, "full_attention": {"rope_type": "linear", "factor": 8.0, **_THETA}}
GEMMA2 = {**_WINDOWS, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
GEMMA2 |= {"tie_word_embeddings": True}
GEMMA3 = {**_WINDOWS, "query_pre_attn_scalar": 24, "sliding_window_pattern": 2, "rope_parameters": _TWO_ROPES}
GEMMA3 |= {"tie_word_embeddings": True}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 4 for i in range(8)],
    "long_factor": [3.0 + i for i in range(8)],
}
LONG |= _THETA
PHI3 = {"head_dim": None, "num_attention_heads": 2, "pad_token_id": 0}  # its heads are D/N wide
PARTIAL = {"rope_type": "default", "partial_rotary_factor": 0.75, **_THETA}
GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.4,
    "logits_scaling": 2.0,
}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True}
MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
# One for each family, with all that it has; `None` stands for transformers' own choice where ours has one.
USUAL = {
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "olmo2": {"head_dim": None},
    "phi3": {
        **PHI3,
        "rope_parameters": {**LONG, "original_max_position_embeddings": 32},
        "max_position_embeddings": 64,
    },
    "smollm3": {"no_rope_layers": [1, 0, 1], "pad_token_id": 0},
    "granite": GRANITE,
    "qwen3_moe": MOE,
    "mixtral": MIXTRAL,
}
# family, name, config, and the config that it must differ from (None: the option is in the shapes or a no-op).
CASES = [
    ("gemma2", "", GEMMA2, {**GEMMA2, "query_pre_attn_scalar": 16}),
    ("gemma2", "without caps", {**GEMMA2, "attn_logit_softcapping": None, "final_logit_softcapping": None}, GEMMA2),
    ("gemma2", "cap of scores", GEMMA2, {**GEMMA2, "attn_logit_softcapping": None}),
    ("gemma2", "cap of logits", GEMMA2, {**GEMMA2, "final_logit_softcapping": None}),
    ("gemma2", "window", GEMMA2, {**GEMMA2, "sliding_window": 6}),
    ("gemma2", "untied", {**GEMMA2, "tie_word_embeddings": False}, None),
    ("gemma3_text", "", GEMMA3, {**GEMMA3, "query_pre_attn_scalar": 16}),
    ("gemma3_text", "pattern", GEMMA3, {**GEMMA3, "sliding_window_pattern": 3}),
    ("gemma3_text", "scaled rope", {**GEMMA3, "rope_parameters": _SCALED}, GEMMA3),
    ("gemma3_text", "bases", GEMMA3, {**GEMMA3, "rope_parameters": {**_TWO_ROPES, "sliding_attention": _DEFAULT}}),
    ("olmo2", "", {"head_dim": None}, None),
    ("olmo2", "attention_bias", {"head_dim": None, "attention_bias": True}, None),
    ("phi3", "", PHI3, None),
    ("phi3", "window", {**PHI3, "sliding_window": 5}, PHI3),
    ("phi3", "partial", {**PHI3, "rope_parameters": PARTIAL}, PHI3),
    ("phi3", "longrope", USUAL["phi3"], PHI3),
    (
        "phi3",
        "longrope within",
        {**USUAL["phi3"], "rope_parameters": {**LONG, "original_max_position_embeddings": 64}},
        PHI3,
    ),
    ("smollm3", "", USUAL["smollm3"], {**USUAL["smollm3"], "no_rope_layers": [1, 1, 1]}),
    ("smollm3", "interval", {"no_rope_layer_interval": 2, "pad_token_id": 0}, {"pad_token_id": 0}),
    (
        "smollm3",
        "window",
        {**USUAL["smollm3"], "use_sliding_window": True, "sliding_window": 5},
        USUAL["smollm3"],
    ),
    *(("granite", key, GRANITE, {**GRANITE, key: 1.0}) for key in GRANITE),
    ("qwen3_moe", "", MOE, {**MOE, "norm_topk_prob": False}),
    ("qwen3_moe", "window", {**MOE, "use_sliding_window": True, "sliding_window": 5}, MOE),
    ("qwen3_moe", "one expert", {**MOE, "num_experts_per_tok": 1}, MOE),
    ("mixtral", "", MIXTRAL, {**MIXTRAL, "num_experts_per_tok": 1}),
    ("mixtral", "window", {**MIXTRAL, "sliding_window": 5}, MIXTRAL),
]
