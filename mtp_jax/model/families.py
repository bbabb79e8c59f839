"""The families of models: what a `model_type` fixes, what its config says under which key, and what absent keys mean.

docs/families.md has the table for readers, and how to add a family.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mtp_jax.model.rope import Rope

_KINDS = ("full_attention", "sliding_attention")


class Reader:
    """Reads a config and gathers every fault instead of stopping at the first."""

    def __init__(self, config: Mapping[str, Any], where: str):
        self.config, self.where, self.faults = config, where, []  # type: ignore[var-annotated]

    def fault(self, message: str) -> None:
        """Note a fault; reading goes on."""
        self.faults.append(f"{self.where}: {message}")

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        value = self.config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            said = "is missing" if value is None else f"is {value!r}"
            self.fault(f"{key} {said}, but a whole number of at least 1 is needed.")
            return 1
        return value

    def number(self, key: str, default: float) -> float:
        """A number of at least 0."""
        value = self.config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise ValueError(f"{key} is {value!r}, but a number of at least 0 is needed")
        return float(value)

    def factor(self, key: str) -> float | None:
        """A number above 0, or None where the config says null."""
        value = self.config.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            self.fault(f"{key} is {value!r}, but a number above 0 is needed.")
            return 1.0
        return float(value)

    def layer_types(self, L: int, otherwise: list[str]) -> list[str]:
        """Which kind of attention each layer has: as the config says, or `otherwise`."""
        kinds = self.config.get("layer_types") or otherwise
        if len(kinds) != L or set(kinds) - set(_KINDS):
            self.fault(f"layer_types must name 'full_attention' or 'sliding_attention' for each of {L} layers.")
            return ["full_attention"] * L
        return list(kinds)


class ExpertKeys(NamedTuple):
    """The config's keys for a mixture of experts, and the names of its tensors."""

    total: str
    width: str
    normalised: str | None  # whether the weights of the chosen experts add up to 1; None: they do
    stored: tuple[str, str, str, str]  # block, gate, up, down


Windows = tuple[int | None, ...]
Ropes = tuple[Rope | None, ...]


def _one_rope(read: Reader, H: int, positions: int, L: int) -> Ropes:
    return (Rope.from_config(read.config, H, positions, read.where, read.faults),) * L


def _phi_rope(read: Reader, H: int, positions: int, L: int) -> Ropes:
    kinds = ("default", "longrope")
    return (Rope.from_config(read.config, H, positions, read.where, read.faults, kinds, partial=True),) * L


def _rope_by_layer(read: Reader, H: int, positions: int, L: int) -> Ropes:
    """SmolLM3: every so many layers one without rotary embedding."""
    flags, every = read.config.get("no_rope_layers"), read.size("no_rope_layer_interval")
    rope = _one_rope(read, H, positions, 1)[0]
    if flags is None:
        flags = [int((i + 1) % every != 0) for i in range(L)]
    if len(flags) < L or set(flags) - {0, 1}:
        read.fault(f"no_rope_layers must hold 1 (rotary embedding) or 0 (none) for each of {L} layers.")
        return (rope,) * L
    return tuple(rope if flag else None for flag in flags[:L])


def _rope_by_window(read: Reader, H: int, positions: int, L: int) -> Ropes:
    """Gemma 3: one for layers with a window and one for those without, in the spelling of transformers 4 or 5."""
    config, said = read.config, read.config.get("rope_parameters") or {}
    nested = any(isinstance(value, dict) for value in said.values())
    full = said.get("full_attention") if nested else said
    full = {"rope_theta": config["rope_theta"], **(full or config.get("rope_scaling") or {})}
    window = {"rope_theta": config["rope_local_base_freq"], **((said.get("sliding_attention") or {}) if nested else {})}
    rest = {key: value for key, value in config.items() if not key.startswith("rope_")}
    ropes = {
        kind: Rope.from_config({**rest, "rope_parameters": rope}, H, positions, read.where, read.faults)
        for kind, rope in (("full_attention", full), ("sliding_attention", window))
    }
    return tuple(ropes[kind] for kind in read.layer_types(L, _gemma3_kinds(read, L)))


def _gemma3_kinds(read: Reader, L: int) -> list[str]:
    every = read.size("sliding_window_pattern")
    return [_KINDS[(i + 1) % every != 0] for i in range(L)]


def _no_window(read: Reader, L: int) -> Windows:
    del read
    return (None,) * L


def _one_window(read: Reader, L: int) -> Windows:
    return (None if read.config.get("sliding_window") is None else read.size("sliding_window"),) * L


def _mistral_windows(read: Reader, L: int) -> Windows:
    if any(kind != "sliding_attention" for kind in read.config.get("layer_types") or ()):
        read.fault(
            "layer_types that differ between layers belong to the Ministral architecture, "
            "which is not supported; a Mistral model has one window for all layers."
        )
    return _one_window(read, L)


def _qwen_windows(read: Reader, L: int) -> Windows:
    config = read.config
    if config.get("sliding_window") is None or not config.get("use_sliding_window", False):
        return (None,) * L
    first = config["max_window_layers"]
    return _by_kind(read, read.layer_types(L, [_KINDS[i >= first] for i in range(L)]))


def _qwen_moe_windows(read: Reader, L: int) -> Windows:
    return _one_window(read, L) if read.config.get("use_sliding_window", False) else (None,) * L


def _smollm3_windows(read: Reader, L: int) -> Windows:
    config, every = read.config, read.size("no_rope_layer_interval")
    if config.get("sliding_window") is None or not config.get("use_sliding_window", False):
        return (None,) * L
    flags = config.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(L)]
    return _by_kind(read, read.layer_types(L, [_KINDS[not flag] for flag in flags]))


def _gemma2_windows(read: Reader, L: int) -> Windows:
    return _by_kind(read, read.layer_types(L, [_KINDS[(i + 1) % 2] for i in range(L)]))


def _gemma3_windows(read: Reader, L: int) -> Windows:
    return _by_kind(read, read.layer_types(L, _gemma3_kinds(read, L)))


def _by_kind(read: Reader, kinds: list[str]) -> Windows:
    window = _one_window(read, 1)[0]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


@dataclass(frozen=True)
class Family:
    """How the config of one `model_type` is read.

    other_names: keys that transformers has in use beside ours, and ours.
    absent: what a key means that config.json does not hold: transformers' own defaults, which differ.
    fixed: fields of `Geometry` that the architecture fixes.
    switches, factors: fields of `Geometry` by the config's key: true or false, and numbers above 0 or null.
    windows: the sliding window of each layer, from the reader and L.
    ropes: the rotary embedding of each layer, None without one, from the reader, H, the context and L.
    """

    other_names: Mapping[str, str] = field(default_factory=dict)
    absent: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    switches: Mapping[str, str] = field(default_factory=dict)
    factors: Mapping[str, str] = field(default_factory=dict)
    activation: str = "hidden_act"  # the key that names it
    windows: Callable[[Reader, int], Windows] = _no_window
    ropes: Callable[[Reader, int, int, int], Ropes] = _one_rope


_BIASES = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}
_QWEN3 = {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28}
_GEMMA_FIXED = {"embed_scale": "sqrt(D)", "norm_offset": 1.0, "norm_wide": True, "norm_after": True}
_GEMMA_FACTORS = {"score_cap": "attn_logit_softcapping", "logit_cap": "final_logit_softcapping"}
_GEMMA_ABSENT = {
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "hidden_activation": "gelu_pytorch_tanh",
}
_GEMMA3_SIZES = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "max_position_embeddings": 131_072,
}
_QWEN_EXPERTS = ExpertKeys(
    "num_experts", "moe_intermediate_size", "norm_topk_prob", ("mlp", "gate_proj", "up_proj", "down_proj")
)
_MIXTRAL_EXPERTS = ExpertKeys("num_local_experts", "intermediate_size", None, ("block_sparse_moe", "w1", "w3", "w2"))
_GRANITE_FACTORS = {
    "embed_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "score_scale": "attention_multiplier",
    "logit_divisor": "logits_scaling",
}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(switches={**_BIASES, "mlp_bias": "mlp_bias"}),
    "mistral": Family(absent={"num_key_value_heads": 8, "sliding_window": 4096}, windows=_mistral_windows),
    "qwen2": Family(
        absent={"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
        fixed={"qkv_bias": True},
        windows=_qwen_windows,
    ),
    "qwen3": Family(absent=_QWEN3, fixed={"qk_norm": "head"}, switches=_BIASES, windows=_qwen_windows),
    "qwen3_moe": Family(
        other_names={"num_local_experts": "num_experts"},
        absent={
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "decoder_sparse_step": 1,
        },
        fixed={"qk_norm": "head", "experts": _QWEN_EXPERTS},
        switches=_BIASES,
        windows=_qwen_moe_windows,
    ),
    "mixtral": Family(
        absent={
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
        },
        fixed={"experts": _MIXTRAL_EXPERTS},
        windows=_one_window,
    ),
    "gemma2": Family(
        absent={**_GEMMA_ABSENT, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        fixed=_GEMMA_FIXED,
        switches=_BIASES,
        factors=_GEMMA_FACTORS,
        activation="hidden_activation",
        windows=_gemma2_windows,
    ),
    "gemma3_text": Family(
        absent={
            **_GEMMA_ABSENT,
            **_GEMMA3_SIZES,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "sliding_window_pattern": 6,
        },
        fixed={**_GEMMA_FIXED, "qk_norm": "head"},
        switches=_BIASES,
        factors=_GEMMA_FACTORS,
        activation="hidden_activation",
        windows=_gemma3_windows,
        ropes=_rope_by_window,
    ),
    "olmo2": Family(
        absent={"rms_norm_eps": 1e-5},
        fixed={"norm_wide": True, "norm_before": False, "norm_after": True, "qk_norm": "width"},
        switches=_BIASES,
    ),
    "phi3": Family(absent={"rms_norm_eps": 1e-5}, fixed={"fused": True}, windows=_one_window, ropes=_phi_rope),
    "smollm3": Family(
        absent={
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "rope_theta": 2e6,
            "no_rope_layer_interval": 4,
        },
        switches={**_BIASES, "mlp_bias": "mlp_bias"},
        windows=_smollm3_windows,
        ropes=_rope_by_layer,
    ),
    "granite": Family(
        absent=dict.fromkeys(_GRANITE_FACTORS.values(), 1.0),
        switches={**_BIASES, "mlp_bias": "mlp_bias"},
        factors=_GRANITE_FACTORS,
    ),
}
# Checkpoints of several modalities: the family of their text part, which is what is read of them.
TEXT_PARTS = {"gemma3": "gemma3_text"}
