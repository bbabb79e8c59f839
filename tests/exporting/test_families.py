"""Of every family: the exported base is bit for bit the same, and the adapter drafts in torch what it drafts in JAX."""

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from exported import export, exported_code, noisy_adapter
from transformers import AutoModelForCausalLM

from mtp_jax.decoding.forward import XlaForward
from mtp_jax.model.attention import empty_cache
from mtp_jax.model.base import open_base
from mtp_jax.model.decoder import Decoder
from mtp_jax.model.folder import stored_tensors
from mtp_jax.model.step_rows import MaskRows
from mtp_jax.model.weights import projections, unstack_layers
from mtp_jax.mtp.adapter_folder import open_adapter
from mtp_jax.mtp.sampler import corrected_latent

CASES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "llama tied": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 5},
    "mistral tied": {"tie_word_embeddings": True, "sliding_window": None},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen2 tied": {"tie_word_embeddings": True},
    "qwen3": {"attention_bias": True},
    "qwen3 tied": {"tie_word_embeddings": True},
    "llama dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}},
    "llama yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 100.0}},
}
CASES |= families.USUAL
CASES["phi3 partial"] = next(
    config for family, name, config, _ in families.CASES if (family, name) == ("phi3", "partial")
)
REAL = ("stories260k", "trio-17m")
SHARDED = ("qwen2", "llama tied")
V, M = 96, 3
PROMPTS = [[5, 9, 33, 71, 2, 18, 44, 60, 21], [7, 80, 3, 12]]


@pytest.fixture(scope="module", params=[*CASES, "stories260k", pytest.param("trio-17m", marks=pytest.mark.slow)])
def made(request, models, tmp_path_factory):
    """A model, the folder it was saved in, a noisy adapter, and both exported."""
    folder = tmp_path_factory.mktemp("family")
    if request.param in REAL:
        (folder / "base").symlink_to(request.getfixturevalue("stories").parent / request.param)
        model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    else:
        model = models.make(request.param.split()[0], num_hidden_layers=2, **CASES[request.param])
        model.save_pretrained(folder / "base", **({"max_shard_size": "20KB"} if request.param in SHARDED else {}))
    sampler = {"qwen2": "paper", "mistral": "none"}.get(request.param, "residual")
    targets = ("q", "v", "down") if request.param == "llama tied" else projections(open_base(str(folder / "base")).g)
    shape, adapter = noisy_adapter(folder / "base", folder / "adapter", M, sampler, targets)
    export(folder / "adapter", folder / "out", base="copy")
    return folder, model, shape, adapter


def test_the_base_is_the_same(made):
    folder, model, *_ = made
    before, after = stored_tensors(folder / "base"), stored_tensors(folder / "out")
    assert {k: (t.file.name, t.shape, t.dtype) for k, t in before.items()} == {
        k: (t.file.name, t.shape, t.dtype) for k, t in after.items()
    }
    for tensor in before.values():
        assert (folder / "out" / tensor.file.name).read_bytes() == tensor.file.read_bytes()
    loaded, report = AutoModelForCausalLM.from_pretrained(folder / "out", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.arange(60).reshape(2, 30)
    assert type(loaded) is type(model)
    reference = AutoModelForCausalLM.from_pretrained(folder / "base")
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, reference(tokens).logits)


def test_draft_logits_are_those_of_jax(made):
    folder, model, shape, adapter = made
    tokens, previous = np.array([PROMPTS[0]], np.int32), np.array([11])

    base = open_base(str(folder / "base"))
    g, params = base.g, unstack_layers(base.load(jnp.dtype("float32")))
    forward = XlaForward(Decoder(g, scanned=False), shape, joined=False)
    variables = forward.prepare(params, open_adapter(str(folder / "out"), base).arrays)

    def ours(variables):
        cache = empty_cache(g, 1, 32, jnp.float32, stacked=False)
        anchors = jnp.full((1, M), len(PROMPTS[0]) - 1)
        masks = MaskRows(variables["mtp"]["masks"], anchors, np.arange(1, M + 1), np.zeros(M, int))
        _, block, _ = forward.rows(variables, jnp.asarray(tokens), jnp.zeros(1, jnp.int32), cache, masks, True)
        scores = forward.logits(variables, block)
        if shape.sampler == "none":
            return scores, scores
        embedding = forward.embedded(variables, jnp.asarray(previous))
        latent = corrected_latent(variables["mtp"]["sampler"], shape.sampler, embedding[:, None], block)
        return scores, forward.logits(variables, latent)

    with jax.default_matmul_precision("highest"):
        want = jax.jit(ours)(variables)

    code = exported_code()
    with torch.no_grad():
        theirs = code._load_adapter(model, folder / "out")
        rows = code.Rows(model, theirs)
        anchors, offsets = torch.full((1, M), len(PROMPTS[0]) - 1), torch.arange(1, M + 1)
        layout = code.Layout(len(PROMPTS[0]), anchors, offsets, torch.zeros_like(offsets), "cpu")
        _, block = rows(torch.tensor(tokens), layout, [0], code.Cache(g.L, 32))
        scores = chained = rows.logits(block)
        if shape.sampler != "none":
            embedding = rows.embedding(torch.tensor(previous))[:, None]
            chained = rows.logits(theirs.latent(embedding, block, theirs.read(block)))
    for a, b in zip(want, (scores, chained), strict=True):
        a = np.asarray(a)
        assert np.abs(a - b.numpy()).max() < 1e-4 * np.abs(a).max()
    # The adapter does something: without it mask rows would be far from this.
    assert np.abs(adapter["lora"]["layers"]["q"]["b"]).max() > 0.1


@pytest.mark.parametrize("plan", ["quadratic:2", "linear:3"])
def test_greedy_tokens_are_the_models_own(made, plan):
    folder, model, *_ = made
    code, width = exported_code(), max(map(len, PROMPTS))
    ids = torch.tensor([[1] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 1, None
    want = model.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False)
    options = {"model": model, "adapter": folder / "out", "plan": plan}
    assert torch.equal(code.generate(ids, attention_mask=mask, max_new_tokens=30, **options), want)
    one = code.generate(torch.tensor([PROMPTS[1]]), max_new_tokens=30, **options)
    assert torch.equal(one[0, len(PROMPTS[1]) :], want[1, width:])
