"""Preflight: what it prints, that it finds what does not fit, and bad input. No weights and no data are read."""

import json

import jax
import pytest

from mtp_jax.fitting import fit

needs_compiler = pytest.mark.usefixtures("tpu_compiler")


@pytest.fixture
def planned(tree, llama_config, tmp_path):
    """The config of a run whose model is nowhere, with the file that gives its geometry."""
    geometry = tmp_path / "geometry.json"
    geometry.write_text(json.dumps(llama_config))
    return {
        **tree,
        "objective": "multi_token",
        "model": {"path": "nobody/nothing", "geometry": str(geometry)},
        "lora": {"rank": 4},
        "mtp": {"masks": 2},
        "train": {**tree["train"], "anchors": 6},
        "data": {"sources": [{"kind": "dataset", "name": "nobody/nothing"}]},
    }


@pytest.mark.parametrize("rows", [{}, {"rows": "noise", "sampler": "none"}], ids=["learned", "noise"])
def test_it_fits_this_machine(planned, write_config, command, rows):
    planned["mtp"] |= rows
    ended = command("preflight", "--config", write_config(planned), "--decode", "--slots", "64")
    assert ended.code == 0 and "decoding quadratic:2" in ended.out, ended
    for part in (
        "training on this machine's cpu, 1 chip (data=1, fsdp=1, tensor=1): fits",
        "TFLOP",
        "reads, writes",
        "mask rows/attend",
        "receives",
        "none",
    ):
        assert part in ended.out


def test_a_draft_vocabulary_takes_less(planned, write_config, command):
    def found(*overrides):
        ended = command(
            "preflight", "--config", write_config(planned), "--decode", "--slots", "64", "--json", *overrides
        )
        assert ended.code == 0, ended
        return [json.loads(line) for line in ended.out.splitlines()]

    (all_training, all_decoding), (training, decoding) = found(), found("mtp.vocabulary=20")
    assert 80 <= training["arguments"] - all_training["arguments"] < 200  # the ids
    assert training["flops"] < all_training["flops"] and decoding["flops"] < all_decoding["flops"]


def test_the_decoding_step_too(planned, write_config, command):
    options = ["--decode", "--plan", "quadratic:1", "--slots", "64", "--batch-size", "2"]
    ended = command("preflight", "--config", write_config(planned), *options)
    assert ended.code == 0, ended
    assert "decoding quadratic:1, batch 2 on this machine's cpu, 1 chip (data=1, fsdp=1, tensor=1): fits" in ended.out


@needs_compiler
@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_the_decoding_step_of_a_pod(batch, planned, llama_config, write_config, command, tmp_path):
    sizes = {"num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 1024}
    (tmp_path / "geometry.json").write_text(json.dumps(llama_config | sizes))
    planned["train"]["batch_size"] = 4
    planned["mesh"] = {"data": 1, "fsdp": 2, "tensor": 2}
    options = ["--topology", "v5e:2x2", "--decode", "--slots", "1000", "--batch-size", str(batch), "--json"]
    ended = command("preflight", "--config", write_config(planned), *options)
    assert ended.code == 0 and not ended.err, ended
    found = [json.loads(line) for line in ended.out.splitlines()][1]
    assert found["what"] == f"decoding quadratic:2, batch {batch}"
    slots = 1000 + 2 + 1
    cache = 2 * 2 * llama_config["num_hidden_layers"] * 2 * 64 * slots * batch // 2  # heads are parted, and
    cache //= 2 if batch % 2 == 0 else 1  # sequences where they can be
    assert cache < found["arguments"] < 1.5 * cache + 200_000


def test_what_does_not_fit_ends_with_1_and_says_what_would_need_less(planned, write_config, command, monkeypatch):
    find = fit.place_of
    monkeypatch.setattr(fit, "place_of", lambda *of: find(*of)._replace(memory=1000))
    planned["train"]["batch_size"] = 4
    ended = command("preflight", "--config", write_config(planned))
    assert ended.code == 1 and "DOES NOT FIT" in ended.out
    for key in ("model.remat=full", "train.accumulation=4", "train.anchor_chunk=3", "more chips"):
        assert f"would need less:  {key}" in ended.out


# The compiler for v6e takes a minute, and makes programs that JAX cannot read back.
@needs_compiler
@pytest.mark.parametrize(("topology", "size"), [("v5e:2x2", 16), pytest.param("v6e:2x2", 32, marks=pytest.mark.slow)])
def test_a_pod_is_compiled_for_without_having_one(
    topology, size, planned, llama_config, write_config, command, tmp_path
):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 3, "vocab_size": 1024}
    (tmp_path / "geometry.json").write_text(json.dumps(llama_config | sizes | {"max_position_embeddings": 256}))
    planned["train"] |= {"batch_size": 4, "sequence_length": 128, "anchors": 16}
    planned["model"] |= {"compute_dtype": "bfloat16", "remat": "full"}
    planned["mesh"] = {"data": 1, "fsdp": -1}
    ended = command("preflight", "--config", write_config(planned), "--topology", topology, "--json")
    assert ended.code == 0, ended
    (found,) = [json.loads(line) for line in ended.out.splitlines()]
    assert (found["chips"], found["fits"], found["memory"]) == (4, True, size << 30)
    base = 2 * (3 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512 + 2 * 256) + 2 * 1024 * 256 + 256)
    adapter = base  # its float32 weights and moments are less than the base here
    assert base / 4 < found["arguments"] < base / 4 + adapter
    # Weights are gathered for real rows, for mask rows, and again in the backward pass.
    assert 2 * base * 3 / 4 < found["moved"]["all-gather"] + found["moved"].get("collective-permute", 0) < 6 * base
    assert found["largest_gather"] < base / 2  # never the stacked weights of all layers
    assert not ended.err


def test_a_program_that_cannot_be_read_is_reported(planned, write_config, command, monkeypatch):
    def unreadable(_):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure: async-update")

    monkeypatch.setattr(jax.stages.Compiled, "as_text", unreadable)
    ended = command("preflight", "--config", write_config(planned))
    assert ended.code == 0 and "receives       not known" in ended.out, ended


def test_weights_are_not_looked_for(planned, write_config, command, monkeypatch):
    del planned["model"]["geometry"]
    ended = command("preflight", "--config", write_config(planned))
    assert ended.code == 2 and len(ended.errors) == 1 and "model.geometry=FILE" in ended.errors[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--topology", "v9:2x2"], "unknown chip 'v9'"),
        (["--topology", "v5e:2x2,"], "holds an empty name"),
        (["--plan", "none"], "give --decode too"),
        (["--decode", "--slots", "0"], "--slots 0: should be at least 1"),
        (["--decode", "--plan", "auto"], "--plan auto measures"),
        (["train.batch_size=0"], "train.batch_size should be greater than or equal to 1"),
        (["mesh.fsdp=3"], "does not multiply to the 1 devices"),
        (["train.sequence_length=65"], "longer than the model's context of 64"),
        (["mtp.vocabulary=9999"], "mtp.vocabulary=9999 should be at most 300, the model's tokens"),
        (["model.attention=splash"], "is a kernel for tpu, not for cpu"),
    ],
)
def test_bad_input_is_one_line(planned, write_config, command, arguments, says):
    ended = command("preflight", "--config", write_config(planned), *arguments)
    assert ended.code == 2 and len(ended.errors) == 1 and says in ended.errors[0], ended


@needs_compiler
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--topology", "v5e:2x2", "train.batch_size=2", "mesh.data=4"], "do not divide over data x fsdp = 4 devices"),
        (["--topology", "v5e:2x2", "mesh.data=3"], "does not multiply to the 4 devices"),
        (["--topology", "v5e:777x3"], "the TPU compiler does not have it"),
    ],
)
def test_bad_topologies_are_one_line(planned, write_config, command, arguments, says):
    ended = command("preflight", "--config", write_config(planned), *arguments)
    assert ended.code == 2 and len(ended.errors) == 1 and says in ended.errors[0], ended
