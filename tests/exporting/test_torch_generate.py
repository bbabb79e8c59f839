"""`generate` of an exported folder, as transformers calls it, gives the base model's own tokens in fewer steps."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from exported import export, exported_code, noisy_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from mtp_jax.mtp.blocks import Noise

NAME = "bundled:stdlib-5m"
TEXTS = ["def main():\n", "class Reader:\n    def __init__(self", "import os\nimport sys\n\n"]
NEW = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export(NAME, tmp_path_factory.mktemp("exported") / "out")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def plain(folder):
    """The base, loaded without trust: an ordinary model."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def fast(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)


@pytest.fixture(scope="module")
def code():
    return exported_code()


@pytest.fixture(scope="module")
def batch(tokenizer):
    return tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="left")


@pytest.fixture(scope="module")
def greedy(plain, batch):
    return plain.generate(**batch, max_new_tokens=NEW, do_sample=False)


@pytest.mark.parametrize("plan", ["none", "linear:4", "quadratic:1", "quadratic:3", "blocks:3,2,1,1", None])
def test_a_batch_gives_the_models_own_tokens(fast, batch, greedy, plan):
    out = fast.generate(**batch, max_new_tokens=NEW, plan=plan, return_dict_in_generate=True)
    assert torch.equal(out.sequences, greedy)
    assert out.plan == (plan or "quadratic:1")
    assert torch.equal(out.accepted.sum(dim=1), out.steps)
    emitted = (out.accepted * torch.arange(1, out.accepted.shape[1] + 1)).sum(dim=1)
    assert torch.equal(emitted, out.new_tokens - 1)
    assert (out.steps < NEW - 1).all() == (plan != "none")


def test_mask_rows_of_random_tokens_are_lossless_too(plain, batch, greedy, tmp_path):
    noisy_adapter(NAME, tmp_path / "adapter", sampler="none", rows=Noise(5, 900))
    out = export(tmp_path / "adapter", tmp_path / "out")
    options = {"custom_generate": str(out), "trust_remote_code": True, "adapter": str(out)}
    for plan in ("linear:2", "quadratic:3"):
        assert torch.equal(plain.generate(**batch, max_new_tokens=NEW, plan=plan, **options), greedy)


@pytest.mark.parametrize("name", [None, "input_ids", "inputs"])
def test_ids_may_be_given_in_every_way(fast, tokenizer, plain, name):
    ids = tokenizer(TEXTS[0], return_tensors="pt").input_ids
    arguments = ([ids], {}) if name is None else ([], {name: ids})
    want = plain.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(fast.generate(*arguments[0], **arguments[1], max_new_tokens=12), want)


def test_a_base_loaded_elsewhere_takes_the_folder_by_name(folder, plain, batch, greedy):
    options = {"custom_generate": str(folder), "trust_remote_code": True, "adapter": str(folder)}
    out = plain.generate(**batch, max_new_tokens=NEW, plan="quadratic:2", return_dict_in_generate=True, **options)
    assert torch.equal(out.sequences, greedy)
    assert out.steps.sum() < 0.7 * len(TEXTS) * NEW
    with pytest.raises(ValueError, match="trust_remote_code"):
        plain.generate(**batch, max_new_tokens=4, custom_generate=str(folder))


def test_stop_ids_of_model_and_caller_end_a_text_inside_of_a_draft(fast, plain, batch, greedy):
    width = batch.input_ids.shape[1]
    for at in (9, 10, 11):  # one of them is a draft
        stop = greedy[0, width + at].item()
        for options in ({"eos_token_id": stop}, {"eos_token_id": [stop, 1]}):
            want = plain.generate(**batch, max_new_tokens=NEW, do_sample=False, pad_token_id=1, **options)
            out = fast.generate(**batch, max_new_tokens=NEW, pad_token_id=1, plan="quadratic:3", **options)
            assert torch.equal(out, want)


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2, "suppress_tokens": [7, 11]},
        {"min_new_tokens": 20, "min_length": 3, "repetition_penalty": 0.9},
    ],
)
@pytest.mark.parametrize("plan", ["linear:4", "quadratic:2"])
def test_processors_are_those_of_transformers(fast, plain, batch, greedy, settings, plan):
    stop = greedy[0, batch.input_ids.shape[1] + 5].item()
    options = {"max_new_tokens": NEW, "eos_token_id": stop, "pad_token_id": 1, **settings}
    want = plain.generate(**batch, do_sample=False, **options)
    assert torch.equal(fast.generate(**batch, plan=plan, **options), want)
    del options[next(iter(settings))]
    assert not torch.equal(fast.generate(**batch, plan=plan, **options), want)


def test_limits(fast, plain, batch, greedy):
    width = batch.input_ids.shape[1]
    for new in (1, 2, 7):
        assert torch.equal(fast.generate(**batch, max_new_tokens=new), greedy[:, : width + new])
    for options in ({"max_length": width + 5}, {}, {"generation_config": GenerationConfig(max_new_tokens=6)}):
        want = plain.generate(**batch, **options)
        assert torch.equal(fast.generate(**batch, **options), want), options


def test_prompts_longer_than_a_part_of_prefill(code, folder, plain, tokenizer, monkeypatch):
    monkeypatch.setattr(code, "PREFILL_ROWS", 4)
    batch = tokenizer([TEXTS[1] * 2, TEXTS[0]], return_tensors="pt", padding=True, padding_side="left")
    want = plain.generate(**batch, max_new_tokens=20, do_sample=False)
    assert torch.equal(code.generate(**batch, max_new_tokens=20, model=plain, plan="quadratic:2"), want)


def test_the_cache_grows(code, plain, batch, greedy, monkeypatch):
    monkeypatch.setattr(code, "SPARE_SLOTS", 3)
    out = code.generate(**batch, max_new_tokens=NEW, model=plain, plan="linear:3")
    assert torch.equal(out, greedy)


def test_streamer_gets_the_prompt_and_every_token(fast, tokenizer):
    class Streamer:
        def __init__(self):
            self.parts, self.ended = [], False

        def put(self, value):
            self.parts.append(value.flatten().tolist())

        def end(self):
            self.ended = True

    ids, streamer = tokenizer(TEXTS[0], return_tensors="pt").input_ids, Streamer()
    out = fast.generate(ids, max_new_tokens=10, streamer=streamer)
    assert streamer.parts[0] == ids[0].tolist()
    assert [t for part in streamer.parts for t in part] == out[0].tolist()
    assert all(len(part) == 1 for part in streamer.parts[1:])
    assert streamer.ended


def test_steps_are_those_of_our_decoder(fast, tokenizer):
    from mtp_jax.api import load
    from mtp_jax.decoding.plan import parse_plan

    generator = load(NAME, adapter=NAME, dtype="float32", plan=parse_plan("quadratic:2"))
    for text in TEXTS:
        ours = generator([text], NEW)[0]
        ids = tokenizer(text, return_tensors="pt").input_ids
        out = fast.generate(ids, max_new_tokens=NEW, plan="quadratic:2", return_dict_in_generate=True)
        assert out.sequences[0, ids.shape[1] :].tolist() == ours.token_ids
        assert out.steps.item() == ours.steps
        assert out.accepted[0].tolist() == ours.accepted


@pytest.mark.parametrize("shortlist", [8, None])
def test_with_a_draft_vocabulary_steps_are_those_of_our_decoder(tokenizer, plain, batch, greedy, tmp_path, shortlist):
    from mtp_jax import api
    from mtp_jax.decoding.options import Options
    from mtp_jax.decoding.plan import parse_plan
    from mtp_jax.model.base import open_base
    from mtp_jax.mtp.adapter_folder import open_adapter, write_adapter

    base, random = open_base(NAME), np.random.default_rng(0)
    found = open_adapter(NAME, base)
    ids = np.sort(random.permutation(base.g.V)[: base.g.V // 2]).astype(np.int32)
    parts = dataclasses.replace(found.shape, vocabulary=len(ids)), found.arrays | {"vocabulary": ids}
    write_adapter(tmp_path / "few", base.g, *parts, found.config["base"], {"steps": 1})
    out = export(tmp_path / "few", tmp_path / "out", model=NAME)
    assert np.array_equal(open_adapter(str(out), open_base(str(out))).arrays["vocabulary"], ids)
    generator = api.generator(base, Options(parse_plan("quadratic:2"), shortlist), "float32", parts)
    fast = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, trust_remote_code=True)
    options = {"max_new_tokens": NEW, "plan": "quadratic:2", "shortlist": shortlist, "return_dict_in_generate": True}
    every = []
    for text in TEXTS:
        ours, ids = generator([text], NEW)[0], tokenizer(text, return_tensors="pt").input_ids
        theirs = fast.generate(ids, **options)
        assert theirs.sequences[0, ids.shape[1] :].tolist() == ours.token_ids
        assert theirs.accepted[0].tolist() == ours.accepted
        every += ours.accepted[1:]
    assert any(every)
    assert torch.equal(fast.generate(**batch, **options).sequences, greedy)
    torch.manual_seed(0)
    assert fast.generate(**batch, do_sample=True, **options).steps.sum() < len(TEXTS) * (NEW - 1)


def fingerprint(model):
    """What a call could leave behind."""
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m)]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    buffers = {name: tensor.clone() for name, tensor in model.named_buffers()}
    return hooks, state, buffers, copy.deepcopy(model.generation_config.to_dict()), model.training


def test_the_model_is_left_as_it_was_found_also_after_an_exception(code, folder, plain, tokenizer, monkeypatch):
    ids = tokenizer(TEXTS[0], return_tensors="pt").input_ids
    before = fingerprint(plain)
    logits = plain(ids).logits
    code.generate(ids, model=plain, max_new_tokens=9)

    class Broken:
        def put(self, value):
            if value.numel() == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        code.generate(ids, model=plain, max_new_tokens=9, streamer=Broken())
    after = fingerprint(plain)
    for a, b in zip(before, after, strict=True):
        if isinstance(a, dict) and a and isinstance(next(iter(a.values())), torch.Tensor):
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        else:
            assert a == b
    assert torch.equal(plain(ids).logits, logits)
    assert plain(ids).logits.requires_grad


@pytest.mark.parametrize("behind_its_back", [False, True])
def test_changed_weights_are_noticed(code, plain, batch, behind_its_back):
    model = copy.deepcopy(plain)
    code.generate(**batch, model=model, max_new_tokens=2)
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.mlp.down_proj.weight
            (weight.data if behind_its_back else weight).mul_(-1.0)
    want = model.generate(**batch, max_new_tokens=12, do_sample=False)
    assert torch.equal(code.generate(**batch, model=model, max_new_tokens=12), want)


def test_without_a_copy_of_the_weights(fast, batch, greedy):
    assert torch.equal(fast.generate(**batch, max_new_tokens=NEW, pack=False), greedy)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_beams": 3}, "num_beams=3"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2"),
        ({"bad_words_ids": [[4]]}, "bad_words_ids"),
        ({"exponential_decay_length_penalty": (4, 1.1)}, "exponential_decay_length_penalty"),
        ({"min_p": 0.1, "do_sample": True}, "min_p=0.1"),
        ({"stop_strings": ["a"]}, "stop_strings"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores=True"),
        ({"logits_processor": [lambda ids, scores: scores]}, "logits_processor"),
        ({"stopping_criteria": [lambda ids, scores: True]}, "stopping_criteria"),
        ({"inputs_embeds": torch.zeros(1, 1, 1)}, "inputs_embeds"),
        ({"past_key_values": object()}, "past_key_values"),
        ({"plan": "quadratic:9"}, "takes 9 masks, but the adapter has 8"),
        ({"plan": "auto"}, "give none, linear:M"),
        ({"adapter": "nowhere"}, "nowhere"),
        ({"temperature": -1.0, "do_sample": True}, "temperature"),
    ],
)
def test_what_is_not_implemented_is_refused_not_ignored(fast, options, says):
    with pytest.raises(ValueError, match=says):
        fast.generate(torch.tensor([[5, 6]]), max_new_tokens=4, **options)


def test_adapters_of_another_model_and_without_gate_are_refused(code, plain, small_folder, tmp_path):
    noisy_adapter(small_folder, tmp_path / "other")
    with pytest.raises(ValueError, match="does not belong to this model"):
        code.generate(torch.tensor([[5]]), model=plain, adapter=tmp_path / "other")
    noisy_adapter(small_folder, tmp_path / "open", gated=False)
    with pytest.raises(ValueError, match="without gate"):
        code.generate(torch.tensor([[5]]), model=plain, adapter=tmp_path / "open")


def test_the_default_plan_takes_the_rows_that_are_cheap(code):
    parse = code.Plan.parse
    assert str(parse(None, 8, 1, "cpu")) == "quadratic:1"
    assert str(parse(None, 8, 1, "cuda")) == "quadratic:7"
    assert str(parse(None, 8, 8, "cuda")) == "quadratic:1"
    assert str(parse(None, 2, 1, "cuda")) == "quadratic:2"


@pytest.mark.parametrize("plan", ["none", "linear:2", "quadratic:2"])
def test_dynamic_frequencies_beyond_the_original_length(models, tmp_path, plan):
    """The base is loaded anew for each prompt: its rotary module remembers the longest sequence."""
    scaling = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
    model = models.make("llama", num_hidden_layers=1, max_position_embeddings=16, rope_parameters=scaling)
    model.save_pretrained(tmp_path / "base")
    noisy_adapter(tmp_path / "base", tmp_path / "adapter")
    out = export(tmp_path / "adapter", tmp_path / "out")
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, 96, (n,), generator=draw) for n in (5, 17, 40)]
    alone = [
        AutoModelForCausalLM.from_pretrained(out).generate(ids[None], max_new_tokens=24, do_sample=False)[0, len(ids) :]
        for ids in prompts
    ]
    width = max(map(len, prompts))
    padded = torch.stack([torch.nn.functional.pad(ids, (width - len(ids), 0)) for ids in prompts])
    mask = torch.arange(width) >= width - torch.tensor([len(ids) for ids in prompts])[:, None]
    fast = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    found = fast.generate(padded, attention_mask=mask.long(), max_new_tokens=24, plan=plan)[:, width:]
    assert torch.equal(found, torch.stack(alone))
