"""`generate` for a model with a multi-token prediction adapter: several tokens per step, the model's own output.

A step runs the model over real rows (the newest token and the drafts behind it) and mask rows, which predict what
follows. Only mask rows go through the adapter's LoRA, so real rows compute exactly what the model computes, and verify
the drafts: greedy output is the model's own, token for token; sampled output has the model's own distribution (arXiv
2507.11851).

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    model.generate(ids, max_new_tokens=64)
    base.generate(ids, max_new_tokens=64, custom_generate=FOLDER, trust_remote_code=True, adapter=FOLDER)

The model's modules are called, never changed. `plan` says how a step drafts: none, linear:M, quadratic:M, or
blocks:M0,M1,... (masks behind each real row). By default it is quadratic with as many rows as are cheap on the device.
"""

import json
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.utils import cached_file

CONFIG, TENSORS, FORMAT = "mtp_config.json", "adapter.safetensors", 1
FAMILIES = {"llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma2", "gemma3_text", "gemma3"}
FAMILIES |= {"olmo2", "phi3", "smollm3", "granite"}
WITHOUT_WINDOWS = ("llama", "olmo2", "granite")  # whatever their config says
GROUPS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))  # projections that read one input
# Rows of a step, over the batch, that the default plan uses: a row costs time on a CPU, and hardly any on a GPU.
CPU_ROWS, GPU_ROWS = 4, 64
HEAD_ROWS = 8  # on CPU: with more mask rows than this, the head runs over a single block
PREFILL_ROWS = 512  # rows of a prompt that run at a time
SPARE_SLOTS = 256  # the cache grows in steps of at least this size

# Settings of a GenerationConfig that are implemented, and those that change no output. Any other must be neutral.
SUPPORTED = {"max_length", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "eos_token_id"}
SUPPORTED |= {"repetition_penalty", "no_repeat_ngram_size", "min_new_tokens", "min_length", "suppress_tokens"}
SUPPORTED |= {"pad_token_id", "bos_token_id", "decoder_start_token_id", "return_dict_in_generate"}
INERT = {"use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "low_memory"}
INERT |= {"transformers_version", "compile_config", "disable_compile", "continuous_batching_config", "is_assistant"}
INERT |= {"renormalize_logits", "remove_invalid_values", "early_stopping", "length_penalty", "diversity_penalty"}
INERT |= {"num_beam_groups", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"}
INERT |= {"assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight"}
INERT |= {"prompt_lookup_num_tokens", "max_matching_ngram_size", "speculation_type", "use_mtp"}
# A float32 model on CPU gets a copy of up to so many bytes of weights, in a layout that is faster for few rows.
PACKED_BYTES = 2 << 30
_adapters = weakref.WeakKeyDictionary()  # by model, so that each is read once
_packed = weakref.WeakKeyDictionary()  # weights in that layout, by model


@dataclass
class MultiTokenOutput(GenerateDecoderOnlyOutput):
    """What `return_dict_in_generate=True` returns."""

    steps: torch.LongTensor | None = None  # [B], decoding steps; prefill, which gives the first token, is none
    accepted: torch.LongTensor | None = None  # [B, drafts + 1], how many steps emitted 0, 1, ... drafts
    new_tokens: torch.LongTensor | None = None  # [B], a stop id included
    plan: str | None = None


@torch.no_grad()
def generate(
    inputs=None,
    generation_config=None,
    logits_processor=None,
    stopping_criteria=None,
    prefix_allowed_tokens_fn=None,
    synced_gpus=None,
    assistant_model=None,
    streamer=None,
    negative_prompt_ids=None,
    negative_prompt_attention_mask=None,
    custom_generate=None,
    *,
    model,
    adapter=None,
    plan=None,
    shortlist=256,
    pack=True,
    **kwargs,
):
    """Continue token ids [B, T] as `model.generate` does; returns the same, prompt included.

    Args:
        adapter: folder or hub name of the adapter; by default that of the model.
        plan: how a step drafts and verifies.
        shortlist: candidates of a draft that the sampler head scores; None for the whole vocabulary.
        pack: on CPU in float32, keep a copy of the weights (up to 2 GiB) that is faster for few rows.
    Raises:
        ValueError: an argument that is not implemented here, and would otherwise be ignored.
    """
    trust = kwargs.pop("trust_remote_code", None)
    if custom_generate is not None:  # another custom generate, asked for by name
        return type(model).generate(
            model, inputs, generation_config, custom_generate=custom_generate, trust_remote_code=trust,
            logits_processor=logits_processor, stopping_criteria=stopping_criteria, streamer=streamer,
            **({} if adapter is None else {"adapter": adapter}), **({} if plan is None else {"plan": plan}), **kwargs,
        )  # fmt: skip
    config, rest = model._prepare_generation_config(generation_config, **kwargs)
    _refuse(
        config, logits_processor=logits_processor, stopping_criteria=stopping_criteria, synced_gpus=synced_gpus,
        prefix_allowed_tokens_fn=prefix_allowed_tokens_fn, assistant_model=assistant_model,
        negative_prompt_ids=negative_prompt_ids, negative_prompt_attention_mask=negative_prompt_attention_mask,
        **{name: value for name, value in rest.items() if name not in ("input_ids", "attention_mask", "tokenizer")},
    )  # fmt: skip
    ids, prompts = _prompts(model, config, inputs, rest.get("input_ids"), rest.get("attention_mask"))
    if streamer is not None and len(prompts) > 1:
        raise ValueError("a streamer takes one text: give a batch of one.")
    default_length = kwargs.get("max_length") is None and model.generation_config.max_length is None
    default_length &= generation_config is None or generation_config.max_length is None
    if config.max_new_tokens is not None:
        room = config.max_new_tokens
    else:  # max_length counts the padded prompt; transformers' default counts new tokens
        room = config.max_length if default_length else config.max_length - ids.shape[1]
        room = min(room, _config(model).max_position_embeddings - ids.shape[1]) if default_length else room
    if room < 1:
        raise ValueError(f"max_length leaves no room for a new token behind a prompt of {ids.shape[1]}.")
    found = _load_adapter(model, adapter)
    chosen = Plan.parse(plan, found.config["masks"], len(prompts), model.device.type)
    sampling = Sampling(config) if config.do_sample else None
    stops = [] if config.eos_token_id is None else torch.as_tensor(config.eos_token_id).view(-1).tolist()
    if streamer is not None:
        streamer.put(ids.cpu())
    with torch.inference_mode():
        rows = Rows(model, found, pack)
        process = [_processors(config, len(prompt), stops, model.device) for prompt in prompts]
        decoding = Decoding(rows, chosen, shortlist, sampling, process)
        new, steps, accepted = decoding(prompts, room, set(stops), streamer)
    if streamer is not None:
        streamer.end()

    width = max(len(row) for row in new)
    pad = config.pad_token_id if config.pad_token_id is not None else next(iter(stops), 0)
    tail = torch.tensor([row + [int(pad)] * (width - len(row)) for row in new], dtype=ids.dtype, device=ids.device)
    sequences = torch.cat([ids, tail], dim=1)
    if not config.return_dict_in_generate:
        return sequences
    lengths = torch.tensor([len(row) for row in new])
    return MultiTokenOutput(
        sequences=sequences, steps=torch.tensor(steps), accepted=torch.tensor(accepted), new_tokens=lengths,
        plan=str(chosen),
    )  # fmt: skip


def _refuse(config, **arguments):
    """Raise one error for everything that was asked for but is not implemented."""
    neutral = {**GenerationConfig().to_dict(), **getattr(config, "_get_default_generation_params", dict)()}
    known = vars(GenerationConfig())  # without entries that only the model knows
    values = {name: value for name, value in config.to_dict().items() if name in known and not name.startswith("_")}
    wrong = [
        f"{name}={value!r}"
        for name, value in values.items()
        if name not in SUPPORTED | INERT
        and not any(value is x or value == x for x in (None, False, neutral.get(name)))
        and not (name == "guidance_scale" and value == 1)
    ]
    wrong += [name for name, value in arguments.items() if not (value is None or value is False or value == [])]
    if wrong:
        raise ValueError(
            f"multi-token generation does not implement {', '.join(wrong)}. Leave it out, give its neutral "
            "value where the model's generation_config.json sets it, or load the model without trust_remote_code."
        )


def _processors(config, prompt_length, stops, device):
    """transformers' own processors of the logits behind a prompt, in its order."""
    found = LogitsProcessorList()
    if (config.repetition_penalty or 1.0) != 1.0:
        found.append(RepetitionPenaltyLogitsProcessor(float(config.repetition_penalty)))
    if config.no_repeat_ngram_size:
        found.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    if config.min_length and stops:
        found.append(MinLengthLogitsProcessor(config.min_length, stops, device=device))
    if config.min_new_tokens and stops:
        found.append(MinNewTokensLengthLogitsProcessor(prompt_length, config.min_new_tokens, stops, device=device))
    if config.suppress_tokens:
        found.append(SuppressTokensLogitsProcessor(config.suppress_tokens, device=device))
    return found


def _prompts(model, config, inputs, input_ids, attention_mask):
    """The padded prompts as given, and the ids of each without padding."""
    if inputs is not None and input_ids is not None:
        raise ValueError("give either inputs or input_ids.")
    ids = inputs if inputs is not None else input_ids
    if ids is None:
        if config.bos_token_id is None:
            raise ValueError("there is no prompt, and the model has no bos_token_id to begin with.")
        ids = torch.full((1, 1), int(config.bos_token_id), device=model.device)
    if ids.dim() != 2 or ids.is_floating_point():
        raise ValueError(f"input_ids should be token ids of shape [batch, tokens], not {tuple(ids.shape)} {ids.dtype}.")
    if attention_mask is None:  # as transformers infers it
        pad, stops = config.pad_token_id, config.eos_token_id
        ends = stops if isinstance(stops, list | tuple) else [stops]
        attention_mask = torch.ones_like(ids) if pad is None or pad in ends else ids != int(pad)
    if attention_mask.shape != ids.shape:
        raise ValueError(f"attention_mask {tuple(attention_mask.shape)} should have the shape {tuple(ids.shape)}.")
    keep = attention_mask.bool().tolist()
    prompts = [[t for t, here in zip(row, k, strict=True) if here] for row, k in zip(ids.tolist(), keep, strict=True)]
    if not prompts or not all(prompts):
        raise ValueError("a prompt is empty: each needs at least one token that is not padding.")
    return ids, prompts


# ---- the adapter


class Adapter:
    """Mask embeddings, LoRA and sampler head, on the devices and in the dtype of a model."""

    def __init__(self, config, tensors, model):
        self.config = config
        dtype = model.dtype
        first, last = model.get_input_embeddings().weight.device, model.get_output_embeddings().weight.device
        on = lambda name, kind=None: tensors[name].to(last, kind or dtype)  # noqa: E731
        self.noise = config.get("noise")  # mask rows hold random tokens in place of learned embeddings
        self.masks = None if self.noise else tensors["mtp.masks"].to(first, dtype)
        scale = config["alpha"] / config["rank"]
        self.layers = []
        for i, layer in enumerate(_layers(model)):
            device, groups = layer.self_attn.o_proj.weight.device, []
            for names in GROUPS:
                a, spans, b, at = [], [], [], 0
                for name in names:
                    if f"lora.layers.{name}.a" in tensors:
                        part = tensors[f"lora.layers.{name}.a"][i]
                        a.append(part)
                        spans.append(slice(at, at + part.shape[1]))
                        scaled = tensors[f"lora.layers.{name}.b"][i].float() * scale
                        b.append(scaled.to(device, dtype))
                        at += part.shape[1]
                    else:
                        spans.append(None)
                        b.append(None)
                groups.append((torch.cat(a, dim=1).to(device, dtype) if a else None, spans, b))
            self.layers.append(groups)
        self.sampler = None
        if config["sampler"] != "none":
            D = self.masks.shape[1]
            kernel = on("mtp.sampler.linear_0.kernel").T
            self.sampler = {
                "token": kernel[:, :D].contiguous(),
                "latent": kernel[:, D:].contiguous(),
                "second": on("mtp.sampler.linear_1.kernel").T.contiguous(),
                "biases": [on(f"mtp.sampler.linear_{i}.bias") for i in (0, 1)],
                # Norms are computed in float32.
                "norms": [
                    [on(f"mtp.sampler.norm_{i}.{kind}", torch.float32) for kind in ("scale", "bias")] for i in (0, 1)
                ],
            }
        self.vocabulary = None  # ids of the tokens that may be drafted; None for all
        if config.get("vocabulary") is not None:
            self.vocabulary = tensors["mtp.vocabulary"].to(last, torch.long)

    def read(self, latents):
        """The part of the sampler head's first layer that needs no token."""
        return F.linear(latents, self.sampler["latent"], self.sampler["biases"][0])

    def latent(self, embedding, z, read):
        """The latent to unembed: z corrected for the token chosen just before."""
        s = self.sampler
        h = self._norm(F.silu(F.linear(embedding.to(z.device, z.dtype), s["token"]) + read), 0)
        h = self._norm(F.silu(F.linear(h, s["second"], s["biases"][1])), 1)
        return z + h if self.config["sampler"] == "residual" else h

    def _norm(self, x, i):
        return F.layer_norm(x.float(), x.shape[-1:], *self.sampler["norms"][i], 1e-5).to(x.dtype)


def _load_adapter(model, name):
    if model.config.model_type not in FAMILIES:
        raise ValueError(f"{model.config.model_type!r} is not supported, only {', '.join(sorted(FAMILIES))}.")
    name = str(name if name is not None else model.name_or_path)
    files = {}
    for file in (CONFIG, TENSORS):
        try:
            files[file] = cached_file(name, file)
        except OSError as error:
            raise ValueError(
                f"{name or 'the model'} holds no {file}: name the exported folder with adapter=..."
            ) from error
    kept = (files[TENSORS], Path(files[TENSORS]).stat().st_mtime_ns, model.dtype, model.device)
    known = _adapters.get(model)
    if known is None or known[0] != kept:
        config = json.loads(Path(files[CONFIG]).read_text(encoding="utf-8"))
        if config.get("format") != FORMAT:
            raise ValueError(f"{files[CONFIG]}: format {config.get('format')!r} is not {FORMAT}.")
        if not config["gated"]:
            raise ValueError(f"{name}: was trained without gate and cannot decode losslessly.")
        tensors = load_file(files[TENSORS])
        _check_fits(name, tensors, model)
        known = _adapters[model] = (kept, Adapter(config, tensors, model))
    return known[1]


def _config(model):
    """The config of a model, or of its text part."""
    return model.config.get_text_config()


def _layers(model):
    return model.get_decoder().layers[: _config(model).num_hidden_layers]


def _check_fits(name, tensors, model):
    config = _config(model)
    L, width = config.num_hidden_layers, {"mtp.masks": (None, config.hidden_size)}
    for names, (linears, widths) in zip(GROUPS, _linears(model)[0][0], strict=True):
        for each, features in zip(names, widths, strict=False):
            width[f"lora.layers.{each}.a"] = (L, linears[0].in_features, None)
            width[f"lora.layers.{each}.b"] = (L, None, features)
    missing = {key.split(".")[2] for key in tensors if key.startswith("lora.") and key not in width}
    if missing:
        raise ValueError(f"{name} does not belong to this model, which has no {', '.join(sorted(missing))}.")
    for key, shape in width.items():
        if key in tensors and any(want not in (None, got) for want, got in zip(shape, tensors[key].shape, strict=True)):
            raise ValueError(f"{name} does not belong to this model: its {key} is {tuple(tensors[key].shape)}.")


# ---- plans


@dataclass(frozen=True)
class Plan:
    """Masks behind each real row of a step, and those of a block that floats behind the last valid draft."""

    masks: tuple
    floating: int = 0

    @classmethod
    def parse(cls, text, available, batch, device):
        """A plan from its name, or the default for a batch on a device."""
        if text is None:
            rows = (CPU_ROWS if device == "cpu" else GPU_ROWS) // batch
            M = max(m for m in range(1, available + 1) if m == 1 or (m + 1) ** 2 <= rows)
            return cls((M,) * (M + 1))
        kind, _, rest = str(text).partition(":")
        numbers = [int(part) for part in rest.split(",")] if rest.replace(",", "").isdigit() else []
        if text == "none":
            return cls((0,))
        made = None
        if kind == "linear" and len(numbers) == 1 and numbers[0] >= 1:
            made = cls((0,) * (numbers[0] + 1), numbers[0])
        elif kind == "quadratic" and len(numbers) == 1 and numbers[0] >= 1:
            made = cls((numbers[0],) * (numbers[0] + 1))
        elif kind == "blocks" and len(numbers) > 1 and numbers[0] > 0 and max(numbers) == len(numbers) - 1:
            made = cls(tuple(numbers))
        if made is None:
            raise ValueError(
                f"plan={text!r}: give none, linear:M, quadratic:M, or blocks:M0,M1,... with masks behind the first of "
                "its real rows, and one draft for each mask of its longest block."
            )
        if made.block > available:
            raise ValueError(f"plan={text!r} takes {made.block} masks, but the adapter has {available}.")
        return made

    @property
    def drafts(self):
        return len(self.masks) - 1

    @property
    def block(self):
        return max(*self.masks, self.floating)

    def __str__(self):
        if self.drafts == 0:
            return "none"
        if self.floating:
            return f"linear:{self.drafts}"
        if set(self.masks) == {self.drafts}:
            return f"quadratic:{self.drafts}"
        return f"blocks:{','.join(map(str, self.masks))}"


# ---- the model over real rows and mask rows


class Layout:
    """Positions of the rows of a call, relative to its first row, and which rows each of them sees."""

    def __init__(self, real, anchors, offsets, blocks, device):
        """`anchors` [b, Q] of mask rows, `offsets` [Q] within their block, `blocks` [Q]; b is 1 where all agree."""
        self.real, self.offsets = real, offsets
        rows = torch.arange(real, device=device).expand(len(anchors), real)
        self.positions = torch.cat([rows, anchors + offsets], dim=1)
        self.reach = torch.cat([rows, anchors], dim=1)  # the last real row that each sees
        seen = rows[:, None] <= self.reach[..., None]
        same = (blocks[:, None] == blocks) & (offsets[:, None] >= offsets)
        same = torch.cat([same.new_zeros(real, len(blocks)), same]).expand(len(anchors), -1, -1)
        self.own = torch.cat([seen, same], dim=2)

    def visible(self, starts, end, window):
        """[b, rows, slots]: a row sees the slots before the call, up to its reach, and rows of its own call."""
        slots = torch.arange(end, device=starts.device)
        relative = slots - starts[:, None]
        row = relative.clamp(0, self.own.shape[1] - 1)
        count = max(len(self.own), len(starts))
        own = self.own.expand(count, -1, -1)
        here = own.gather(2, row[:, None].expand(count, own.shape[1], -1))
        here = here & (relative < own.shape[1])[:, None]
        before = slots <= (starts[:, None] + self.reach)[..., None]
        seen = torch.where((relative < 0)[:, None], before, here)
        if window is not None:  # measured from a row's own position
            positions = starts[:, None] + self.positions
            at = torch.where(relative < 0, slots, positions.expand(count, -1).gather(1, row.expand(count, -1)))
            seen = seen & (positions[:, :, None] - at[:, None] < window)
        return seen


class Cache:
    """Keys and values [B, K, slots, H] of every layer. The rows of a call may overwrite those of the call before."""

    def __init__(self, layers, slots):
        self.held, self.slots = [None] * layers, slots

    def write(self, layer, k, v, starts, same):
        """Write rows [B, K, n, H] at each sequence's start; returns all slots up to the last of them."""
        n = k.shape[2]
        end = (starts[0] if same else max(starts)) + n
        if self.held[layer] is None or self.held[layer][0].shape[2] < end:
            slots = max(end, self.slots)
            grown = [x.new_zeros(*x.shape[:2], slots, x.shape[3]) for x in (k, v)]
            if self.held[layer] is not None:
                for new, old in zip(grown, self.held[layer], strict=True):
                    new[:, :, : old.shape[2]] = old
            self.held[layer] = grown
        for held, x in zip(self.held[layer], (k, v), strict=True):
            if same:
                held[:, :, starts[0] : end] = x
            else:
                at = torch.tensor(starts, device=x.device)[:, None] + torch.arange(n, device=x.device)
                held.transpose(1, 2)[torch.arange(len(x), device=x.device)[:, None], at] = x.transpose(1, 2)
        return [x[:, :, :end] for x in self.held[layer]]


class Rows:
    """The model's own modules, applied to real rows and mask rows together; only mask rows go through the LoRA."""

    def __init__(self, model, adapter, pack=False):
        self.adapter, self.config = adapter, _config(model)
        config = self.config
        self.inner = model.get_decoder()
        self.embed, self.head = model.get_input_embeddings(), model.get_output_embeddings()
        ids = adapter.vocabulary
        self.draft_table = self.head.weight if ids is None else self.head.weight[ids]
        self.projections, self.head_product = (_pack(model) if pack else None) or _products(model, Joined)
        self.layers = list(_layers(model))
        self.N, self.K = config.num_attention_heads, config.num_key_value_heads
        window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
        if config.model_type in WITHOUT_WINDOWS:
            window = None
        if config.model_type == "mistral":
            kinds = None
        self.windows = [
            window if kinds is None or kinds[i] == "sliding_attention" else None for i in range(len(self.layers))
        ]
        # Which rotation each layer has, by its kind where kinds differ, and None for none.
        by_kind = kinds is not None and hasattr(self.inner.rotary_emb, f"{kinds[0]}_inv_freq")
        self.kinds = [(kinds[i] if by_kind else "") for i in range(len(self.layers))]
        self.kinds = [
            kind if getattr(layer.self_attn, "use_rope", True) else None
            for kind, layer in zip(self.kinds, self.layers, strict=True)
        ]
        self.rotations = {
            kind: Rotation(self.inner.rotary_emb, config, kind) for kind in set(self.kinds) if kind is not None
        }
        self.embed_scale = getattr(self.inner, "embedding_multiplier", 1.0)
        self.divisor = getattr(config, "logits_scaling", 1.0)
        self.logit_cap = getattr(config, "final_logit_softcapping", None)

    def __call__(self, tokens, layout, starts, cache, lengths=None):
        """Latents [B, R, D] of real rows and [B, Q, D] of mask rows, of calls that begin at positions `starts`.

        `lengths` [B] are those of prompts, whose tokens are computed at once: dynamic RoPE counts them.
        """
        B, R = tokens.shape
        n = layout.positions.shape[1]
        x = self.embedding(tokens).flatten(0, 1)
        if n > R:
            x = torch.cat([x, self._mask_embeddings(layout.offsets, B)])
        same = len(set(starts)) == 1
        begins = torch.tensor(starts, device=tokens.device)
        positions = begins[:, None] + layout.positions
        counts = positions + 1 if lengths is None else torch.maximum(positions + 1, lengths[:, None])
        positions, counts = self._flat(positions[..., None], R), self._flat(counts[..., None], R)
        turns = {kind: rotation(positions, counts, x.dtype) for kind, rotation in self.rotations.items()}
        masks = {}
        for window in set(self.windows):
            seen = layout.visible(begins[:1] if same else begins, max(starts) + n, window)
            added = torch.zeros_like(seen, dtype=x.dtype).masked_fill_(~seen, float("-inf"))
            masks[window] = added[:, None].repeat(1, 1, self.N // self.K, 1)
        real = B * R
        for i, layer in enumerate(self.layers):
            qkv, out, mlp_in, mlp_out = self.adapter.layers[i]
            qkv_proj, o_proj, gate_up, down = self.projections[i]
            part = layer.self_attn
            device = part.o_proj.weight.device
            if x.device != device or masks[self.windows[i]].device != device:  # a model spread over several devices
                x = x.to(device)
                turns = {kind: (cos.to(device), sin.to(device)) for kind, (cos, sin) in turns.items()}
                masks = {window: mask.to(device) for window, mask in masks.items()}
            norms = Norms(layer)
            h = norms.before_attention(x)
            q, k, v = _project(qkv_proj, qkv, h, real)
            whole = hasattr(part, "q_norm") and part.q_norm.weight.numel() != part.head_dim  # a norm over all heads
            if whole:
                q, k = part.q_norm(q), part.k_norm(k)
            q, k, v = (y.reshape(len(y), -1, part.head_dim) for y in (q, k, v))
            if hasattr(part, "q_norm") and not whole:
                q, k = part.q_norm(q), part.k_norm(k)
            if self.kinds[i] is not None:
                q, k = _rotate(q, *turns[self.kinds[i]]), _rotate(k, *turns[self.kinds[i]])
            q, k, v = (self._apart(y, B, R) for y in (q, k, v))
            k, v = cache.write(i, k.transpose(1, 2), v.transpose(1, 2), starts, same)
            # Query heads that share a key head are stacked as further rows.
            q = q.view(B, n, self.K, -1, q.shape[-1]).permute(0, 2, 3, 1, 4).flatten(2, 3)
            h = _attend(q, k, v, masks[self.windows[i]], part.scaling, getattr(part, "attn_logit_softcapping", None))
            h = h.unflatten(2, (-1, n)).permute(0, 3, 1, 2, 4).reshape(B, n, -1)
            (h,) = _project(o_proj, out, self._flat(h, R), real)
            scale = getattr(layer, "residual_multiplier", 1.0)
            x = x + norms.after_attention(h) * scale
            h = norms.before_mlp(x)
            if hasattr(layer.mlp, "experts"):
                h = layer.mlp(h[None])[0]
            else:
                gate, up = _project(gate_up, mlp_in, h, real)
                act = layer.mlp.act_fn if hasattr(layer.mlp, "act_fn") else layer.mlp.activation_fn
                (h,) = _project(down, mlp_out, act(gate) * up, real)
            x = x + norms.after_mlp(h) * scale
        x = self.inner.norm(x)
        return x[:real].view(B, R, x.shape[1]), x[real:].view(B, n - R, x.shape[1])

    def _mask_embeddings(self, offsets, B):
        """What mask rows hold, [B * Q, D]: learned embeddings, or those of tokens drawn anew."""
        if self.adapter.noise is None:
            return self.adapter.masks[(offsets - 1).to(self.adapter.masks.device)].repeat(B, 1)
        return self.embedding(torch.randint(self.adapter.noise["low"], self.adapter.noise["high"], (B * len(offsets),)))

    def embedding(self, tokens):
        """Input embeddings, on the device of the table."""
        return self.embed(tokens.to(self.embed.weight.device)) * self.embed_scale

    def logits(self, latents):
        """The base head, float32."""
        return self.as_logits(self.head_product(latents)[0])

    def as_logits(self, products):
        """Products of latents and rows of the head's table as the model's logits."""
        logits = products.float() / self.divisor
        return logits if self.logit_cap is None else self.logit_cap * torch.tanh(logits / self.logit_cap)

    def draft_logits(self, latents):
        """The base head over the tokens that may be drafted, float32."""
        if self.adapter.vocabulary is None:
            return self.logits(latents)
        return self.as_logits(F.linear(latents, self.draft_table))

    def _flat(self, x, R):
        """[B, n, ...] as rows: real rows of all sequences, then mask rows."""
        return x[0] if len(x) == 1 else torch.cat([x[:, :R].flatten(0, 1), x[:, R:].flatten(0, 1)])

    def _apart(self, x, B, R):
        """Rows as [B, n, ...] again."""
        if B == 1:
            return x[None]
        return torch.cat([x[: B * R].unflatten(0, (B, R)), x[B * R :].unflatten(0, (B, len(x) // B - R))], dim=1)


class Norms:
    """The norms of a layer, by where they stand: families have them before, after, or on both sides of a part."""

    def __init__(self, layer):
        same, after = torch.nn.Identity(), hasattr(layer, "post_feedforward_layernorm")
        self.before_attention = getattr(layer, "input_layernorm", same)
        self.after_attention = layer.post_attention_layernorm if after else same
        self.before_mlp = getattr(layer, "pre_feedforward_layernorm", same if after else layer.post_attention_layernorm)
        self.after_mlp = layer.post_feedforward_layernorm if after else same


class Rotation:
    """Cosine and sine of the layers of one kind.

    The rotary module itself is not called: frequencies that follow the length would follow drafts and masks too.
    """

    def __init__(self, rope, config, kind):
        of = f"{kind}_" if kind else ""
        self.said = config.rope_parameters[kind] if kind else config.rope_parameters
        self.type = self.said.get("rope_type", "default")
        follows = self.type in ("dynamic", "longrope")
        self.frequencies = getattr(rope, f"{of}original_inv_freq" if follows else f"{of}inv_freq")
        self.scale = getattr(rope, f"{of}attention_scaling")
        self.unchanged = config.max_position_embeddings
        if self.type == "longrope":
            self.unchanged = self.said["original_max_position_embeddings"]

    def __call__(self, positions, counts, dtype):
        """For rows at `positions` [rows, 1] that stand in so many tokens each."""
        plain = self.frequencies.to(counts.device, torch.float32)
        H = 2 * len(plain)
        steps = torch.arange(0, H, 2, device=counts.device) / H
        if self.type == "dynamic":
            theta, factor = self.said["rope_theta"], self.said["factor"]
            base = theta * (factor * counts / self.unchanged - (factor - 1)) ** (H / (H - 2))
            plain = torch.where(counts > self.unchanged, 1 / base**steps, plain)
        elif self.type == "longrope":
            longer = torch.tensor(self.said["long_factor"], dtype=torch.float32, device=counts.device)
            plain = torch.where(counts > self.unchanged, 1 / (longer * self.said["rope_theta"] ** steps), plain)
        angles = positions.float() * plain
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        return (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)


def _attend(q, k, v, mask, scale, cap):
    if cap is None:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    scores = cap * torch.tanh(q @ k.transpose(-1, -2) * scale / cap) + mask
    return scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype) @ v


class Joined:
    """The model's linear layers that read one input, unchanged."""

    def __init__(self, linears, widths):
        self.linears, self.widths = linears, widths

    def __call__(self, x):
        outputs = [linear(x) for linear in self.linears]
        return outputs if len(outputs) == len(self.widths) else outputs[0].split(self.widths, dim=-1)


class Packed:
    """The same from a copy of their weights, laid out so that oneDNN reads them once for several rows."""

    def __init__(self, linears, widths):
        weight = torch.cat([linear.weight.detach() for linear in linears])
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, CPU_ROWS)
        self.widths = widths
        biases = [torch.zeros(x.out_features) if x.bias is None else x.bias.detach() for x in linears]
        self.bias = None if all(linear.bias is None for linear in linears) else torch.cat(biases)

    def __call__(self, x):
        y = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y.split(self.widths, dim=-1)


def _linears(model):
    """Linear projections by layer and group, each group with the widths of what it gives, and the head.

    A group may be stored as one projection; experts are none.
    """
    config, layers = _config(model), []
    for layer in _layers(model):
        part, mlp, groups = layer.self_attn, layer.mlp, []
        heads, kv = config.num_attention_heads * part.head_dim, config.num_key_value_heads * part.head_dim
        if hasattr(part, "qkv_proj"):
            groups.append(([part.qkv_proj], [heads, kv, kv]))
        else:
            groups.append(([part.q_proj, part.k_proj, part.v_proj], [heads, kv, kv]))
        groups.append(([part.o_proj], [part.o_proj.out_features]))
        if hasattr(mlp, "experts"):
            groups += [([], []), ([], [])]
        elif hasattr(mlp, "gate_up_proj"):
            groups += [([mlp.gate_up_proj], [mlp.gate_up_proj.out_features // 2] * 2)]
        else:
            groups += [([mlp.gate_proj, mlp.up_proj], [mlp.gate_proj.out_features, mlp.up_proj.out_features])]
        if not hasattr(mlp, "experts"):
            groups.append(([mlp.down_proj], [mlp.down_proj.out_features]))
        layers.append(groups)
    return layers, model.get_output_embeddings()


def _products(model, kind):
    layers, head = _linears(model)
    made = [[kind(*group) if group[0] else None for group in groups] for groups in layers]
    return made, kind([head], [head.out_features])


def _pack(model):
    """The products of a model in the faster layout; None where it cannot be used."""
    layers, head = _linears(model)
    every = [linear for groups in layers for linears, _ in groups for linear in linears] + [head]
    plain = all(type(linear) is torch.nn.Linear and not linear._forward_hooks for linear in every)
    if not plain or any(linear.weight.device.type != "cpu" or linear.weight.dtype != torch.float32 for linear in every):
        return None
    if not torch.backends.mkldnn.is_available() or sum(x.weight.nbytes for x in every) > PACKED_BYTES:
        return None
    # Weights may have changed since: versions reveal changes in place, samples those that versions miss.
    tensors = [x for linear in every for x in (linear.weight, linear.bias) if x is not None]
    versions = [(x.data_ptr(), 0 if x.is_inference() else x._version) for x in tensors]
    samples = torch.cat([x.detach().flatten()[:: max(1, x.numel() // 64)] for x in tensors])
    known = _packed.get(model)
    if known is None or known[0] != versions or not torch.equal(known[1], samples):
        try:
            known = _packed[model] = (versions, samples, _products(model, Packed))
        except (AttributeError, RuntimeError):  # a PyTorch without these operations
            return None
    return known[2]


def _project(linears, adapted, x, real):
    """y = W x, and for the rows behind the first `real` ones + (alpha/R) B (A x)."""
    outputs = linears(x)
    a, spans, b = adapted
    if a is not None and len(x) > real:
        inner = x[real:] @ a
        for y, span, each in zip(outputs, spans, b, strict=True):
            if each is not None:
                y[real:].addmm_(inner[:, span], each)
    return outputs


def _rotate(x, cos, sin):
    """Rotates the first part of each head, as wide as the angles, and keeps the rest."""
    x, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    half = x.shape[-1] // 2
    turned = x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin
    return turned if not rest.shape[-1] else torch.cat([turned, rest], dim=-1)


# ---- sampling


class Sampling:
    """Temperature, top-k and top-p, in transformers' order; lossless by speculative rejection."""

    def __init__(self, config):
        self.temperature = 1.0 if config.temperature is None else float(config.temperature)
        self.top_k, self.top_p = config.top_k or None, 1.0 if config.top_p is None else float(config.top_p)
        if not self.temperature > 0 or not 0 < self.top_p <= 1 or (self.top_k is not None and self.top_k < 1):
            raise ValueError("temperature should be above 0, top_p above 0 and at most 1, and top_k at least 1.")

    def distribution(self, logits):
        """Tempered and truncated probabilities."""
        logits = logits.float()  # differences from the best one: temperatures near 0 must not make all infinite
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(self.temperature, torch.finfo(torch.float32).tiny)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[..., -1:], float("-inf"))
        if self.top_p < 1:
            ordered = logits.sort(dim=-1, descending=True).values
            share = ordered.softmax(dim=-1)
            kept = share.cumsum(dim=-1) - share < self.top_p
            lowest = ordered.masked_fill(~kept, float("inf")).amin(dim=-1, keepdim=True)
            logits = logits.masked_fill(logits < lowest, float("-inf"))
        return logits.softmax(dim=-1)

    def verify(self, p, drafts, valid, ids, q):
        """How many drafts are accepted, and the token behind them.

        A draft that was drawn from q is accepted with probability min(1, p/q); the first one rejected is replaced by a
        draw from (p - q)+.
        """
        d = drafts.shape[1]
        if d == 0:
            return valid, draw(p[:, 0])
        here = p[:, :d].gather(2, drafts[..., None])[..., 0]
        there = (q * (ids == drafts[..., None])).sum(dim=-1)
        accepted = prefix((torch.rand_like(there) * there < here) & (torch.arange(d, device=p.device) < valid[:, None]))
        row = torch.arange(len(p), device=p.device)
        left, at = p[row, accepted], accepted.clamp(max=d - 1)
        rejected = residual(left, ids[row, at], q[row, at])
        return accepted, draw(torch.where((accepted < valid)[:, None], rejected, left))


def prefix(right):
    """How many drafts are right before the first that is not."""
    return right.long().cumprod(dim=1).sum(dim=1)


def residual(p, ids, q):
    """(p - q)+, not normalised; p itself where it is zero, which takes p and q equal up to rounding."""
    left = p.scatter_add(1, ids, -q).clamp(min=0)
    return torch.where(left.sum(dim=1, keepdim=True) > 0, left, p)


def draw(probabilities):
    """One token for each row."""
    return torch.multinomial(probabilities, 1)[:, 0]


# ---- the loop


class Decoding:
    """Prefill, then steps that verify the drafts of the step before and draft anew."""

    def __init__(self, rows, plan, shortlist, sampling, process):
        self.rows, self.adapter, self.plan, self.sampling = rows, rows.adapter, plan, sampling
        self.process = process  # of the logits of each sequence
        self.device = rows.head.weight.device
        self.shortlist = None if shortlist is None else min(shortlist, len(rows.draft_table))
        self.one_head = self.device.type != "cpu" or sum(plan.masks) + plan.floating <= HEAD_ROWS
        self.one_head &= self.adapter.vocabulary is None  # else mask rows have a smaller head
        self.sizes = torch.tensor(plan.masks, device=self.device)
        self.layout = None if plan.floating else self._step_layout(None)

    def __call__(self, prompts, room, stops, streamer):
        """New tokens of each prompt, its steps, and how many of them emitted 0, 1, ... drafts."""
        B, d = len(prompts), self.plan.drafts
        longest = max(map(len, prompts)) + room
        new, steps, histogram = [[] for _ in prompts], [0] * B, [[0] * (d + 1) for _ in prompts]
        going = [True] * B

        def emit(runs):
            for b, run in enumerate(runs):
                if not going[b]:
                    continue
                run = run[: room - len(new[b])]
                run = run[: next((i + 1 for i, token in enumerate(run) if token in stops), len(run))]
                if new[b]:
                    steps[b] += 1
                    histogram[b][len(run) - 1] += 1
                new[b] += run
                going[b] = len(new[b]) < room and run[-1] not in stops
                if streamer is not None:
                    for token in run:
                        streamer.put(torch.tensor([token]))

        token, drafts, proposal, cache = self.prefill(prompts, min(longest, max(map(len, prompts)) + SPARE_SLOTS))
        emit([[t] for t in token.tolist()])
        valid = torch.full((B,), d, device=self.device)
        while any(going):
            starts = [len(prompt) + len(row) - 1 for prompt, row in zip(prompts, new, strict=True)]
            cache.slots = max(cache.slots, max(starts) + SPARE_SLOTS)
            contexts = [prompt + row for prompt, row in zip(prompts, new, strict=True)]
            run, accepted, valid, drafts, proposal = self.step(token, drafts, valid, proposal, starts, contexts, cache)
            token = run.gather(1, accepted[:, None])[:, 0]
            emit([row[: row[-1] + 1] for row in torch.cat([run, accepted[:, None]], dim=1).tolist()])
        return new, steps, histogram

    def prefill(self, prompts, slots):
        """The first token of each prompt, the drafts behind it and their distributions, and the cache."""
        B, M, P = len(prompts), self.plan.block, max(map(len, prompts))
        tokens = torch.tensor([prompt + [0] * (P - len(prompt)) for prompt in prompts], device=self.device)
        ends = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.device)
        cache = Cache(len(self.rows.layers), slots + (M + 1) ** 2)
        last = block = None
        for start in range(0, P, PREFILL_ROWS):
            part = tokens[:, start : start + PREFILL_ROWS]
            count = M if start + PREFILL_ROWS >= P else 0  # masks run when all keys of every prompt are there
            offsets = torch.arange(1, count + 1, device=self.device)
            anchors = (ends - start)[:, None].expand(B, count)
            layout = Layout(part.shape[1], anchors, offsets, torch.zeros_like(offsets), self.device)
            latents, block = self.rows(part, layout, [start] * B, cache, ends + 1)
            at = ends - start
            here = latents[torch.arange(B, device=latents.device), at.clamp(0, part.shape[1] - 1)]
            last = here if last is None else torch.where((at >= 0)[:, None], here, last)
        scores = self._processed(self.rows.logits(last)[:, None], prompts, tokens[:, :0])[:, 0]
        token = scores.argmax(dim=-1) if self.sampling is None else draw(self.sampling.distribution(scores))
        return token, *(self.draft(block, None, token) if M else (tokens[:, :0], None)), cache

    def _processed(self, scores, contexts, drafts):
        """Logits [B, R, V] as the settings change them; row r of a sequence stands behind its context and r drafts."""
        if not any(self.process):
            return scores
        scores, drafts = scores.float().clone(), drafts.tolist()
        for b, context in enumerate(contexts):
            for r in range(scores.shape[1]):
                ids = torch.tensor([context + drafts[b][:r]], device=scores.device)
                scores[b, r] = self.process[b](ids, scores[b, r][None].clone())[0]
        return scores

    def step(self, token, drafts, valid, proposal, starts, contexts, cache):
        """The emitted run [B, d+1], how many drafts of it are accepted, and the next drafts."""
        B, d = drafts.shape
        layout = self.layout or self._step_layout(valid)
        real, masks = self.rows(torch.cat([token[:, None], drafts], dim=1), layout, starts, cache)
        mask_scores = None
        if self.one_head and masks.shape[1]:
            scores, mask_scores = self.rows.logits(torch.cat([real, masks], dim=1)).split(
                [d + 1, masks.shape[1]], dim=1
            )
        else:
            scores = self.rows.logits(real)
        scores = self._processed(scores, contexts, drafts)
        if self.sampling is None:
            choice = scores.argmax(dim=-1)
            right = (drafts == choice[:, :d]) & (torch.arange(d, device=self.device) < valid[:, None])
            accepted = prefix(right)
            after = choice.gather(1, accepted[:, None])
        else:
            accepted, after = self.sampling.verify(
                self.sampling.distribution(scores), drafts, valid, *(proposal or (None, None))
            )
            after = after[:, None]
        run = torch.cat([drafts, after], dim=1).scatter(1, accepted[:, None], after)
        if not self.plan.block:
            return run, accepted, valid, drafts, None
        if self.plan.floating:
            valid = torch.where(accepted == valid, self.plan.floating, 0)
        else:  # the block behind the last accepted row
            begins = (self.sizes.cumsum(0) - self.sizes)[accepted]
            at = begins[:, None] + torch.arange(self.plan.block, device=self.device)
            at, row = at.clamp(max=masks.shape[1] - 1), torch.arange(B, device=self.device)[:, None]
            masks, mask_scores = masks[row, at], None if mask_scores is None else mask_scores[row, at]
            valid = self.sizes[accepted]
        return run, accepted, valid, *self.draft(masks, mask_scores, after[:, 0])

    def draft(self, latents, scores, first):
        """Drafts [B, M] of a block behind the token `first`, and their distributions where they are sampled."""
        (B, M, _), vocabulary, table = latents.shape, self.adapter.vocabulary, self.rows.draft_table
        sampled = self.adapter.sampler
        short = sampled is not None and self.shortlist not in (None, len(table))
        if scores is None and (sampled is None or short):
            scores = self.rows.draft_logits(latents)
        ids = None if vocabulary is None else vocabulary.expand(B, M, -1)
        if short:
            at = scores.topk(self.shortlist).indices
            ids = at if vocabulary is None else vocabulary[at]
            table = table[at].to(latents.dtype)
        read = None if sampled is None else self.adapter.read(latents)
        drafts, probabilities, previous = [], [], first
        for j in range(M):
            if sampled is None:
                logits = scores[:, j]
            else:
                z = self.adapter.latent(self.rows.embedding(previous), latents[:, j], read[:, j])
                if short:
                    logits = self.rows.as_logits((table[:, j] @ z[..., None])[..., 0])
                else:
                    logits = self.rows.draft_logits(z)
            if self.sampling is None:
                chosen = logits.argmax(dim=-1)
            else:
                q = self.sampling.distribution(logits)
                chosen = draw(q)
                probabilities.append(q)
            previous = chosen if ids is None else ids[:, j].gather(1, chosen[:, None])[:, 0]
            drafts.append(previous)
        drafts = torch.stack(drafts, dim=1)
        if self.sampling is None:
            return drafts, None
        every = ids if ids is not None else torch.arange(q.shape[-1], device=q.device).expand(*drafts.shape, -1)
        return drafts, (every, torch.stack(probabilities, dim=1))

    def _step_layout(self, valid):
        behind = [row for row, count in enumerate(self.plan.masks) for _ in range(count)] + [-1] * self.plan.floating
        offsets = [j + 1 for count in (*self.plan.masks, self.plan.floating) for j in range(count)]
        to = lambda numbers: torch.tensor(numbers, dtype=torch.long, device=self.device)  # noqa: E731
        anchors = to(behind)[None]
        if self.plan.floating:
            anchors = torch.where(anchors < 0, valid[:, None], anchors)
        return Layout(self.plan.drafts + 1, anchors, to(offsets), to(behind), self.device)
