"""Sampling through an exported folder's code has exactly the model's distribution; broken rules do not.

The same test as that of our own decoder (tests/decoding/test_sampling.py), on a model of 6 tokens.
"""

import itertools

import numpy as np
import pytest
import torch
from exported import exported_code, noisy_adapter
from scipy.stats import chi2

V, NEW, DRAWS = 6, 5, 24_000
FEW = 8_000  # draws that a broken rule is rejected by
PROMPT = [1, 4, 2]
NEVER = 1e-6  # a right rule fails with this probability
WAYS = {
    "plain": {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
    "top-p": {"temperature": 0.8, "top_k": 0, "top_p": 0.85},
    "top-k": {"temperature": 1.3, "top_k": 3, "top_p": 1.0},
}


@pytest.fixture(scope="module")
def parts(models, tmp_path_factory):
    """A base model of six tokens and an adapter whose drafts are neither right nor hopeless."""
    folder = tmp_path_factory.mktemp("six")
    model = models.make("llama", vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, head_dim=8)
    model.save_pretrained(folder / "base")
    noisy_adapter(folder / "base", folder / "adapter", masks=2)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model, folder / "adapter"


def tempered(logits, temperature, top_k, top_p):
    """The distribution by the definition, one row at a time."""
    p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    kept = np.argsort(-p)[: top_k or V]
    share = p[kept] / p[kept].sum()
    size = int(np.searchsorted(np.cumsum(share), top_p - 1e-9)) + 1
    out = np.zeros(V)
    out[kept[:size]] = p[kept[:size]] / p[kept[:size]].sum()
    return out


def exact(model, way):
    """The probability of every text of NEW tokens."""
    texts = torch.tensor(list(itertools.product(range(V), repeat=NEW)))
    tokens = torch.cat([torch.tensor([PROMPT]).expand(len(texts), -1), texts], dim=1)
    with torch.no_grad():
        logits = model(tokens).logits[:, len(PROMPT) - 1 : -1].double().numpy()
    seen, probability = {}, np.ones(len(texts))
    for i, text in enumerate(texts.tolist()):
        for j in range(NEW):
            key = tuple(text[:j])
            if key not in seen:
                seen[key] = tempered(logits[i, j], **way)
            probability[i] *= seen[key][text[j]]
    assert abs(probability.sum() - 1) < 1e-9
    return probability


def draws(code, parts, plan, way, shortlist=4, count=DRAWS):
    model, adapter = parts
    torch.manual_seed(3)
    ids = torch.tensor([PROMPT] * count)
    options = {"plan": plan, "adapter": adapter, "shortlist": shortlist, "return_dict_in_generate": True}
    out = code.generate(ids, model=model, max_new_tokens=NEW, do_sample=True, **way, **options)
    texts = out.sequences[:, len(PROMPT) :].numpy() @ (V ** np.arange(NEW - 1, -1, -1))
    return np.bincount(texts, minlength=V**NEW), out.steps.float().mean().item()


def improbability(counts, probability):
    """p-value of chi-square, rare texts pooled; 0 where something impossible was drawn."""
    if counts[probability == 0].any():
        return 0.0
    order = np.argsort(-probability)
    expected, found = probability[order] * counts.sum(), counts[order]
    big = expected >= 8
    expected = np.append(expected[big], expected[~big].sum())
    found = np.append(found[big], found[~big].sum())
    some = expected > 0
    statistic = np.sum((found[some] - expected[some]) ** 2 / expected[some])
    return float(chi2.sf(statistic, some.sum() - 1))


QUICK = (("quadratic:2", "top-k"), ("linear:2", "plain"))
CASES = [
    pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
    for case in itertools.product(("quadratic:2", "linear:2"), WAYS)
]


@pytest.mark.parametrize(("plan", "way"), CASES)
def test_draws_have_the_models_own_distribution(parts, plan, way):
    counts, steps = draws(exported_code(), parts, plan, WAYS[way])
    assert improbability(counts, exact(parts[0], WAYS[way])) > NEVER
    assert 2 <= steps < NEW - 1  # some drafts are accepted, not all


def test_the_whole_vocabulary_instead_of_a_shortlist(parts):
    counts, _ = draws(exported_code(), parts, "quadratic:2", WAYS["top-p"], shortlist=None)
    assert improbability(counts, exact(parts[0], WAYS["top-p"])) > NEVER


def count_matches(code, monkeypatch):
    """Acceptance by the number of agreeing drafts, not by the prefix."""
    monkeypatch.setattr(code, "prefix", lambda right: right.long().sum(dim=1))


def ratio_untruncated(code, monkeypatch):
    """Drafts drawn from a truncated q, judged by the q before truncation."""
    draft, plain = code.Decoding.draft, code.Sampling.distribution

    def untruncated(self, latents, scores, first):
        collected = []

        def distribution(sampling, logits):
            collected.append((logits / sampling.temperature).softmax(dim=-1))
            return plain(sampling, logits)

        with monkeypatch.context() as patched:
            patched.setattr(code.Sampling, "distribution", distribution)
            drafts, (ids, _) = draft(self, latents, scores, first)
        return drafts, (ids, torch.stack(collected, dim=1))

    monkeypatch.setattr(code.Decoding, "draft", untruncated)


def residual_of_p(code, monkeypatch):
    """A rejected draft replaced by a draw from p, not from (p - q)+."""
    monkeypatch.setattr(code, "residual", lambda p, ids, q: p)


@pytest.mark.parametrize("broken", [count_matches, ratio_untruncated, residual_of_p], ids=lambda rule: rule.__name__)
def test_the_same_test_rejects_a_broken_rule(parts, broken, monkeypatch):
    code, way = exported_code(), {"temperature": 1.3, "top_k": 0, "top_p": 0.75}
    broken(code, monkeypatch)
    counts, _ = draws(code, parts, "quadratic:2", way, count=FEW)
    assert improbability(counts, exact(parts[0], way)) < NEVER
