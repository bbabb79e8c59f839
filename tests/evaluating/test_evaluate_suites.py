"""`python -m mtp_jax.evaluate --suite`: figures recounted from the completions, and how it refuses."""

import json
import math
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import mtp_jax
from mtp_jax.decoding.auto import Choice
from mtp_jax.decoding.generator import Completion
from mtp_jax.decoding.plan import quadratic
from mtp_jax.errors import UserError
from mtp_jax.evaluating import decoders
from mtp_jax.evaluating.decoders import Decoder, parse_names
from mtp_jax.evaluating.measure import compared, decode_in_turns, interval
from mtp_jax.evaluating.ties import Gaps, departure
from mtp_jax.model.base import open_base

MODEL = "bundled:stdlib-5m"
PROMPTS = ["import os\n\n\ndef main(", "class Reader:\n    def read(self", "for name in sorted("]
NEW = 16


def completion(tokens, steps, seconds=1.0, prompt=(1, 2)):
    return Completion(tokens, [0] * len(tokens), steps, [], 0.0, seconds, list(prompt))


# ---- names


def test_names_of_decoders():
    named = parse_names("quadratic:2..4, linear:1,blocks:2,1,0,lookup:8,transformers lookup,auto,quadratic:3")
    assert named == [
        *("none", "quadratic:2", "quadratic:3", "quadratic:4", "linear:1", "blocks:2,1,0", "lookup:8"),
        *("transformers lookup", "auto"),
    ]


@pytest.mark.parametrize(
    "name", ["cubic:2", "linear:0", "lookup:0", "lookup", "draft:x", "blocks:0,1", "quadratic:0..2", "quadratic:4..2"]
)
def test_an_unknown_name_is_refused_with_the_list(name):
    with pytest.raises(UserError, match="There are none, auto, linear:M") as error:
        parse_names(f"none,{name}")
    assert len(error.value.faults) == 1


# ---- statistics


def test_the_interval_holds_the_mean_of_most_samples():
    draw, inside = np.random.default_rng(0), 0
    for trial in range(100):
        steps = draw.integers(5, 60, size=60)
        tokens = [int(count) for count in np.round(steps * draw.choice([1.5, 2.0, 3.0], size=60))]
        found = interval([completion([7] * (t + 1), int(s)) for t, s in zip(tokens, steps, strict=True)], seed=trial)
        assert found["low"] <= found["mean"] <= found["high"]
        inside += found["low"] <= (1.5 + 2 + 3) / 3 <= found["high"]
    assert 85 <= inside <= 100


def test_one_prompt_has_an_interval_of_no_width():
    assert interval([completion([7] * 11, 4)]) == {"mean": 2.5, "low": 2.5, "high": 2.5}


def test_decoders_take_turns_and_get_prompts_of_like_length_together():
    calls = []

    def runner(name):
        def run(prompts):
            calls.append((name, [len(p) for p in prompts]))
            return [completion(list(p[:1]), 1) for p in prompts]

        return run

    prompts = [[n] * length for n, length in enumerate((300, 5, 310, 6))]
    found = decode_in_turns([Decoder(name, runner(name), None) for name in "ab"], prompts, 2, 2)
    assert [name for name, _ in calls] == ["a", "b", "a", "b"]
    assert {tuple(lengths) for _, lengths in calls} == {(5, 6, 300, 310)}
    assert all([c.token_ids for c in done] == [[0], [1], [2], [3]] for rounds in found.values() for done in rounds)


# ---- identical output


def test_departures():
    assert departure([1, 2], [1, 2]) is None
    assert (departure([1, 3], [1, 2]), departure([1], [1, 2]), departure([1, 2], [1])) == (1, 1, 1)


def test_only_a_departure_between_logits_that_are_close_is_a_tie():
    done = [completion([1, 2], 1), completion([1, 3], 1), completion([4], 1)]
    gaps = {(1, 2, 1): 1e-6, (1, 2): 0.3}
    found = compared(done, [[1, 2], [1, 2], [5]], lambda ids: gaps[tuple(ids)], exact=True)
    assert (found["same"], found["of"]) == (1, 3)
    assert found["ties"] == ["prompt 2, new token 2: gap 1.0e-06"]
    assert found["faults"] == ["prompt 3, new token 1: gap 3.0e-01"]
    rounded = compared(done, [[1, 2], [1, 2], [5]], lambda ids: gaps[tuple(ids)], exact=False)
    assert len(rounded["ties"]) == 2 and not rounded["faults"]


def test_gaps_are_those_of_transformers(small_folder):
    import torch
    from transformers import AutoModelForCausalLM

    gap = Gaps(open_base(str(small_folder)))
    model = AutoModelForCausalLM.from_pretrained(small_folder).eval()
    for ids in ([5, 6, 7], list(range(3, 40))):
        with torch.no_grad():
            best = model(torch.tensor([ids])).logits[0, -1].topk(2).values
        assert math.isclose(gap(ids), float(best[0] - best[1]), abs_tol=1e-5)


# ---- the command


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "mine.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return file


@pytest.fixture
def evaluated(command, prompts, tmp_path, monkeypatch):
    """A function that runs the command with an adapter and returns what it wrote."""
    monkeypatch.setattr(decoders, "choose_plan", lambda *_, **__: Choice(quadratic(2), False, {}))

    def run(*arguments):
        fixed = (
            "--model",
            MODEL,
            "--adapter",
            MODEL,
            "--suite",
            prompts,
            "--new-tokens",
            NEW,
            "--out",
            tmp_path / "out",
        )
        outcome = command("evaluate", *fixed, *arguments)
        assert outcome.code == 0, outcome
        return json.loads((tmp_path / "out" / "results.json").read_text()), outcome

    return run


def test_figures_are_those_of_the_completions(evaluated, tmp_path):
    results, outcome = evaluated(
        *("--plans", "quadratic:2,lookup:4,auto", "--batch-sizes", "1,2", "--rounds", 2, "--estimate")
    )
    rows = {(row["decoder"], row["batch_size"]): row for row in results["rows"]}
    assert list(rows) == [(name, size) for size in (1, 2) for name in ("none", "quadratic:2", "lookup:4", "auto")]
    generator = mtp_jax.load(MODEL, adapter=MODEL, dtype="float32")
    plain = generator(PROMPTS, NEW)
    drafted = generator.using(plan=quadratic(2))(PROMPTS, NEW, batch_size=1)
    assert [c.token_ids for c in drafted] == [c.token_ids for c in plain]
    wanted = sum(len(c.token_ids) - 1 for c in drafted) / sum(c.steps for c in drafted)
    for size in (1, 2):
        row = rows["quadratic:2", size]
        assert math.isclose(row["tokens_per_step"]["mean"], wanted) and wanted > 1.1
        assert row["tokens"] == sum(len(c.token_ids) for c in plain)
        assert (row["masks"], row["rows"], row["plan"]) == (2, 9, None)
        # Drafts beyond the last token count as refused in one and as not there in the other.
        assert math.isclose(row["estimate"], wanted, rel_tol=0.03)
        histogram = np.sum([c.accepted for c in drafted], axis=0)
        assert row["acceptance"] == pytest.approx(
            [histogram[1:].sum() / histogram.sum(), histogram[2] / histogram.sum()]
        )
    assert rows["auto", 1]["plan"] == "quadratic:2" and rows["none", 1]["acceptance"] is None
    for row in rows.values():
        assert row["identical"] == {"same": 3, "of": 3, "ties": [], "faults": []}
        assert (row["speedup"] is None) == (row["decoder"] == "none")
        assert row["tokens_per_second"]["low"] <= row["tokens_per_second"]["median"] and row["score"] is None
    shown = results["samples"][0]
    assert "".join(text for text, _ in shown["pieces"]) == generator.text(drafted[0])
    assert (shown["prompt"], shown["tokens"], shown["steps"]) == (PROMPTS[0], NEW, drafted[0].steps)
    assert {step for _, step in shown["pieces"]} <= set(range(drafted[0].steps + 1))
    assert (tmp_path / "out" / "report.html").is_file() and "quadratic:2" in outcome.out


@pytest.mark.parametrize("count, apart", [(1, True), (2, True), (3, False), (0, False)])
def test_auto_is_calibrated_on_other_questions_where_there_are_any(evaluated, monkeypatch, count, apart):
    given = []
    monkeypatch.setattr(
        decoders, "choose_plan", lambda g, prompts, *_, **__: given.extend(prompts) or Choice(quadratic(1), False, {})
    )
    results, _ = evaluated("--plans", "auto", "--count", count, "--rounds", 1)
    assert [row["calibrated_apart"] for row in results["rows"]] == [None, apart]
    asked = {sample["prompt"] for sample in results["samples"]}  # at most two are shown
    wanted = set(PROMPTS) - asked if apart else set(PROMPTS)
    generator = mtp_jax.load(MODEL, dtype="float32")
    assert sorted(given) == sorted(generator.encode(prompt) for prompt in wanted)


def test_a_wrong_decoder_is_a_fault(evaluated, monkeypatch):
    named = decoders.Decoders.named

    def wrong(self, name, size, calibration):
        found = named(self, name, size, calibration)
        if name != "quadratic:1":
            return found

        def run(prompts):
            done = found.run(prompts)
            return [Completion(c.token_ids[:-1], c.emitted_by[:-1], *list(vars(c).values())[2:]) for c in done]

        return Decoder(name, run, found.plan)

    monkeypatch.setattr(decoders.Decoders, "named", wrong)
    results, _ = evaluated("--plans", "quadratic:1", "--rounds", 1)
    assert [row["identical"]["same"] for row in results["rows"]] == [3, 0]
    assert len(results["rows"][1]["identical"]["faults"]) == 3


def test_a_scored_suite(command, tmp_path, small_folder):
    folder = shutil.copytree(small_folder, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"question": "the cat", "answer": "#### 7"}) + "\n")
    fixed = ("--model", folder, "--suite", f"gsm8k={file}", "--rounds", 1, "--new-tokens", 4, "--out", tmp_path / "out")
    assert command("evaluate", *fixed).code == 0
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert row["decoder"] == "none" and row["score"] in (0, 1)


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--suite", "gsm9k", "--out", "{new}"], "--suite gsm9k: unknown; give a file of prompts, or one of gsm8k"),
        (["--suite", "{prompts}"], "--suite writes a report: give --out too"),
        (["--suite", "{prompts}", "--out", "{used}"], "is there already and not empty"),
        (["--suite", "{prompts}", "--out", "{new}", "--rounds", "0"], "--rounds 0: should be at least 1"),
        (["--suite", "{prompts}", "--out", "{new}", "--count", "-1"], "--count -1: should be at least 0"),
        (["--suite", "{prompts}", "--out", "{new}", "--batch-sizes", "1,x"], "--batch-sizes 1,x: should be numbers"),
        (["--suite", "{prompts}", "--out", "{new}", "--plans", "cubic:1"], "--plans cubic:1: unknown plan"),
        (["--suite", "{prompts}", "--out", "{new}", "--plans", "quadratic:9"], "quadratic:9: takes 9 masks, but"),
        (["--suite", "{prompts}", "--out", "{new}", "--plans", "draft:2"], "give --draft-model too"),
        (["--suite", "{prompts}", "--out", "{new}", "--plans", "draft:2", "--draft-model", "{other}"], "tokenizer"),
        (["--suite", "{empty}", "--out", "{new}"], "holds no prompts"),
        (["--suite", "{pointless}", "--out", "{new}"], "needs a string 'prompt'"),
        (["--out", "{new}"], "--out, --plans and --draft-model belong to an evaluation on suites"),
    ],
)
def test_faults_are_told_in_one_line(command, prompts, tmp_path, small_folder, arguments, said):
    used, empty, pointless = tmp_path / "used", tmp_path / "empty.jsonl", tmp_path / "pointless.jsonl"
    used.mkdir()
    (used / "results.json").write_text("{}")
    empty.write_text("")
    pointless.write_text('{"answer": "1"}\n')
    places = {"prompts": prompts, "used": used, "new": tmp_path / "new", "other": small_folder}
    places |= {"empty": empty, "pointless": pointless}
    arguments = [argument.format(**places) for argument in arguments]
    outcome = command("evaluate", "--model", MODEL, "--adapter", MODEL, *arguments)
    assert outcome.code == 2 and len(outcome.errors) == 1 and said in outcome.errors[0], outcome
    assert not (tmp_path / "new").exists() and "Traceback" not in outcome.err


def test_an_adapter_of_another_base_is_refused(command, prompts, tmp_path, small_folder):
    outcome = command(
        *("evaluate", "--model", small_folder, "--adapter", MODEL, "--suite", prompts, "--out", tmp_path / "new")
    )
    assert outcome.code == 2 and len(outcome.errors) == 1 and "was trained for bundled" in outcome.errors[0], outcome


def test_bfloat16_differences_are_ties(small_folder):
    base = open_base(str(small_folder))
    assert compared([completion([1], 1)], [[2]], Gaps(base), exact=jnp.dtype("bfloat16") == jnp.float32)["faults"] == []
