"""Adapter folders come back bit for bit, and only to the base they belong to."""

import json
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mtp_jax.errors import UserError
from mtp_jax.model.base import open_base
from mtp_jax.model.geometry import Geometry
from mtp_jax.model.weights import init_params
from mtp_jax.mtp.adapter import AdapterShape, adapter_table, init_adapter
from mtp_jax.mtp.adapter_folder import CONFIG, TENSORS, find_adapter, open_adapter, write_adapter

BF16 = ml_dtypes.bfloat16
CONFIG_JSON = {
    "model_type": "llama",
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
G = Geometry.from_config(CONFIG_JSON)
SHAPE = AdapterShape(masks=3, rank=2, alpha=4.0, targets=("q", "down"), sampler="paper")


def write_base(folder, seed):
    from mtp_jax.model.folder_writer import stored_form

    folder.mkdir()
    params = init_params(G, jax.random.key(seed))
    save_file(dict(stored_form(params, G, np.float32)), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG_JSON))
    return folder, params


@pytest.fixture
def written(tmp_path):
    base, params = write_base(tmp_path / "base", 0)
    adapter = init_adapter(G, SHAPE, params["embed"]["embedding"], jax.random.key(1))
    out = tmp_path / "adapter"
    pointer = {"name": "my-base", "fingerprint": open_base(str(base)).fingerprint}
    write_adapter(out, G, SHAPE, adapter, pointer, {"steps": 3})
    return base, out, adapter


def test_round_trip_is_bit_exact(written):
    base, out, adapter = written
    opened = open_adapter(str(out), open_base(str(base)))
    assert opened.shape == SHAPE and opened.dtype == np.float32
    for a, b in zip(jax.tree.leaves(adapter), jax.tree.leaves(opened.arrays), strict=True):
        assert np.array_equal(a, b)
    assert sorted(path.name for path in out.iterdir()) == sorted([CONFIG, TENSORS])
    assert set(load_file(out / TENSORS)) == {weight.key for weight in adapter_table(G, SHAPE)}


def test_only_lora_and_mtp_are_in_it(written):
    names = set(load_file(written[1] / TENSORS))
    assert all(name.startswith(("lora.layers.q.", "lora.layers.down.", "mtp.")) for name in names)


@pytest.fixture
def drafting_few(written):
    """An adapter folder with a draft vocabulary, its base and its ids."""
    base, out, adapter = written
    ids = np.array([0, 3, 4, G.V - 1], np.int32)
    shape, pointer = replace(SHAPE, vocabulary=4), {"name": "b", "fingerprint": open_base(str(base)).fingerprint}
    write_adapter(out, G, shape, adapter | {"vocabulary": ids}, pointer, {}, BF16)
    return base, out, ids


def test_a_draft_vocabulary_comes_back(drafting_few):
    base, out, ids = drafting_few
    opened = open_adapter(str(out), open_base(str(base)))
    assert opened.shape == replace(SHAPE, vocabulary=4) and opened.dtype == BF16
    assert opened.arrays["vocabulary"].dtype == np.int32 and np.array_equal(opened.arrays["vocabulary"], ids)
    stored = load_file(out / TENSORS)
    assert np.array_equal(stored["mtp.vocabulary"], ids) and stored["mtp.vocabulary"].dtype == np.int32
    assert json.loads((out / CONFIG).read_text())["vocabulary"] == 4


@pytest.mark.parametrize(
    "ids", [[0, 3, 4], [0, 4, 3, 5], [0, 3, 3, 4], [-1, 0, 1, 2], [0, 1, 2, G.V], [[0, 1, 2, 3]], [0.0, 1.0, 2.0, 3.0]]
)
def test_what_is_no_draft_vocabulary_is_refused(drafting_few, ids):
    base, out, _ = drafting_few
    kind = np.float32 if isinstance(ids[0], float) else np.int32
    save_file(load_file(out / TENSORS) | {"mtp.vocabulary": np.array(ids, kind)}, out / TENSORS)
    with pytest.raises(UserError, match=f"mtp.vocabulary should be 4 ascending token ids below {G.V}"):
        open_adapter(str(out), open_base(str(base)))


def test_a_draft_vocabulary_is_there_where_the_config_says_so(drafting_few):
    base, out, _ = drafting_few
    config, opened = json.loads((out / CONFIG).read_text()), open_base(str(base))
    (out / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if k != "vocabulary"}))
    with pytest.raises(UserError, match=r"mtp\.vocabulary is not expected"):
        open_adapter(str(out), opened)
    (out / CONFIG).write_text(json.dumps(config | {"vocabulary": 0}))
    with pytest.raises(UserError, match="vocabulary 0 should be at least 1"):
        open_adapter(str(out), opened)
    (out / CONFIG).write_text(json.dumps(config))
    save_file({k: v for k, v in load_file(out / TENSORS).items() if k != "mtp.vocabulary"}, out / TENSORS)
    with pytest.raises(UserError, match=r"mtp\.vocabulary is missing"):
        open_adapter(str(out), opened)


def test_another_base_is_refused_by_name(written, tmp_path):
    other, _ = write_base(tmp_path / "other", 5)
    with pytest.raises(UserError, match=r"my-base .* but the base model is other"):
        open_adapter(str(written[1]), open_base(str(other)))


def test_fingerprint_ignores_files_and_sees_values(written, tmp_path):
    base = written[0]
    tensors = load_file(base / "model.safetensors")
    split = tmp_path / "split"
    split.mkdir()
    names = sorted(tensors)
    parts = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    for file, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, split / file)
    index = {"weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (split / "model.safetensors.index.json").write_text(json.dumps(index))
    (split / "config.json").write_text(json.dumps(CONFIG_JSON))
    before, again = open_base(str(base)), open_base(str(split))
    assert again.fingerprint == before.fingerprint
    changed = {key: tensor.copy() for key, tensor in tensors.items()}
    changed["model.norm.weight"][-1] += 1
    save_file(changed, base / "model.safetensors")
    after = open_base(str(base))
    assert again.fingerprint != after.fingerprint and len(after.tensors.stored) == len(names)


def saved_as(base, dtype):
    """Save a base again in another dtype."""
    tensors = load_file(base / "model.safetensors")
    save_file({key: tensor.astype(dtype) for key, tensor in tensors.items()}, base / "model.safetensors")
    return open_base(str(base))


@pytest.mark.parametrize(
    ("trained", "used"),
    [(np.float32, BF16), (BF16, np.float32), (np.float16, np.float32), (np.float16, BF16)],
)
def test_a_base_saved_in_another_dtype_is_the_same(written, trained, used):
    base, out, adapter = written
    opened = saved_as(base, trained)
    pointer = {"name": "my-base", "fingerprint": opened.fingerprint, "values": opened.values}
    write_adapter(out, G, SHAPE, adapter, pointer, {})
    again = saved_as(base, used)
    assert again.fingerprint != opened.fingerprint
    open_adapter(str(out), again)
    saved_as(write_base(base.parent / "other", 5)[0], used)
    with pytest.raises(UserError, match="is other"):
        open_adapter(str(out), open_base(str(base.parent / "other")))


def test_adapters_of_older_versions_know_a_bfloat16_base_in_float32(written):
    base, out, adapter = written
    write_adapter(out, G, SHAPE, adapter, {"name": "b", "fingerprint": saved_as(base, BF16).fingerprint}, {})
    open_adapter(str(out), saved_as(base, np.float32))


def test_rounding_otherwise_gives_another_base_and_the_message_says_what_to_do(written):
    base, out, adapter = written
    opened = open_base(str(base))
    pointer = {"name": "b", "fingerprint": opened.fingerprint, "values": opened.values}
    write_adapter(out, G, SHAPE, adapter, pointer, {})
    rounded = saved_as(base, np.float16)
    with pytest.raises(UserError, match=f"make base.fingerprint in {CONFIG} {rounded.fingerprint}"):
        open_adapter(str(out), rounded)
    config = json.loads((out / CONFIG).read_text())
    config["base"]["fingerprint"] = rounded.fingerprint
    (out / CONFIG).write_text(json.dumps(config))
    open_adapter(str(out), rounded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("mtp.masks"), "mtp.masks is missing"),
        (
            lambda t: t.update({"mtp.masks": np.zeros((3, 15), np.float32)}),
            r"mtp.masks is \(3, 15\), should be \(3, 16\)",
        ),
        (lambda t: t.update({"extra": np.zeros(1, np.float32)}), "extra is not expected"),
    ],
)
def test_wrong_tensors_are_named(written, change, message):
    base, out, _ = written
    tensors = load_file(out / TENSORS)
    change(tensors)
    save_file(tensors, out / TENSORS)
    with pytest.raises(UserError, match=message):
        open_adapter(str(out), open_base(str(base)))


def test_damage_is_one_clear_error(written):
    base, out, _ = written
    data = (out / TENSORS).read_bytes()
    (out / TENSORS).write_bytes(data[:-10])
    with pytest.raises(UserError, match="damaged or truncated"):
        open_adapter(str(out), open_base(str(base)))
    config = json.loads((out / CONFIG).read_text())
    (out / CONFIG).write_text(json.dumps(config | {"sampler": "gru"}))
    with pytest.raises(UserError, match="sampler 'gru' is unknown; it should be one of paper, residual, none"):
        open_adapter(str(out), open_base(str(base)))
    (out / CONFIG).write_text("{}")
    with pytest.raises(UserError, match="format None is not 1"):
        open_adapter(str(out), open_base(str(base)))
    (out / CONFIG).unlink()
    with pytest.raises(UserError, match=r"mtp_config\.json is missing"):
        find_adapter(str(out))


def test_a_crash_leaves_no_folder(written, monkeypatch, tmp_path):
    from mtp_jax.mtp import adapter_folder

    def fail(*_, **__):
        raise OSError("crash")

    monkeypatch.setattr(adapter_folder, "save_file", fail)
    with pytest.raises(OSError, match="crash"):
        write_adapter(tmp_path / "new", G, SHAPE, written[2], {}, {})
    assert not (tmp_path / "new").exists()
