"""Settings of a `generation_config.json` change the output as they do in transformers, with and without drafts."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation import logits_process as theirs

import mtp_jax
from mtp_jax.decoding.options import Sampling
from mtp_jax.decoding.plan import parse_plan
from mtp_jax.decoding.processors import read_settings
from mtp_jax.errors import UserError
from mtp_jax.locate import find_folder

V, STOPS, PROMPT = 12, (3, 7), 4
SETTINGS = {
    "penalty": {"repetition_penalty": 1.3},
    "reward": {"repetition_penalty": 0.8},
    "pairs": {"no_repeat_ngram_size": 2},
    "triples": {"no_repeat_ngram_size": 3},
    "singles": {"no_repeat_ngram_size": 1},
    "least new": {"min_new_tokens": 6},
    "least": {"min_length": 9},
    "suppressed": {"suppress_tokens": [0, 5]},
    "all": {
        "repetition_penalty": 1.1,
        "no_repeat_ngram_size": 3,
        "min_new_tokens": 5,
        "min_length": 2,
        "suppress_tokens": [11],
    },
}


def reference(settings):
    """transformers' processors, in its order."""
    made = {
        "repetition_penalty": theirs.RepetitionPenaltyLogitsProcessor,
        "no_repeat_ngram_size": theirs.NoRepeatNGramLogitsProcessor,
        "min_length": lambda n: theirs.MinLengthLogitsProcessor(n, list(STOPS)),
        "min_new_tokens": lambda n: theirs.MinNewTokensLengthLogitsProcessor(PROMPT, n, list(STOPS)),
        "suppress_tokens": theirs.SuppressTokensLogitsProcessor,
    }
    return theirs.LogitsProcessorList([make(settings[name]) for name, make in made.items() if name in settings])


@pytest.mark.quick
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("d", [0, 3])
def test_each_row_is_processed_in_its_own_context(name, d):
    settings, rng = SETTINGS[name], np.random.default_rng(0)
    processors, process = read_settings(settings, V, "here").processors, reference(settings)
    tokens = rng.integers(0, V, (3, 16)).astype(np.int32)
    tokens[0, :10] = [1, 2, 1, 2, 4, 1, 2, 4, 1, 2]
    drafts = np.array([[4, 1, 2], [0, 0, 0], [5, 9, 5]], np.int32)[:, :d]
    scores = rng.standard_normal((3, d + 1, V)).astype(np.float32)
    for length in ([10, 5, 4], [8, 11, 1]):
        ours = processors(*map(jnp.asarray, (scores, tokens, length, drafts, [PROMPT] * 3, STOPS)))
        for b in range(3):
            for row in range(d + 1):
                context = [*tokens[b, : length[b]], *drafts[b, :row]]
                wanted = process(torch.tensor([context]), torch.tensor(scores[b, row][None].copy()))[0].numpy()
                np.testing.assert_array_equal(np.asarray(ours)[b, row], wanted, err_msg=f"{length} {b} {row}")


@pytest.mark.quick
def test_absent_and_neutral_settings_are_none():
    defaults = GenerationConfig._get_default_generation_params()
    for config in ({}, defaults, GenerationConfig().to_dict(), {"eos_token_id": [1, 2], "max_length": 9}):
        assert read_settings(config, V, "here") == (None, None, (), ())


@pytest.mark.quick
@pytest.mark.parametrize(
    ("config", "sampling"),
    [
        ({"do_sample": True}, Sampling(1.0, 50, 1.0)),  # transformers' defaults
        ({"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8}, Sampling(0.7, 20, 0.8)),
        ({"do_sample": True, "top_k": 0}, Sampling(1.0, None, 1.0)),
        ({"temperature": 0.7}, None),
    ],
)
def test_how_a_base_samples_is_read_as_transformers_does(config, sampling):
    assert read_settings(config, V, "here").sampling == sampling


@pytest.mark.quick
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"repetition_penalty": "much"}, "wrong kind"),
        ({"repetition_penalty": -1.0}, "above 0"),
        ({"suppress_tokens": [V]}, "ends at 11"),
        ({"suppress_tokens": 3}, "wrong kind"),
        ({"do_sample": True, "temperature": -1}, "temperature -1.0"),
        ({"do_sample": True, "top_k": 1e400}, "wrong kind"),
    ],
)
def test_settings_that_are_none_are_refused_by_name(config, message):
    with pytest.raises(UserError, match=message) as refused:
        read_settings(config, V, "here")
    assert all(fault.startswith("here: ") for fault in refused.value.faults)


@pytest.mark.quick
def test_whatever_else_changes_the_output_is_named():
    config = {"num_beams": 4, "min_p": 0.1, "bad_words_ids": [[1]], "penalty_alpha": 0.6, "stop_strings": ["x"]}
    settings = read_settings(config, V, "here")
    named = {"num_beams=4", "bad_words_ids=[[1]]", "penalty_alpha=0.6", "stop_strings=['x']"}
    assert set(settings.ignored) == named
    assert settings.ignored_sampling == ("min_p=0.1",)


@pytest.mark.quick
def test_no_setting_of_transformers_is_forgotten():
    """What is neither computed nor named makes no difference, also to the code that an export holds."""
    from mtp_jax.exporting.custom_generate import generate

    samples = {"bad_words_ids": [[1]], "suppress_tokens": [1], "stop_strings": ["x"], "min_p": 0.5, "top_h": 0.5}
    for name in vars(GenerationConfig()):
        if name.startswith(("_", "output_")):
            continue
        config = GenerationConfig()
        setattr(config, name, samples.get(name, 2))
        try:
            generate._refuse(config)
            refused = False
        except ValueError:
            refused = True
        settings = read_settings({name: getattr(config, name)}, V, "here")
        assert refused == bool(settings.ignored + settings.ignored_sampling), name


@pytest.fixture(scope="module")
def repetitive(tmp_path_factory):
    """A copy of the bundled model whose generation config asks for every processor."""
    folder = tmp_path_factory.mktemp("repetitive") / "model"
    shutil.copytree(find_folder("bundled:stdlib-5m"), folder)
    asked = {**SETTINGS["all"], "repetition_penalty": 1.3, "min_new_tokens": 24, "suppress_tokens": [11, 12]}
    file = folder / "generation_config.json"
    kept = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**kept, **asked, "do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}))
    return folder


@pytest.mark.parametrize("plan", ["none", "linear:3", "quadratic:2"])
def test_greedy_output_is_that_of_transformers(repetitive, plan):
    adapter = None if plan == "none" else str(repetitive / "adapter")
    generator = mtp_jax.load(str(repetitive), adapter=adapter, plan=parse_plan(plan), dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(repetitive, dtype=torch.float32)
    plainly = mtp_jax.load(str(repetitive), dtype="float32", generation_config=False)
    differ = 0
    for text in ("def main():\n", "import os\nimport sys\n", "for i in range(10):\n    print(i)\n"):
        ids = generator.encode(text)
        mask = torch.ones(1, len(ids), dtype=torch.long)
        wanted = model.generate(torch.tensor([ids]), attention_mask=mask, max_new_tokens=40, do_sample=False)
        ours = generator.complete([ids], 40, 1)[0].token_ids
        assert ours == wanted[0, len(ids) :].tolist(), text
        differ += plan == "none" and ours != plainly.complete([ids], 40, 1)[0].token_ids
    assert differ or plan != "none"  # otherwise the settings would not matter


def test_the_command_takes_from_the_generation_config_what_it_is_told_to(repetitive, command):
    def tokens(*options):
        fixed = ("--model", repetitive, "--prompt", "for", "--max-new-tokens", 24, "--json")
        done = command("generate", *fixed, *options)
        assert done.code == 0, done
        return json.loads(done.out)["token_ids"]

    asked = ("--generation-config", "base", "--seed", 3)
    sampled = tokens(*asked)
    assert sampled == tokens("--temperature", 0.7, "--top-k", 20, "--top-p", 0.8, "--seed", 3)
    greedy = tokens()
    assert tokens(*asked, "--temperature", 0) == greedy
    assert len({*map(tuple, (sampled, greedy, tokens("--generation-config", "none")))}) == 3


def test_what_would_be_ignored_is_said_at_once(repetitive, tmp_path, command):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(repetitive, model)
    file = model / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_beams": 4, "min_p": 0.1}))
    done = command("export", "--adapter", model / "adapter", "--model", model, "--out", out)
    assert done.code == 2 and "num_beams=4, min_p=0.1" in done.errors[0] and not out.exists()
    options = ("--max-new-tokens", 1, "--generation-config", "base")
    done = command("generate", "--model", model, "--prompt", "for", *options)
    warnings = [line for line in done.err.splitlines() if line.startswith("warning: ")]
    assert done.code == 0 and len(warnings) == 2, done
    assert "num_beams=4" in warnings[0] and "min_p=0.1" in warnings[1]
