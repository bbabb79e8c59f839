"""What a checkpoint's `config.json` says about the shape of its model; nothing comes from anywhere else."""

import math
from dataclasses import dataclass
from typing import Any

from mtp_jax.errors import UserError
from mtp_jax.model.rope import Rope

# Values that a key takes in transformers when config.json does not hold it. They differ between the families.
_ABSENT: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "attention_bias": False,
    },
}
FAMILIES = tuple(_ABSENT)


@dataclass(frozen=True)
class Geometry:
    """The shape of a base model. Hashable, so that it can be a static argument.

    V vocabulary, D model width, L layers, N query heads, K key/value heads, H head width, F mlp width.
    `max_positions` is the context: `max_position_embeddings`, or what scaled RoPE reaches.
    `windows[l]` is the sliding window of layer l in tokens, None where the layer sees everything before it.
    """

    family: str
    V: int
    D: int
    L: int
    N: int
    K: int
    H: int
    F: int
    max_positions: int
    norm_epsilon: float
    rope: Rope
    windows: tuple[int | None, ...]
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    init_scale: float

    @property
    def kinds(self) -> tuple[list[int | None], list[int]]:
        """The windows that occur, and which of them each layer has."""
        windows = sorted(set(self.windows), key=lambda window: (window is None, window))
        return windows, [windows.index(window) for window in self.windows]

    @classmethod
    def from_config(cls, config: dict[str, Any], where: str = "config.json") -> "Geometry":
        """Read a Hugging Face config, in the spelling of transformers 4 or 5.

        Raises:
            UserError: an architecture, quantisation or option that this decoder does not compute, missing sizes, or
                values of the wrong kind.
        """
        try:
            return cls._from_config(config, where)
        except (TypeError, ValueError, AttributeError, KeyError, ArithmeticError) as error:
            raise UserError(f"{where}: holds a value of the wrong kind ({error}).") from error

    @classmethod
    def _from_config(cls, config: dict[str, Any], where: str) -> "Geometry":
        family = config.get("model_type")
        if family not in FAMILIES:
            names = ", ".join(map(str, config.get("architectures") or ["no name given"]))
            raise UserError(
                f"{where}: the architecture {family!r} ({names}) "
                f"is not supported; the supported model_type values are {', '.join(FAMILIES)}."
            )
        if quantised := config.get("quantization_config"):
            method = quantised.get("quant_method", "unknown method") if isinstance(quantised, dict) else quantised
            raise UserError(
                f"{where}: the checkpoint is quantised ({method}); use the float32, bfloat16 or float16 checkpoint "
                "it was made from, or dequantise it with transformers and save it again."
            )
        read = _Reader({**_ABSENT[family], **config}, where)
        D, L, N = read.size("hidden_size"), read.size("num_hidden_layers"), read.size("num_attention_heads")
        K = read.size("num_key_value_heads", default=N)
        H = read.size("head_dim", default=D // N if N else 0)
        max_positions = read.size("max_position_embeddings")
        V, F = read.size("vocab_size"), read.size("intermediate_size")
        if K and N % K:
            read.faults.append(f"{where}: num_attention_heads={N} is not a multiple of num_key_value_heads={K}.")
        if H % 2:
            read.faults.append(f"{where}: head_dim={H} is odd; rotary embeddings need an even width.")
        if (activation := config.get("hidden_act", "silu")) not in ("silu", "swish"):
            read.faults.append(f"{where}: hidden_act={activation!r} is not supported, only 'silu'.")
        windows = _windows(family, read, L)
        rope = Rope.from_config(config, H, max_positions, where, read.faults)
        if read.faults:
            raise UserError(*read.faults)
        attention_bias = bool(read.config.get("attention_bias", False)) and family in ("llama", "qwen3")
        return cls(
            family=family,
            V=V,
            D=D,
            L=L,
            N=N,
            K=K,
            H=H,
            F=F,
            max_positions=rope.context,
            norm_epsilon=read.number("rms_norm_eps", 1e-6),
            rope=rope,
            windows=windows,
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=attention_bias or family == "qwen2",
            o_bias=attention_bias,
            mlp_bias=bool(read.config.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            init_scale=read.number("initializer_range", 0.02),
        )


class _Reader:
    """Reads sizes from a config and gathers every fault instead of stopping at the first."""

    def __init__(self, config: dict[str, Any], where: str):
        self.config, self.where, self.faults = config, where, []  # type: ignore[var-annotated]

    def size(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            said = "is missing" if value is None else f"is {value!r}"
            self.faults.append(f"{self.where}: {key} {said}, but a whole number of at least 1 is needed.")
            return 1
        return value

    def number(self, key: str, default: float) -> float:
        value = self.config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"{key} is {value!r}, but a number of at least 0 is needed")
        return float(value)


def _windows(family: str, read: _Reader, L: int) -> tuple[int | None, ...]:
    """Sliding window of every layer, as transformers decides it for each family."""
    config = read.config
    if family == "llama" or config.get("sliding_window") is None:
        return (None,) * L
    if family == "mistral":
        if any(kind != "sliding_attention" for kind in config.get("layer_types") or ()):
            read.faults.append(
                f"{read.where}: layer_types that differ between layers belong to the Ministral architecture, "
                "which is not supported; a Mistral model has one window for all layers."
            )
        return (read.size("sliding_window"),) * L
    if not config.get("use_sliding_window", False):
        return (None,) * L
    window, first = read.size("sliding_window"), config["max_window_layers"]
    kinds = config.get("layer_types") or ["full_attention" if i < first else "sliding_attention" for i in range(L)]
    if len(kinds) != L or set(kinds) - {"full_attention", "sliding_attention"}:
        read.faults.append(
            f"{read.where}: layer_types must name 'full_attention' or 'sliding_attention' for each of {L} layers."
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
