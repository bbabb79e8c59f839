"""Folders are read strictly: every tensor used once, bit for bit, or one error that says what to mend."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from kinds import KINDS
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken

from mtp_jax.data.documents import Completion, Document, Text, Tokens
from mtp_jax.data.tokens import Encoder
from mtp_jax.decoding.generator import Generator
from mtp_jax.encoding import check_ids, load_tokenizer
from mtp_jax.errors import UserError
from mtp_jax.locate import find_folder
from mtp_jax.model.base import open_base
from mtp_jax.model.folder import INDEX, SINGLE, read_geometry
from mtp_jax.model.weights import leaf_at, weight_table

EMBED, UNEMBED = "model.embed_tokens.weight", "lm_head.weight"
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def untied(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("untied")
    models.make("llama", num_hidden_layers=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tied(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied")
    models.make("llama", num_hidden_layers=2, tie_word_embeddings=True).save_pretrained(folder)
    return folder


@pytest.fixture
def untied_copy(untied, tmp_path):
    return shutil.copytree(untied, tmp_path / "model")


@pytest.fixture
def tied_copy(tied, tmp_path):
    return shutil.copytree(tied, tmp_path / "model")


def change(folder, edit):
    """Rewrite the folder's only weights file."""
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    save_file(tensors, folder / SINGLE)


def shard(folder, parts, weight_map=None):
    """Cut the folder's only weights file into files of the named tensors; the last takes the rest."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    parts = {**parts, "c.safetensors": [key for key in tensors if not any(key in keys for keys in parts.values())]}
    for file, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, folder / file)
    found = {key: file for file, keys in parts.items() for key in keys}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": found | (weight_map or {})}))


def read(folder, **options):
    return open_base(str(folder)).load(**options)


def refused(folder, *words):
    """The faults of loading a folder, which name all `words`."""
    with pytest.raises(UserError) as error:
        read(folder)
    assert all(word in str(error.value) for word in words), str(error.value)
    return error.value.faults


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_missing_unexpected_and_misshapen_tensors_are_listed_at_once(untied_copy):
    def edit(tensors):
        del tensors[Q], tensors["model.norm.weight"]
        tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((3, 32), np.float32)
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float32)
        tensors["model.layers.2.input_layernorm.weight"] = np.zeros(32, np.float32)

    change(untied_copy, edit)
    faults = refused(
        untied_copy,
        f"2 missing: {Q}, model.norm.weight",
        "2 unexpected: model.layers.0.self_attn.q_proj.bias, model.layers.2.input_layernorm.weight",
        "1 of the wrong shape: model.layers.0.mlp.up_proj.weight is (3, 32), should be (48, 32)",
    )
    assert len(faults) == 1


def test_inv_freq_buffers_are_ignored(untied_copy):
    plain = read(untied_copy)

    def edit(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
        tensors["model.rotary_emb.inv_freq"] = np.zeros(8, np.float64)

    change(untied_copy, edit)
    assert same(read(untied_copy), plain)


def test_tied_table_may_be_stored_under_either_name_or_both(tied_copy):
    plain = read(tied_copy)
    assert "unembed" not in plain
    change(tied_copy, lambda tensors: tensors.update({UNEMBED: tensors[EMBED].copy()}))
    assert same(read(tied_copy), plain)
    change(tied_copy, lambda tensors: tensors.pop(EMBED))
    assert same(read(tied_copy), plain)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_model_saved_without_its_head_is_read_where_embeddings_are_tied(models, family, tmp_path):
    model = models.make(family, num_hidden_layers=2, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "whole")
    model.model.save_pretrained(tmp_path / "bare")
    assert "norm.weight" in load_file(tmp_path / "bare" / SINGLE)
    assert same(read(tmp_path / "bare"), read(tmp_path / "whole"))
    assert open_base(str(tmp_path / "bare")).values == open_base(str(tmp_path / "whole")).values


def bare(tensors):
    for key in list(tensors):
        tensors[key.removeprefix("model.")] = tensors.pop(key)


def test_keys_without_their_prefix_are_read_as_strictly(untied, tied, tmp_path):
    untied_copy, tied_copy = (shutil.copytree(folder, tmp_path / folder.name) for folder in (untied, tied))
    plain = read(untied_copy), read(tied_copy)
    change(untied_copy, bare)
    change(tied_copy, bare)
    assert same(read(untied_copy), plain[0]) and same(read(tied_copy), plain[1])
    change(tied_copy, lambda tensors: tensors.update({UNEMBED: tensors["embed_tokens.weight"] + 1}))
    refused(tied_copy, "embed_tokens.weight", UNEMBED, "differ")
    change(untied_copy, lambda tensors: tensors.update({"model.norm.weight": tensors.pop("norm.weight")}))
    refused(untied_copy, "1 missing: model.norm.weight; 1 unexpected: model.norm.weight")


def test_an_untied_model_without_its_head_is_refused(models, tmp_path):
    models.make("llama", num_hidden_layers=2).model.save_pretrained(tmp_path)
    refused(tmp_path, f"1 missing: {UNEMBED}", "without its head", "save the whole model")


@pytest.mark.parametrize("row", [0, -1])
def test_tied_tables_that_differ_are_refused(tied_copy, row, monkeypatch):
    monkeypatch.setattr("mtp_jax.model.folder._READ_BYTES", 1000)

    def edit(tensors):
        tensors[UNEMBED] = tensors[EMBED].copy()
        tensors[UNEMBED][row, -1] += 1e-6

    change(tied_copy, edit)
    refused(tied_copy, EMBED, UNEMBED, "differ")


def test_tied_tables_of_a_wrong_shape_are_refused(tied_copy):
    flat = np.zeros(7, np.float32)
    change(tied_copy, lambda tensors: tensors.update({EMBED: flat, UNEMBED: flat.copy()}))
    refused(tied_copy, EMBED, "(7,)")


def test_untied_model_needs_its_unembedding(untied_copy):
    change(untied_copy, lambda tensors: tensors.pop(UNEMBED))
    refused(untied_copy, f"1 missing: {UNEMBED}")


@pytest.mark.parametrize("bytes_at_once", [1, 200, 16 << 20])
def test_values_equal_the_stored_tensors_however_little_is_read_at_once(untied, monkeypatch, bytes_at_once):
    monkeypatch.setattr("mtp_jax.model.folder._READ_BYTES", bytes_at_once)
    stored, params = load_file(untied / SINGLE), read(untied)
    for weight in weight_table(read_geometry(untied)):
        leaf = np.asarray(leaf_at(params, weight.path))
        for layer, key in enumerate(weight.stored_keys()):
            ours = leaf[layer] if weight.stacked else leaf
            assert np.array_equal(ours.T if weight.transposed else ours, stored.pop(key)), key
    assert not stored


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_each_storage_dtype_is_loaded_bit_for_bit(untied_copy, dtype):
    change(untied_copy, lambda t: t.update({key: value.astype(dtype) for key, value in t.items()}))
    stored, params = load_file(untied_copy / SINGLE), read(untied_copy)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(dtype)}
    assert np.asarray(params["embed"]["embedding"]).tobytes() == stored[EMBED].tobytes()
    assert np.asarray(params["layers"]["q"]["kernel"][1]).T.tobytes() == stored[Q].tobytes()
    wide = np.asarray(read(untied_copy, dtype=jnp.float32)["layers"]["q"]["kernel"][1]).T
    assert wide.dtype == np.float32 and np.array_equal(wide, stored[Q].astype(np.float32))


def test_float32_is_rounded_to_bfloat16_to_nearest_even(untied):
    stored = torch.from_numpy(load_file(untied / SINGLE)[Q])
    ours = read(untied, dtype=jnp.bfloat16)["layers"]["q"]["kernel"][1].T
    assert np.array_equal(np.asarray(ours, np.float32), stored.to(torch.bfloat16).float().numpy())


def test_sharded_folder_equals_the_single_file(untied_copy):
    plain = read(untied_copy)
    shard(untied_copy, {"a.safetensors": [Q, EMBED], "b.safetensors": ["model.norm.weight"]})
    assert same(read(untied_copy), plain)


def test_index_that_lists_a_missing_file_is_refused(untied_copy):
    shard(untied_copy, {"a.safetensors": [Q], "b.safetensors": [EMBED]})
    (untied_copy / "a.safetensors").unlink()
    refused(untied_copy, "a.safetensors: is missing")


def test_index_that_lists_a_missing_tensor_is_refused(untied_copy):
    shard(untied_copy, {"a.safetensors": [Q]}, {"model.ghost.weight": "a.safetensors"})
    refused(untied_copy, "model.ghost.weight", "a.safetensors does not hold")


def test_tensor_that_lies_elsewhere_than_the_index_says_is_refused(untied_copy):
    shard(untied_copy, {"a.safetensors": [Q, EMBED], "b.safetensors": [UNEMBED]}, {Q: "b.safetensors"})
    refused(untied_copy, "a.safetensors", Q, "says b.safetensors")


@pytest.mark.parametrize("indexed", [True, False])
def test_tensor_stored_twice_is_refused(untied_copy, indexed):
    shard(untied_copy, {"a.safetensors": [Q]})
    save_file(
        load_file(untied_copy / "a.safetensors") | load_file(untied_copy / "c.safetensors"),
        untied_copy / "c.safetensors",
    )
    if not indexed:
        (untied_copy / INDEX).unlink()
    refused(untied_copy, Q, "a.safetensors", "c.safetensors")


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": {"a": 1}}', "{"])
def test_broken_index_is_refused(untied_copy, index):
    (untied_copy / INDEX).write_text(index)
    refused(untied_copy, INDEX)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_file_is_refused(untied_copy, kept):
    whole = (untied_copy / SINGLE).read_bytes()
    (untied_copy / SINGLE).write_bytes(whole[:kept])
    refused(untied_copy, SINGLE, "damaged or truncated")


@pytest.mark.parametrize("header", [b"\xff" * 64, (9).to_bytes(8, "little") + b"not json!", b"PK\x03\x04" * 99])
def test_garbage_header_is_refused(untied_copy, header):
    (untied_copy / SINGLE).write_bytes(header)
    refused(untied_copy, SINGLE, "damaged or truncated")


def test_integer_weights_are_refused(untied_copy):
    change(untied_copy, lambda tensors: tensors.update({Q: tensors[Q].astype(np.int8)}))
    refused(untied_copy, Q, "I8", "quantised")


def test_pickle_files_are_never_loaded(untied_copy):
    tensors = {key: torch.from_numpy(value) for key, value in load_file(untied_copy / SINGLE).items()}
    torch.save(tensors, untied_copy / "pytorch_model.bin")
    (untied_copy / SINGLE).unlink()
    refused(untied_copy, "pytorch_model.bin", "never loaded", "safetensors")


def test_folder_without_weights_is_refused(untied_copy):
    (untied_copy / SINGLE).unlink()
    refused(untied_copy, "no weights")


@pytest.mark.parametrize("config", ["", "{", "[1]", '"llama"', "\x00"])
def test_broken_config_is_refused(untied_copy, config):
    (untied_copy / "config.json").write_text(config)
    refused(untied_copy, "config.json")


NAMES = {
    "bundled:nonsense": "no bundled model",
    "no/such/folder": "no such folder",
    "./no-folder": "no such folder",
    "org/model": "hub did not give it",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_lead_nowhere_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=NAMES[name]):
        find_folder(name)


def test_file_in_place_of_a_folder_is_refused(untied):
    with pytest.raises(UserError, match="is a folder"):
        find_folder(str(untied / "config.json"))


def test_folder_without_config_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.json is missing"):
        find_folder(str(tmp_path))


def test_folder_is_found_by_relative_path(untied, monkeypatch):
    monkeypatch.chdir(untied.parent)
    assert find_folder(untied.name).resolve() == untied


MARKED = ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", INDEX]


@pytest.mark.parametrize("name", MARKED)
def test_json_may_begin_with_a_byte_order_mark(small_folder, small_tokenizer, name, tmp_path):
    folder = shutil.copytree(small_folder, tmp_path / "model")
    if name == INDEX:
        shard(folder, {"a.safetensors": [EMBED]})
    (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    plain, base = open_base(str(small_folder)), open_base(str(folder))
    assert (base.g, base.stops, base.config) == (plain.g, plain.stops, plain.config)
    assert base.tokenizer("the cat")["input_ids"] == small_tokenizer("the cat")["input_ids"]
    assert same(base.load(), plain.load())


def test_missing_tokenizer_is_refused(untied):
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(untied, 96)


def test_broken_tokenizer_is_refused(untied_copy):
    (untied_copy / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(untied_copy, 96)


def test_tokenizer_ids_beyond_the_vocabulary_are_refused(untied_copy, small_tokenizer):
    small_tokenizer.save_pretrained(untied_copy)
    with pytest.raises(UserError, match=r"id \d{3} .* ends at 95"):
        load_tokenizer(untied_copy, 96)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "unigram"])
@pytest.mark.parametrize("special", [True, False])
def test_an_added_token_beyond_the_vocabulary_is_refused_where_it_occurs(models, kind, special, tmp_path):
    tokenizer = KINDS[kind]()
    V = len(tokenizer)
    tokenizer.add_tokens([AddedToken("<extra>", special=special)])
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path, V)
    check_ids(loaded("the cat")["input_ids"], loaded, "here")
    for content in (Text("a <extra> b"), Completion("a ", "<extra>"), Tokens([1], [V])):
        with pytest.raises(UserError, match=f"^it: holds the token '<extra>', whose id {V} is beyond"):
            Encoder(loaded)(Given("it", content))
    generator = SimpleNamespace(tokenizer=loaded, g=SimpleNamespace(max_positions=64))
    assert Generator.encode(generator, "the cat") == tokenizer("the cat")["input_ids"]
    with pytest.raises(UserError, match=r"^prompt 3: holds the token '<extra>'"):
        Generator.encode(generator, "the <extra> cat", "prompt 3")


class Given(Document):
    def __init__(self, name, held):
        self.name, self.held = name, held

    def content(self):
        return self.held


def test_tokenizer_may_be_smaller_than_the_vocabulary(small_folder, small_tokenizer):
    assert load_tokenizer(small_folder, 300).get_vocab() == small_tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("config", "generation", "stops"),
    [
        ({}, None, ()),
        ({"eos_token_id": 2}, None, (2,)),
        ({"eos_token_id": 2}, {}, (2,)),
        ({"eos_token_id": 2}, {"eos_token_id": [1, 2]}, (1, 2)),
    ],
)
def test_stop_ids_come_from_generation_config_first(untied, tmp_path, config, generation, stops):
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert replace(open_base(str(untied)), folder=tmp_path, config=config).stops == stops
