"""Every fault of a config is named with its key and the nearest right one, all at once, and none is invented."""

import copy
from pathlib import Path

import pytest
import yaml

from mtp_jax.config_file import dump, load_config, validate
from mtp_jax.errors import UserError

pytestmark = pytest.mark.quick

GOOD = {
    "objective": "next_token",
    "output_dir": "out",
    "model": {"path": "some/folder"},
    "data": {"sources": [{"kind": "text", "path": "a.txt"}, {"kind": "python-stdlib"}]},
    "train": {"steps": 10, "batch_size": 4, "sequence_length": 8, "learning_rate": 2e-4},
}


def changed(**places):
    """GOOD with the values at dotted places replaced (`__` for a dot; None deletes a key)."""
    tree = copy.deepcopy(GOOD)
    for place, value in places.items():
        *parents, last = place.split("__")
        node = tree
        for name in parents:
            node = node[int(name)] if isinstance(node, list) else node.setdefault(name, {})
        if value is None:
            del node[last]
        else:
            node[int(last) if isinstance(node, list) else last] = value
    return tree


def faults(tree):
    with pytest.raises(UserError) as caught:
        validate(tree, "c.yaml")
    assert all(fault.startswith("c.yaml: ") for fault in caught.value.faults)
    return [fault.removeprefix("c.yaml: ") for fault in caught.value.faults]


@pytest.fixture
def read(tmp_path):
    """A function that loads a config of the given YAML text with overrides."""

    def load(text, *overrides):
        (tmp_path / "c.yaml").write_text(text)
        return load_config(str(tmp_path / "c.yaml"), list(overrides))

    return load


def refused(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    return list(caught.value.faults)


# ---- schema


@pytest.mark.parametrize(
    ("place", "value", "key", "meant"),
    [
        ("objectiv", "x", "objectiv", "objective"),
        ("train__lerning_rate", 1.0, "train.lerning_rate", "learning_rate"),
        ("data__sources__1__wieght", 2.0, "data.sources.1.wieght", "weight"),
        ("model__scratch", {"config": {}, "tokenizer": "t", "tokeniser": 1}, "model.scratch.tokeniser", "tokenizer"),
        (
            "model__scratch",
            {"config": {}, "tokenizer": {"vocabulary": 300, "vocabulry": 1}},
            "model.scratch.tokenizer.vocabulry",
            "vocabulary",
        ),
        ("batch_size", 4, "batch_size", "train.batch_size"),
    ],
)
def test_a_misspelt_key_names_the_nearest(place, value, key, meant):
    tree = changed(**{place: value})
    if place == "model__scratch":
        del tree["model"]["path"]
    assert faults(tree) == [f"{key} is not a key; did you mean {meant!r}?"]


def test_a_key_like_no_other_lists_the_valid_ones():
    (fault,) = faults(changed(mesh__zzz=1))
    assert fault == "mesh.zzz is not a key; valid here are data, fsdp, tensor."


@pytest.mark.parametrize(
    ("place", "value", "start"),
    [
        ("train__steps", "ten", "train.steps should be a valid integer"),
        ("train__steps", 2.5, "train.steps should be a valid integer"),
        ("train__steps", True, "train.steps should be a valid integer"),
        ("train__steps", 0, "train.steps should be greater than or equal to 1, not 0."),
        ("train__learning_rate", "2e-4x", "train.learning_rate should be a valid number"),
        ("train__learning_rate", float("inf"), "train.learning_rate should be a finite number"),
        ("train__learning_rate", float("nan"), "train.learning_rate should be"),
        ("train__schedule", "linear", "train.schedule should be 'flat' or 'cosine', not 'linear'."),
        ("train", 5, "train should be a valid dictionary"),
        ("data__sources", [], "data.sources should have at least 1 entry, not []."),
        ("data__sources__0", "a.txt", "data.sources.0 should be a valid dictionary"),
        ("data__sources__0__path", 7, "data.sources.0.path should be a valid string, not 7."),
        ("output_dir", "", "output_dir should have at least 1 character"),
        ("model__path", "x" * 500, None),
        ("model__path", ["x" * 500], "model.path should be a valid string, not ['xxx"),
    ],
)
def test_a_wrong_value_is_told_with_its_key(place, value, start):
    tree = changed(**{place: value})
    if start is None:
        assert validate(tree, "c.yaml").model.path == value
        return
    (fault,) = faults(tree)
    assert fault.startswith(start) and fault.endswith(".") and len(fault) < 200


@pytest.mark.parametrize("tokenizer", [5, {"vocabulary": 10}, {"vocabulary": "many"}, {}, [1]])
def test_a_wrong_tokenizer_is_one_fault(tokenizer):
    tree = changed(model={"scratch": {"config": {}, "tokenizer": tokenizer}})
    assert len(faults(tree)) == 1


@pytest.mark.parametrize("key", ["objective", "output_dir", "model", "data", "train"])
def test_a_missing_key_is_named(key):
    assert faults(changed(**{key: None})) == [f"{key} is missing."]


def test_defaults_are_right_values():
    config = validate(copy.deepcopy(GOOD), "c.yaml")
    assert validate(yaml.safe_load(dump(config)), "again") == config


# ---- contradictions


NOISE, NOISY = {"objective": "multi_token"}, {"masks": 2, "rows": "noise", "sampler": "none"}
CONTRADICTIONS = [
    ({"model": {}}, "exactly one of model.path"),
    ({"model__scratch": {"config": {}, "tokenizer": "t"}}, "exactly one of model.path"),
    ({"data__sources__0__path": None}, "data.sources.0.path is missing"),
    ({"data__sources__1__path": "x"}, "data.sources.1: python-stdlib"),
    ({"data__sources__1__separator": "x"}, "data.sources.1: python-stdlib"),
    ({"data__sources__0__separator": ""}, "data.sources.0.separator is empty"),
    ({"data__sources__0__columns": {"a": "b"}}, "data.sources.0.columns"),
    ({"train__accumulation": 3}, "train.batch_size=4 does not divide"),
    ({"train__warmup_steps": 10}, "train.warmup_steps=10 leaves none"),
    ({"evaluation__every": 2, "data__held_out": 0.0}, "evaluation.every asks"),
    ({"objective": "multi_token", "mtp": {"masks": 2, "grow_steps": 10}}, "mtp.grow_steps=10 leaves none"),
    (
        {
            "objective": "multi_token",
            "mtp": {"masks": 2},
            "data__continuations": {"path": "c.jsonl", "top_p": 0.9},
        },
        "data.continuations.top_p belongs to sampling",
    ),
    ({**NOISE, "mtp": {"masks": 2, "noise": {"low": 3}}}, "mtp.noise belongs to mtp.rows: noise"),
    ({**NOISE, "mtp": {"masks": 2, "rows": "noise"}}, "mtp.rows: noise is for engines, which have no sampler head"),
    ({**NOISE, "mtp": NOISY | {"vocabulary": 40}}, "mtp.rows: noise is for engines, which draft from all tokens"),
    ({**NOISE, "mtp": NOISY, "lora": {"gated": False}}, "mtp.rows: noise trains the LoRA alone"),
    ({**NOISE, "mtp": NOISY | {"noise": {"low": 9, "high": 9}}}, "mtp.noise: low=9 should be below high=9"),
    ({"mesh__data": 0}, "mesh sizes"),
    ({"mesh__fsdp": -1}, "mesh sizes"),
    ({"mesh__tensor": -2}, "mesh sizes"),
]


@pytest.mark.parametrize(("places", "start"), CONTRADICTIONS)
def test_a_contradiction_is_told(places, start):
    (fault,) = faults(changed(**places))
    assert fault.startswith(start)


@pytest.mark.parametrize(("places", "start"), CONTRADICTIONS)
def test_a_contradiction_is_told_beside_schema_faults(places, start):
    first, second, third = faults(changed(**places, train__beta1=2, checkpoints__evry=3))
    assert first.startswith("train.beta1 should be less than 1")
    assert second.startswith("checkpoints.evry is not a key")
    assert third.startswith(start)


@pytest.mark.parametrize(
    "places",
    [
        {"model": {"pth": "x"}},
        {"model": None},
        {"model__path": 5},
        {"model": {"scratch": 5}},
        {"data__sources__0": {"kind": "text", "pat": "a"}},
        {"data__sources__0": {"kind": "txt"}},
        {"data__sources__0": 3},
        {"train__accumulation": 3, "train__batch_size": "four"},
        {"train__batch_size": 3, "train__acumulation": 3},
        {"train__warmup_steps": 10, "train__steps": "x"},
        {"evaluation__every": 2, "data__held_out": 2.0},
        {"evaluation": 5},
        {"mesh__data": "all", "mesh__fsdp": -1},
    ],
)
def test_a_schema_fault_is_followed_by_no_false_contradiction(places):
    (fault,) = faults(changed(**places))
    assert "not a key" in fault or "should be" in fault or fault == "model is missing."


def test_all_contradictions_are_told_at_once():
    tree = changed(model={}, train__accumulation=3, train__warmup_steps=99, mesh__data=0, data__sources__0__path=None)
    assert len(faults(tree)) == 5


# ---- YAML


def test_a_number_may_be_written_without_a_point(read):
    text = dump(validate(copy.deepcopy(GOOD), "c")).replace("learning_rate: 0.0002", "learning_rate: 2e-4")
    assert "2e-4" in text
    assert read(text).train.learning_rate == 2e-4


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3\n", "x: {q: 1, q: 1}", "- {q: 1, q: 1}"])
def test_a_key_twice_is_refused(read, text):
    (fault,) = refused(read, text)
    assert "stands twice" in fault and "line" in fault


def test_merged_keys_are_no_key_twice(read):
    text = dump(validate(copy.deepcopy(GOOD), "c"))
    merged = text.replace("sources:\n", "sources:\n  - &a {kind: text, path: p, weight: 2}\n  - {<<: *a, weight: 3}\n")
    assert merged != text
    assert [source.weight for source in read(merged).data.sources[:2]] == [2, 3]


@pytest.mark.parametrize(
    "text", ["a: [1", "", "- 1\n", "just text", "a: !!python/object:os.system x", "? [a]\n: 1\n", "\0"]
)
def test_what_is_no_mapping_is_one_fault(read, text):
    (fault,) = refused(read, text)
    assert "c.yaml" in fault


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_config_that_cannot_be_read_is_named(tmp_path, name):
    (fault,) = refused(load_config, str(tmp_path / name), [])
    assert fault.startswith(str(tmp_path / name)) and "cannot be read" in fault


def test_a_config_of_bytes_that_are_no_text_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    (fault,) = refused(load_config, str(tmp_path / "c.yaml"), [])
    assert "cannot be read" in fault


# ---- overrides


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.steps=7", lambda c: c.train.steps == 7),
        ("train.learning_rate=1e-3", lambda c: c.train.learning_rate == 1e-3),
        ("train.clip_norm=null", lambda c: c.train.clip_norm is None),
        ("output_dir=a=b", lambda c: c.output_dir == "a=b"),
        ("data.sources.1.weight=3", lambda c: c.data.sources[1].weight == 3),
        ("data.sources.0={kind: python-stdlib}", lambda c: c.data.sources[0].kind == "python-stdlib"),
        ("evaluation.every=5", lambda c: c.evaluation.every == 5),
        ("logging.tensorboard=true", lambda c: c.logging.tensorboard is True),
    ],
)
def test_an_override_is_applied(read, override, value):
    assert value(read(yaml.safe_dump(GOOD), override))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.steps", "form dotted.key=value"),
        ("=5", "form dotted.key=value"),
        ("train..steps=5", "form dotted.key=value"),
        (".=5", "form dotted.key=value"),
        ("data.sources.2.weight=1", "should be a number from 0 to 1"),
        ("data.sources.-1.weight=1", "should be a number from 0 to 1"),
        ("data.sources.²=1", "should be a number from 0 to 1"),
        ("data.sources.first.path=x", "should be a number from 0 to 1"),
        ("train.steps.more=1", "train.steps is a value"),
        ("train.steps=[1", "no valid YAML"),
        ("train.stepps=5", "did you mean 'steps'?"),
        ("train.steps=five", "train.steps should be a valid integer, not 'five'."),
        ("train.steps=1e1", "train.steps should be a valid integer"),
    ],
)
def test_a_wrong_override_is_one_fault(read, override, says):
    (fault,) = refused(read, yaml.safe_dump(GOOD), override)
    assert says in fault


def test_all_malformed_overrides_are_told(read):
    assert len(refused(read, yaml.safe_dump(GOOD), "a", "data.sources.9=1", "train.steps=3")) == 2


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[1] / "configs").glob("*.yaml")), ids=lambda f: f.name)
def test_every_config_of_the_repository_is_valid(file):
    load_config(str(file), [])


@pytest.mark.parametrize("name", ["train", "regenerate", "preflight", "data"])
def test_overrides_may_stand_before_and_after_options(command, name):
    module = "data.__main__" if name == "data" else name
    outcome = command(module, "seed=1", "--config", "nowhere.yaml", "train.steps=2")
    assert outcome.code == 2 and "nowhere.yaml" in outcome.err and "usage" not in outcome.err
