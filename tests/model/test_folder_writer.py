"""A written folder holds the same bits, loads in transformers, and is whole or absent."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from mtp_jax.files import read_json
from mtp_jax.model import folder_writer
from mtp_jax.model.folder import INDEX, SINGLE, stored_tensors
from mtp_jax.model.folder_writer import write_folder

CASES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "llama tied": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 5},
    "qwen2": {},
    "qwen3": {"attention_bias": True},
}
TOKENS = torch.arange(2 * 30).reshape(2, 30)


@pytest.fixture(scope="module", params=CASES)
def source(request, models, tmp_path_factory):
    """A transformers model and the folder it is saved in."""
    folder = tmp_path_factory.mktemp("source")
    model = models.make(request.param.split()[0], num_hidden_layers=2, vocab_size=300, **CASES[request.param])
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def llama(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    models.make("llama", num_hidden_layers=2, vocab_size=300).save_pretrained(folder)
    return folder


def write(out, folder, models, tokenizer, dtype=jnp.float32, **options):
    g, params = models.load(folder)
    write_folder(out, params, g, read_json(folder / "config.json"), tokenizer, dtype, **options)
    return params


def bits(params):
    return {
        jax.tree_util.keystr(path): (leaf.dtype, leaf.shape, np.asarray(leaf).tobytes())
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


@pytest.mark.parametrize("shard_bytes", [1 << 30, 20_000], ids=["one file", "many files"])
def test_written_folder_is_bit_identical_and_loads_in_transformers(
    source, shard_bytes, models, small_tokenizer, tmp_path
):
    model, folder = source
    params = write(tmp_path / "out", folder, models, small_tokenizer, shard_bytes=shard_bytes)
    assert bits(models.load(tmp_path / "out")[1]) == bits(params)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [SINGLE] if shard_bytes > 20_000 else len(files) > 3
    theirs, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    with torch.no_grad():
        assert torch.equal(theirs.eval()(TOKENS).logits, model(TOKENS).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == small_tokenizer.get_vocab()


def test_index_names_the_file_of_every_tensor_and_their_size(llama, models, small_tokenizer, tmp_path):
    write(tmp_path / "out", llama, models, small_tokenizer, shard_bytes=20_000)
    index = read_json(tmp_path / "out" / INDEX)
    held = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, "numpy") as tensors:
            held |= dict.fromkeys(tensors.keys(), path.name)
            assert tensors.metadata() == {"format": "pt"}
            sizes = [tensors.get_tensor(key).nbytes for key in tensors.keys()]  # noqa: SIM118
            assert sum(sizes) <= 20_000 or len(sizes) == 1
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(
        4 * int(np.prod(tensor.shape)) for tensor in stored_tensors(tmp_path / "out").values()
    )


def test_bfloat16_is_written_and_said_in_the_config(llama, models, small_tokenizer, tmp_path):
    params = write(tmp_path / "out", llama, models, small_tokenizer, jnp.bfloat16)
    assert bits(models.load(tmp_path / "out")[1]) == bits(jax.tree.map(lambda a: a.astype(jnp.bfloat16), params))
    config = read_json(tmp_path / "out" / "config.json")
    assert config["dtype"] == "bfloat16" and "torch_dtype" not in config
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_crash_while_writing_leaves_no_folder(llama, models, small_tokenizer, tmp_path, monkeypatch):
    save, calls = folder_writer.save_file, []

    def failing(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError("no power")
        save(*arguments, **options)

    monkeypatch.setattr(folder_writer, "save_file", failing)
    with pytest.raises(OSError, match="no power"):
        write(tmp_path / "out", llama, models, small_tokenizer, shard_bytes=20_000)
    assert not (tmp_path / "out").exists()
    write(tmp_path / "out", llama, models, small_tokenizer, shard_bytes=20_000)
    models.load(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_crash_while_writing_leaves_the_older_folder(llama, models, small_tokenizer, tmp_path, monkeypatch):
    before = bits(write(tmp_path / "out", llama, models, small_tokenizer))

    def failing(*_, **__):
        raise OSError("no power")

    monkeypatch.setattr(folder_writer, "save_file", failing)
    with pytest.raises(OSError, match="no power"):
        write(tmp_path / "out", llama, models, small_tokenizer)
    assert bits(models.load(tmp_path / "out")[1]) == before


def test_older_folder_is_replaced_whole(llama, models, small_tokenizer, tmp_path):
    write(tmp_path / "out", llama, models, small_tokenizer, shard_bytes=20_000)
    write(tmp_path / "out", llama, models, small_tokenizer)
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors*")] == [SINGLE]


def test_tokenizer_with_several_chat_templates_is_written(llama, models, small_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(small_folder)
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    write(tmp_path / "out", llama, models, tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


def test_stop_ids_survive(llama, models, small_tokenizer, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "in")
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": [1, 2], "pad_token_id": 1}
    (folder / "config.json").write_text(json.dumps(config))
    write(tmp_path / "out", folder, models, small_tokenizer)
    generation = read_json(tmp_path / "out" / "generation_config.json")
    assert (generation["eos_token_id"], generation["pad_token_id"]) == ([1, 2], 1)
