"""What a checkpoint's `config.json` says about the shape of its model; nothing comes from anywhere else."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from mtp_jax.errors import UserError
from mtp_jax.model.families import FAMILIES, TEXT_PARTS, ExpertKeys, Reader
from mtp_jax.model.rope import Rope

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class Kind(NamedTuple):
    """What layers differ in."""

    window: int | None  # tokens that a row sees, itself included; None for everything before it
    rope: Rope | None  # None: queries and keys are not rotated


class Experts(NamedTuple):
    """A mixture of experts in place of the MLP."""

    total: int  # E
    chosen: int  # of them, for each row
    normalised: bool  # the weights of the chosen ones add up to 1
    stored: tuple[str, str, str, str]  # names of the tensors: block, gate, up, down


@dataclass(frozen=True)
class Geometry:
    """The shape of a base model. Hashable, so that it can be a static argument.

    V vocabulary, D model width, L layers, N query heads, K key/value heads, H head width, F width of the MLP or of an
    expert. `max_positions` is the context: `max_position_embeddings`, or what scaled RoPE reaches.
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
    layers: tuple[Kind, ...]
    tied: bool
    init_scale: float
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"  # or "gelu_tanh"
    qk_norm: str | None = None  # of queries and keys: "head" each head by itself, "width" all heads together
    norm_before: bool = True  # of what attention and MLP read
    norm_after: bool = False  # of what they add to the residual stream
    norm_offset: float = 0.0  # added to the stored scale of a norm
    norm_wide: bool = False  # the scale is applied in float32, before the cast
    embed_scale: float = 1.0  # of input embeddings
    residual_scale: float = 1.0  # of what attention and MLP add
    score_scale: float | None = None  # of query-key products; None for 1/sqrt(H)
    score_cap: float | None = None  # c: scores become c tanh(score / c)
    logit_divisor: float = 1.0
    logit_cap: float | None = None
    fused: bool = False  # q, k and v are stored as one matrix, gate and up as another
    experts: Experts | None = None
    int8: bool = False  # projections and base head are held as whole numbers with a scale for each output channel

    @property
    def kinds(self) -> tuple[list[Kind], list[int]]:
        """The kinds of layer that occur, and which of them each layer is."""
        kinds = list(dict.fromkeys(self.layers))
        return kinds, [kinds.index(kind) for kind in self.layers]

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The sliding window of every layer."""
        return tuple(kind.window for kind in self.layers)

    @property
    def own_head(self) -> bool:
        """Whether the base head has a table beside that of the input embeddings."""
        return not self.tied or self.int8

    @property
    def plain(self) -> bool:
        """Whether layers are those of Llama, Mistral and Qwen: all that the engine for CPUs knows."""
        ropes = {kind.rope for kind in self.layers}
        usual = Geometry(
            **{name: getattr(self, name) for name in _SIZES}, qkv_bias=self.qkv_bias, o_bias=self.o_bias,
            mlp_bias=self.mlp_bias, qk_norm="head" if self.qk_norm else None, int8=self.int8,
        )  # fmt: skip
        return self == usual and len(ropes) == 1 and all(rope and 2 * len(rope.inv_freq) == self.H for rope in ropes)

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
        text = text_config(config)
        name = str(text.get("model_type"))
        if name not in FAMILIES:
            names = ", ".join(map(str, config.get("architectures") or ["no name given"]))
            raise UserError(
                f"{where}: the architecture {config.get('model_type')!r} ({names}) "
                f"is not supported; the supported model_type values are {', '.join((*FAMILIES, *TEXT_PARTS))}."
            )
        if quantised := config.get("quantization_config") or text.get("quantization_config"):
            method = quantised.get("quant_method", "unknown method") if isinstance(quantised, dict) else quantised
            raise UserError(
                f"{where}: the checkpoint is quantised ({method}); use the float32, bfloat16 or float16 checkpoint "
                "it was made from, which model.weights: int8 (--weights int8) quantises while it is loaded, or "
                "dequantise it with transformers and save it again."
            )
        family = FAMILIES[name]
        said = {family.other_names.get(key, key): value for key, value in text.items()}
        read = Reader({**family.absent, **said}, where)
        D, L, N = read.size("hidden_size"), read.size("num_hidden_layers"), read.size("num_attention_heads")
        K = read.size("num_key_value_heads", default=N)
        H = read.size("head_dim", default=D // N if N else 0)
        positions = read.size("max_position_embeddings")
        V, F = read.size("vocab_size"), read.size("intermediate_size")
        if K and N % K:
            read.fault(f"num_attention_heads={N} is not a multiple of num_key_value_heads={K}.")
        if H % 2:
            read.fault(f"head_dim={H} is odd; rotary embeddings need an even width.")
        activation = read.config.get(family.activation, "silu")
        if activation not in _ACTIVATIONS:
            read.fault(f"{family.activation}={activation!r} is not supported, only {', '.join(_ACTIVATIONS)}.")
        if read.config.get("use_bidirectional_attention"):
            read.fault("use_bidirectional_attention is not supported: a row would see those behind it.")
        fields = {**family.fixed, "activation": _ACTIVATIONS.get(activation, "silu")}
        fields |= {field: bool(read.config.get(key, False)) for field, key in family.switches.items()}
        fields |= {field: read.factor(key) for field, key in family.factors.items()}
        if fields.get("embed_scale") == "sqrt(D)":
            fields["embed_scale"] = math.sqrt(D)
        if "query_pre_attn_scalar" in read.config:
            fields["score_scale"] = _query_scale(read, said)
        if "experts" in fields:
            fields["experts"], F = _experts(read, fields["experts"])
        windows, ropes = family.windows(read, L), family.ropes(read, H, positions, L)
        if read.faults:
            raise UserError(*dict.fromkeys(read.faults))
        return cls(
            family=name,
            V=V,
            D=D,
            L=L,
            N=N,
            K=K,
            H=H,
            F=F,
            max_positions=min((rope.context for rope in ropes if rope), default=positions),
            norm_epsilon=read.number("rms_norm_eps", 1e-6),
            layers=tuple(map(Kind, windows, ropes)),
            tied=bool(read.config.get("tie_word_embeddings", False)),
            init_scale=read.number("initializer_range", 0.02),
            **{field: value for field, value in fields.items() if value is not None},
        )


_SIZES = ("family", "V", "D", "L", "N", "K", "H", "F", "max_positions", "norm_epsilon", "layers", "tied", "init_scale")


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config, or of a checkpoint of several modalities that of its text part."""
    if config.get("model_type") not in TEXT_PARTS:
        return config
    text = dict(config.get("text_config") or {})
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", True))
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None}
    return {**text, **ids, "model_type": TEXT_PARTS[config["model_type"]], "tie_word_embeddings": tied}


def _query_scale(read: Reader, said: dict[str, Any]) -> float | None:
    # The scale belongs to a width: with the one of absent keys beside it, a wrong one would go unseen.
    if "query_pre_attn_scalar" in said and "head_dim" not in said:
        read.fault("query_pre_attn_scalar is set, but not head_dim; state the width of a head beside it.")
    scalar = read.factor("query_pre_attn_scalar")
    return None if scalar is None else scalar**-0.5


def _experts(read: Reader, keys: ExpertKeys) -> tuple[Experts, int]:
    """The experts and their width."""
    E, chosen = read.size(keys.total), read.size("num_experts_per_tok")
    if chosen > E:
        read.fault(f"num_experts_per_tok={chosen} is more than {keys.total}={E}.")
    if read.config.get("mlp_only_layers") or read.config.get("decoder_sparse_step", 1) != 1:
        read.fault("mlp_only_layers and decoder_sparse_step are not supported: every layer must have experts.")
    normalised = keys.normalised is None or bool(read.config.get(keys.normalised, False))
    return Experts(E, chosen, normalised, keys.stored), read.size(keys.width)
