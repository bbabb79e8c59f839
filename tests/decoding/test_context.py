"""Scaled RoPE: the context is what the scaling reaches, and a completion that it cuts short says so."""

import json

import numpy as np
import pytest
import torch
from test_drafts import equipped
from transformers import AutoModelForCausalLM

from mtp_jax.decoding import loop
from mtp_jax.decoding.generator import Generator
from mtp_jax.decoding.options import Options
from mtp_jax.decoding.plan import plain, quadratic
from mtp_jax.model.geometry import Geometry

LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# name: max_position_embeddings, scaling, context.
CONTEXTS = {
    "default": (64, {"rope_type": "default"}, 64),
    "linear": (64, {"type": "linear", "factor": 4.0}, 256),
    "linear that names the original": (
        64,
        {"type": "linear", "factor": 2.5, "original_max_position_embeddings": 20},
        64,
    ),
    "dynamic": (64, {"rope_type": "dynamic", "factor": 1.5}, 96),
    "yarn of the original": (64, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
    "yarn without the original": (64, {"rope_type": "yarn", "factor": 4.0}, 256),
    "yarn of the product": (256, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
    "yarn with room for answers": (80, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
    "llama3 of the context": (128, {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 64}, 128),
    "llama3 of the original": (64, {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 64}, 512),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_the_context_is_what_the_scaling_reaches(name, key, llama_config):
    given, scaling, context = CONTEXTS[name]
    config = {**llama_config, "max_position_embeddings": given, "rope_parameters": None, key: dict(scaling)}
    assert Geometry.from_config(config).max_positions == context


@pytest.fixture(scope="module")
def dynamic(models, small_tokenizer, tmp_path_factory):
    """A model whose frequencies change beyond 16 tokens, up to a context of 64."""
    folder = tmp_path_factory.mktemp("dynamic")
    scaling = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
    sizes = {"vocab_size": 300, "num_hidden_layers": 1, "max_position_embeddings": 16}
    models.make("llama", **sizes, rope_parameters=scaling).save_pretrained(folder)
    small_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts():
    draw = np.random.default_rng(3)
    return [draw.integers(2, 256, length).tolist() for length in (5, 16, 17, 40)]


@pytest.fixture(scope="module")
def theirs(dynamic, prompts):
    """What transformers generates up to a full context, by a new model each time: it remembers the longest sequence."""
    found = []
    for ids in prompts:
        model = AutoModelForCausalLM.from_pretrained(dynamic, attn_implementation="eager")
        out = model.generate(torch.tensor([ids]), max_new_tokens=64 - len(ids), do_sample=False, eos_token_id=None)
        found.append(out[0, len(ids) :].tolist())
    return found


@pytest.mark.parametrize("plan", [quadratic(2), pytest.param(plain(), marks=pytest.mark.slow)])
@pytest.mark.parametrize("xla", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_dynamic_frequencies_are_those_of_transformers(dynamic, prompts, theirs, xla, plan, monkeypatch):
    monkeypatch.setattr(loop, "PREFILL_CHUNK", 32)
    generator, _ = equipped(dynamic, xla=xla, options=Options(plan))
    done = generator.complete(prompts, 99, 4)
    assert [completion.token_ids for completion in done] == theirs
    assert {completion.finish_reason for completion in done} == {"context"}


def test_why_a_completion_ended(command, dynamic, small_folder):
    how = ("--model", dynamic, "--prompt", "the cat sat", "--max-new-tokens")
    short, long = (json.loads(command("generate", *how, count, "--json").out) for count in (4, 100))
    assert (short["finish_reason"], long["finish_reason"]) == ("length", "context")
    used = 64 - long["new_tokens"]
    assert "cut short" not in command("generate", *how, 4).out
    for more in ((), ("--stream",)):
        assert "; 1 of 1 cut short, as the context of 64 tokens is full]" in command("generate", *how, 100, *more).out
    assert command("generate", "--model", dynamic, "--prompt", "q" * 90, "--max-new-tokens", 1).code == 2
    assert used > 1


@pytest.mark.quick
@pytest.mark.parametrize(
    ("last", "new", "most", "reason"), [(7, 3, 3, "stop"), (7, 2, 9, "stop"), (5, 3, 3, "length"), (5, 3, 9, "context")]
)
def test_reasons(last, new, most, reason):
    class Stops:
        stops = (7, 8)

    assert Generator._why_finished(Stops, last, new, most) == reason
