"""The objective multi_token: what a run trains and writes, that each part matters, that it resumes, and bad input."""

import dataclasses
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import listing, read_lines
from disturbed import __file__ as DISTURBED
from orbax.checkpoint import StandardCheckpointer
from safetensors.numpy import load_file

from mtp_jax.config_file import validate
from mtp_jax.data.batches import training_batches
from mtp_jax.data.frequency import frequent_tokens
from mtp_jax.data.sources import read_sources
from mtp_jax.errors import UserError
from mtp_jax.model import base as model_base
from mtp_jax.model.base import open_base
from mtp_jax.model.decoder import Decoder
from mtp_jax.mtp import adapter_folder
from mtp_jax.mtp.adapter import AdapterShape, init_adapter
from mtp_jax.mtp.adapter_folder import open_adapter
from mtp_jax.mtp.blocks import Anchors, Noise
from mtp_jax.mtp.losses import LossTerms, MultiTokenLoss
from mtp_jax.runs.folder import RunFolder
from mtp_jax.training import start as start_of_runs
from mtp_jax.training.run import _check_trainable, train

M = 3
STEP = jnp.int32(0)


@pytest.fixture(scope="session")
def base(finished):
    """A small base model: what the finished next-token run wrote."""
    return finished / "model"


def multi_token(tree, base):
    return {
        **tree,
        "objective": "multi_token",
        "model": {"path": str(base), "save_dtype": "float32"},
        "lora": {"rank": 4},
        "mtp": {"masks": M},
        "train": {**tree["train"], "anchors": 6},
        "evaluation": {"every": 4, "prompts": 3, "prompt_tokens": 8, "new_tokens": 12},
    }


@pytest.fixture
def adapter_tree(tree, base):
    """The config of a tiny multi-token run."""
    return multi_token(tree, base)


@pytest.fixture(scope="module")
def trained(make_tree, base, tmp_path_factory):
    """The adapter of such a run that ended undisturbed, and what its base held before; not to be changed."""
    before, folder = listing(base), tmp_path_factory.mktemp("trained") / "run"
    return Path(train(validate(multi_token(make_tree(folder), base), "tree"))), before


@pytest.fixture
def openings(monkeypatch):
    """How often a command read tensors and tokenizer of a base, and an adapter."""
    counts = Counter()

    def count(module, name):
        call = getattr(module, name)

        def counted(*arguments, **named):
            counts[name] += 1
            return call(*arguments, **named)

        monkeypatch.setattr(module, name, counted)

    count(model_base, "open_tensors")
    count(model_base, "load_tokenizer")
    count(adapter_folder, "read_shape")
    return counts


def test_a_run_trains_the_adapter_alone_and_writes_it(trained, base):
    out, before = trained
    run_dir = out.parent
    assert run_dir.name == "run" and out == run_dir / "adapter" and listing(base) == before
    opened = open_adapter(str(out), open_base(str(base)))
    shape, adapter = opened.shape, opened.arrays
    assert (shape.masks, shape.rank, shape.alpha, shape.gated) == (M, 4, 8.0, True)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(adapter))
    config = json.loads((out / "mtp_config.json").read_text())
    opened = open_base(str(base))
    assert config["base"] == {"name": str(base), "fingerprint": opened.fingerprint, "values": opened.values}
    assert config["training"]["trained_parameters"] == sum(leaf.size for leaf in jax.tree.leaves(adapter))
    lines = read_lines(run_dir / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    for name in ("base_loss", "sampler_loss", "lcm_loss", "real_loss", "gradient_norm"):
        assert all(np.isfinite(line[name]) for line in steps)
    held = [line for line in lines if "held_out_loss" in line]
    assert [line["step"] for line in held] == [4, 8, 12]
    assert all(len(line["held_out_agreement"]) == M for line in held)
    assert list(held[-1]["held_out_tokens_per_step"]) == ["1", "2", "3"]
    assert config["training"]["held_out"]["loss"] == held[-1]["held_out_loss"]
    for folder in (run_dir, run_dir / "best"):
        summary = json.loads((folder / "adapter" / "mtp_config.json").read_text())["training"]
        assert summary["mask_rows"] == steps[summary["held_out"]["step"] - 1]["mask_rows"]
    # A checkpoint holds the adapter and its two moments, nothing of the base.
    saved = StandardCheckpointer().restore((run_dir / "checkpoints" / "12" / "state").absolute())
    count = config["training"]["trained_parameters"]
    assert saved["trained"].keys() == {"lora", "mtp"}
    assert 3 * count <= sum(np.size(leaf) for leaf in jax.tree.leaves(saved)) < 3 * count + 10


def test_the_base_does_not_move_unless_ungated(adapter_tree, trained):
    gated = trained[0].parent
    real = [line["held_out_real_loss"] for line in read_lines(gated / "metrics.jsonl") if "held_out_loss" in line]
    assert len(set(real)) == 1
    tree = {**adapter_tree, "lora": {"rank": 4, "gated": False}, "output_dir": adapter_tree["output_dir"] + "-free"}
    free = Path(train(validate(tree, "tree"))).parent
    moved = [line["held_out_real_loss"] for line in read_lines(free / "metrics.jsonl") if "held_out_loss" in line]
    assert len(set(moved)) == 3


def test_an_adapter_can_be_trained_on(adapter_tree, trained, base, openings):
    first, _ = trained
    tree = {**adapter_tree, "output_dir": adapter_tree["output_dir"] + "-more"}
    tree["model"] = {**tree["model"], "adapter": str(first)}
    tree["mtp"] = {"masks": 2}
    tree["train"] = {**tree["train"], "steps": 1, "warmup_steps": 0, "learning_rate": 1e-9}
    more = Path(train(validate(tree, "tree")))
    assert openings == {"open_tensors": 1, "load_tokenizer": 1, "read_shape": 1}
    assert open_adapter(str(more), open_base(str(base))).shape.masks == 2
    a, b = load_file(first / "adapter.safetensors"), load_file(more / "adapter.safetensors")
    assert np.allclose(a["mtp.masks"][:2], b["mtp.masks"], atol=1e-7)
    assert np.allclose(a["lora.layers.q.b"], b["lora.layers.q.b"], atol=1e-7)


def test_a_killed_run_ends_like_an_undisturbed_one(adapter_tree, trained, write_config, start, finish, command):
    undisturbed = trained[0].parent
    config, folder = write_config(adapter_tree), Path(adapter_tree["output_dir"])
    script = [os.fspath(DISTURBED), "line", "9", "kill"]  # by then the checkpoint of step 3 is whole
    assert finish(start("train", "--config", config, script=script)).code == -9
    ended = command("train", "--config", config)
    assert ended.code == 0 and "resuming" in ended.err, ended
    assert (folder / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
    a, b = (load_file(run / "adapter" / "adapter.safetensors") for run in (folder, undisturbed))
    assert all(np.array_equal(a[key], b[key]) for key in a) and a.keys() == b.keys()


def ends_alike_from_step_9(config, out):
    """A finished run that lost its last checkpoint ends as it did before, bit for bit."""
    before, files = (out.parent / "metrics.jsonl").read_bytes(), load_file(out / "adapter.safetensors")
    shutil.rmtree(out.parent / "checkpoints" / "12")
    train(config)
    assert (out.parent / "metrics.jsonl").read_bytes() == before
    again = load_file(out / "adapter.safetensors")
    assert all(np.array_equal(again[key], files[key]) for key in files) and again.keys() == files.keys()


def test_a_run_keeps_the_draft_vocabulary_that_it_began_with(adapter_tree, base, monkeypatch):
    adapter_tree["mtp"]["vocabulary"] = 40
    config = validate(adapter_tree, "tree")
    out, opened = Path(train(config)), open_base(str(base))
    found = open_adapter(str(out), opened)
    ids = frequent_tokens(read_sources(config.data)[0], [1.0], opened.tokenizer, 40, opened.g.V, opened.stops)
    assert found.shape.vocabulary == 40 and np.array_equal(found.arrays["vocabulary"], ids)
    trained, summary = {key: found.arrays[key] for key in ("lora", "mtp")}, found.config["training"]
    assert summary["trained_parameters"] == sum(leaf.size for leaf in jax.tree.leaves(trained))
    saved = StandardCheckpointer().restore((out.parent / "checkpoints" / "12" / "state").absolute())
    assert saved["trained"].keys() == {"lora", "mtp"} and "vocabulary" not in saved["trained"]["mtp"]
    # Resumed from step 9, whatever would be counted now.
    monkeypatch.setattr(start_of_runs, "frequent_tokens", lambda *_: np.arange(40, dtype=np.int32))
    ends_alike_from_step_9(config, out)
    # And an adapter that is trained on keeps its own.
    adapter_tree["output_dir"] += "-more"
    adapter_tree["model"]["adapter"] = str(out)
    adapter_tree["train"] |= {"steps": 1, "warmup_steps": 0}
    adapter_tree["evaluation"] = {}
    more = Path(train(validate(adapter_tree, "tree")))
    assert np.array_equal(load_file(more / "adapter.safetensors")["mtp.vocabulary"], ids)
    for other in (None, 41):
        adapter_tree["mtp"]["vocabulary"] = other
        with pytest.raises(UserError, match=rf"mtp\.vocabulary={other} differs from 40, which model\.adapter"):
            train(validate(adapter_tree, "tree"))


def test_noise_rows_train_the_lora_alone_and_a_run_resumes_bit_for_bit(adapter_tree, base):
    adapter_tree["mtp"] |= {"rows": "noise", "sampler": "none", "noise": {"low": 3}}
    config = validate(adapter_tree, "tree")
    out, opened = Path(train(config)), open_base(str(base))
    found = open_adapter(str(out), opened)
    assert found.shape.noise == Noise(3, opened.g.V) and found.arrays.keys() == {"lora"}
    assert all(np.any(leaf) for leaf in jax.tree.leaves(found.arrays))
    held = found.config["training"]["held_out"]
    assert list(held["tokens_per_step"]) == list(held["tokens_per_pass_of_two"]) == ["1", "2", "3"]
    assert all(1 <= figure <= 2.5 for figure in held["tokens_per_pass_of_two"].values())
    # Resumed from step 9 it draws the same noise.
    ends_alike_from_step_9(config, out)
    # It can be trained on with the same noise, and with no other.
    adapter_tree["output_dir"] += "-more"
    adapter_tree["model"]["adapter"] = str(out)
    adapter_tree["train"] |= {"steps": 1, "warmup_steps": 0}
    adapter_tree["mtp"]["masks"], adapter_tree["evaluation"] = 2, {}
    assert open_adapter(train(validate(adapter_tree, "tree")), opened).shape.masks == 2
    for rows in ({"noise": {"low": 4}}, {"rows": "learned", "noise": None}):
        with pytest.raises(UserError, match=r"mtp\.noise=.* differs from Noise\(low=3, .*, which model\.adapter"):
            train(validate(adapter_tree | {"mtp": adapter_tree["mtp"] | rows}, "tree"))


def test_noise_is_of_the_models_tokens(adapter_tree, base):
    V = open_base(str(base)).g.V
    for noise in ({"high": V + 1}, {"low": V}):
        adapter_tree["mtp"] = {"rows": "noise", "sampler": "none", "noise": noise}
        with pytest.raises(
            UserError, match=rf"mtp\.noise: ids from .* should be some of the model's {V}, 0 to {V - 1}"
        ):
            train(validate(adapter_tree, "tree"))


def test_the_draft_vocabulary_counts_continuations_and_what_they_continue(adapter_tree, base, tmp_path, monkeypatch):
    written, asked = tmp_path / "continuations.jsonl", []
    written.write_text(json.dumps({"prompt": "ab", "completion": "cd"}) + "\n")
    adapter_tree["data"]["continuations"] = {"path": str(written), "count": 1, "new_tokens": 4, "prompt_tokens": 4}
    adapter_tree["mtp"]["vocabulary"] = 40
    sources = [{**adapter_tree["data"]["sources"][0], "weight": weight} for weight in (1.0, 3.0)]
    adapter_tree["data"]["sources"] = sources
    config = validate(adapter_tree, "tree")

    def counted(documents, shares, *_):
        asked.append((len(documents), shares, documents[0][0].text()))
        return np.arange(40, dtype=np.int32)

    monkeypatch.setattr(start_of_runs, "frequent_tokens", counted)
    run = RunFolder(str(tmp_path / "counted"))
    run.path.mkdir()
    ids = start_of_runs.draft_vocabulary(config, open_base(str(base)), None, read_sources(config.data)[0], [1.0], run)
    assert asked == [(3, [1.0, 0.25, 0.75], "abcd")] and ids.tolist() == list(range(40))


@pytest.mark.parametrize("ratio", [0.5, 64.0])
def test_any_scale_of_the_matrices_trains(adapter_tree, ratio):
    adapter_tree["lora"]["alpha"] = ratio * adapter_tree["lora"]["rank"]
    adapter_tree["train"]["steps"] = 5
    adapter_tree["evaluation"] = {}
    out = Path(train(validate(adapter_tree, "tree")))
    lines = read_lines(out.parent / "metrics.jsonl")
    assert len(lines) == 5 and all(np.isfinite(line["loss"]) and line["gradient_norm"] > 0 for line in lines)
    assert all(np.isfinite(array).all() for array in load_file(out / "adapter.safetensors").values())


def test_mask_rows_are_counted_whatever_is_logged(adapter_tree, base):
    adapter_tree["mtp"] |= {"grow_steps": 4, "target": "data"}
    adapter_tree |= {"logging": {"every": 5}, "evaluation": {}}
    config = validate(adapter_tree, "tree")
    out = Path(train(config))
    batches, _ = training_batches(
        read_sources(config.data)[0], [1.0], open_base(str(base)).tokenizer, 4, 32, config.seed, Anchors(6, config.seed)
    )
    expected, so_far = [0], 0
    for masks, batch in zip([1, 1, 2, 2] + [3] * 8, batches, strict=False):
        for b, anchors in enumerate(batch["anchors"]):
            of = batch["segments"][b], batch["supervised"][b]
            for anchor in anchors[anchors >= 0]:
                rows = range(anchor + 1, min(anchor + 1 + masks, 32))
                so_far += sum(bool(of[0][row] == of[0][anchor] and of[1][row]) for row in rows)
        expected.append(so_far)
    whole = (out.parent / "metrics.jsonl").read_bytes()
    steps = read_lines(out.parent / "metrics.jsonl")
    assert [(line["step"], line["mask_rows"]) for line in steps] == [(step, expected[step]) for step in (5, 10, 12)]
    # From step 9, of which metrics.jsonl has no line.
    shutil.rmtree(out.parent / "checkpoints" / "12")
    train(config)
    assert (out.parent / "metrics.jsonl").read_bytes() == whole


# ---- each part matters


class Lesson:
    """A short training of an adapter on a base that knows its text, in a few variants."""

    def __init__(self, base, corpus):
        config = {"sources": [{"kind": "text", "path": str(corpus)}], "held_out": 0.2}
        tree = {"objective": "next_token", "output_dir": "x", "model": {"path": "x"}, "data": config}
        tree["train"] = {"steps": 1, "batch_size": 1, "sequence_length": 8, "learning_rate": 1.0}
        self.training, _ = read_sources(validate(tree, "tree").data)
        opened = open_base(str(base))
        self.g, self.tokenizer = opened.g, opened.tokenizer
        self.frozen = {"params": opened.load()}
        self.steps, self.measure = {}, {}

    def batches(self):
        return training_batches(self.training, [1.0], self.tokenizer, 8, 32, 0, Anchors(12, 0))[0]

    def loss(self, terms, sampler="residual"):
        shape = AdapterShape(M, 4, 8.0, ("q", "k", "v", "o", "gate", "up", "down"), sampler)
        return MultiTokenLoss(Decoder(self.g), shape, terms, 4096, 4096)

    def train(self, terms, sampler="residual", shift=0, steps=40):
        """Adam at a fixed rate; `shift` moves every target by so many tokens."""
        import optax

        loss, tx = self.loss(terms, sampler), optax.adam(1e-2)
        table = self.frozen["params"]["embed"]["embedding"]
        adapter = init_adapter(self.g, loss.shape, table, jax.random.key(0))

        def step(adapter, state, batch):
            share = lambda a: loss.loss(a, self.frozen, batch, loss.totals(batch), STEP)  # noqa: E731
            gradient, _ = jax.grad(share, has_aux=True)(adapter)
            updates, state = tx.update(gradient, state)
            return jax.tree.map(jnp.add, adapter, updates), state

        state, step = tx.init(adapter), self.steps.setdefault((terms, sampler), jax.jit(step))
        for _, batch in zip(range(steps), self.batches(), strict=False):
            batch.pop("documents")
            if shift:
                batch["labels"] = np.roll(batch["labels"], -shift, axis=1)
            adapter, state = step(adapter, state, batch)
        return adapter

    def judge(self, adapter, sampler="residual"):
        """All figures of an adapter under the same yardstick: soft targets and every term, and hard data labels."""
        rulers = [self.loss(LossTerms(target=target), sampler) for target in ("base_soft", "data")]
        if sampler not in self.measure:
            self.measure[sampler] = jax.jit(
                lambda a, batch: [(r.sums(a, self.frozen, batch, STEP), r.totals(batch)) for r in rulers]
            )
        total = None
        for _, batch in zip(range(4), self.batches(), strict=False):
            batch.pop("documents")
            part = self.measure[sampler](adapter, batch)
            total = part if total is None else jax.tree.map(jnp.add, total, part)
        soft, hard = (ruler.values(*of)[1] for ruler, of in zip(rulers, total, strict=True))
        return soft | {f"data_{name}": value for name, value in hard.items()}


@pytest.fixture(scope="module")
def lesson(make_tree, tmp_path_factory):
    """A base that knows sentences whose order is fixed and whose words are chance, and the folder of these."""
    folder = tmp_path_factory.mktemp("lesson")
    texts = folder / "texts"
    texts.mkdir()
    words = [("one", "uno"), ("two", "dos"), ("three", "tres"), ("four", "cuatro"), ("five", "cinco"), ("six", "seis")]
    random = np.random.default_rng(0)
    for i in range(60):
        turned = (words[i % 6 :] + words[: i % 6]) * 5
        (texts / f"{i:02}.txt").write_text(" ".join(pair[random.integers(2)] for pair in turned))
    tree = make_tree(folder / "run")
    tree["data"] = {"sources": [{"kind": "text", "path": str(texts)}], "held_out": 0.2}
    tree["train"] |= {"steps": 120, "learning_rate": 1e-2, "batch_size": 8}
    tree["evaluation"], tree["checkpoints"] = {}, {"every": 1000}
    return Lesson(Path(train(validate(tree, "tree"))), texts)


def test_each_part_matters(lesson):
    full = LossTerms(target="base_soft")
    judged = {
        "untrained": lesson.judge(lesson.train(full, steps=0)),
        "full": lesson.judge(lesson.train(full)),
        "no consistency": lesson.judge(lesson.train(dataclasses.replace(full, lcm_weight=0.0))),
        "no sampler": lesson.judge(lesson.train(full, "none"), "none"),
        "data targets": lesson.judge(lesson.train(LossTerms(target="data", lcm_weight=0.0))),
        "shifted": lesson.judge(lesson.train(LossTerms(target="data", lcm_weight=0.0), shift=1)),
    }
    mean = {name: float(np.mean(figures["agreement_base"])) for name, figures in judged.items()}
    assert mean["full"] > mean["untrained"] + 0.2
    # The sampler, which knows the token before, foresees more than the base head on the same latents.
    assert np.mean(judged["full"]["agreement"]) >= mean["full"]
    assert "agreement" not in judged["no sampler"] and "sampler_loss" not in judged["no sampler"]
    # Without the consistency loss the latents stay further from those of the real rows.
    assert judged["no consistency"]["lcm_loss"] > 1.2 * judged["full"]["lcm_loss"]
    # Training on the base's own distribution serves that better, and the data worse, than training on the data.
    soft, hard = judged["no consistency"], judged["data targets"]
    assert soft["base_loss"] / hard["base_loss"] < 0.98 * soft["data_base_loss"] / hard["data_base_loss"]
    # Trained towards the token after, masks no longer predict theirs.
    assert mean["shifted"] < mean["data targets"] - 0.2
    assert judged["shifted"]["data_base_loss"] > judged["data targets"]["data_base_loss"] + 0.5


# ---- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["mtp.masks=0"], "mtp.masks should be greater than or equal to 1"),
        (["mtp.masks=40"], "train.sequence_length=32 is shorter than a block"),
        (["train.anchors=33"], "train.anchors=33 should be from 1 to train.sequence_length"),
        (["lora.targets=[q,x]"], "lora.targets.1 should be"),
        (["mtp.samplers=paper"], "did you mean 'sampler'"),
        (["objective=next_token"], "belongs to objective: multi_token"),
        (["model.adapter=nowhere/at/all"], "no such folder"),
        (["mtp.vocabulary=301"], "mtp.vocabulary=301 should be at most 300, the model's tokens, and at least 1"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(adapter_tree, write_config, command, changes, message):
    ended = command("train", "--config", write_config(adapter_tree), *changes)
    assert ended.code == 2 and any(message in line for line in ended.errors), ended
    assert "Traceback" not in ended.err


def test_an_adapter_that_does_not_fit_is_refused(adapter_tree, trained, write_config, command, tmp_path, base):
    adapter, _ = trained
    tree = {**adapter_tree, "output_dir": str(tmp_path / "second")}
    for changes, message in [
        (["lora.rank=8"], "lora.rank=8 differs from 4"),
        (["mtp.masks=5"], "mtp.masks=5 is more than the 3"),
    ]:
        ended = command("train", "--config", write_config(tree), "--adapter", adapter, *changes)
        assert ended.code == 2 and any(message in line for line in ended.errors), ended
    other = tmp_path / "other"
    shutil.copytree(base, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    from safetensors.numpy import save_file

    save_file(tensors, other / "model.safetensors")
    for name in ("evaluate", "generate"):
        more = ["--prompt", "a"] if name == "generate" else ["--text", tree["data"]["sources"][0]["path"]]
        ended = command(name, "--model", other, "--adapter", adapter, *more)
        assert ended.code == 2 and len(ended.errors) == 1 and "was trained for" in ended.errors[0], ended
        assert str(base) in ended.errors[0] and "other" in ended.errors[0]


def test_data_without_room_for_a_block_is_refused():
    with pytest.raises(UserError, match="no supervised token behind which a block of masks could stand"):
        _check_trainable({"anchors": np.full((2, 4), -1)}, None)


def test_evaluate_reports_what_the_run_did(adapter_tree, trained, command, base, openings):
    out, _ = trained
    held = json.loads((out / "mtp_config.json").read_text())["training"]["held_out"]
    text = adapter_tree["data"]["sources"][0]["path"]
    ended = command(
        "evaluate", "--model", base, "--adapter", out, "--text", text, "--held-out", 0.2,
        "--sequence-length", 32, "--batch-size", 4, "--json",
    )  # fmt: skip
    assert ended.code == 0, ended
    assert openings == {"open_tensors": 1, "load_tokenizer": 1, "read_shape": 1}
    figures = json.loads(ended.out)
    assert figures["base_loss"] == pytest.approx(held["base_loss"], rel=0.2)  # other anchors, the same documents
    short = command("evaluate", "--model", base, "--adapter", out, "--text", text, "--sequence-length", M)
    assert short.code == 2 and len(short.errors) == 1 and "is shorter than a block" in short.errors[0], short
    table = command("evaluate", "--model", base, "--adapter", out, "--text", text, "--sequence-length", 32)
    assert "estimated tokens per step" in table.out and "agreement with the base model" in table.out
