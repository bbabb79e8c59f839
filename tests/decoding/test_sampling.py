"""Sampled decoding through the real jitted loop has exactly the base model's distribution; broken rules do not.

On a model of 6 tokens the joint distribution of the tokens of several decoding steps is enumerated from the base model
alone and compared with draws by chi-square. Every broken rule that peers have shipped is rejected by the same test.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from mtp_jax.cpu import fastest_forward
from mtp_jax.decoding import drafting, loop, sampling
from mtp_jax.decoding.drafters import parse_drafter
from mtp_jax.decoding.generator import Generator
from mtp_jax.decoding.options import Options, Sampling
from mtp_jax.decoding.plan import parse_plan, plain, quadratic
from mtp_jax.decoding.processors import Processors, Settings
from mtp_jax.errors import UserError
from mtp_jax.model.decoder import Decoder
from mtp_jax.model.geometry import Geometry
from mtp_jax.model.weights import PROJECTIONS, init_params, unstack_layers
from mtp_jax.mtp.adapter import AdapterShape, init_adapter

V, NEW, DRAWS, BATCH = 6, 5, 24_000, 4_000
FEW = 8_000  # draws that a broken rule is rejected by
PROMPT = [1, 4, 2]
NEVER = 1e-6  # a right rule fails with this probability
CONFIG = {
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.8,
}


@pytest.fixture(scope="module")
def parts():
    """A base model of six tokens and an adapter whose drafts are neither right nor hopeless."""
    g = Geometry.from_config(CONFIG)
    params = init_params(g, jax.random.key(3))
    shape = AdapterShape(2, 4, 8.0, PROJECTIONS, "residual")
    adapter = init_adapter(g, shape, params["embed"]["embedding"], jax.random.key(4))
    draw = np.random.default_rng(5)
    adapter = jax.tree.map(lambda x: x + 0.2 * draw.standard_normal(x.shape).astype(np.float32), adapter)
    return g, params, shape, adapter


@pytest.fixture
def make(parts):
    """A function that makes a fresh generator with a plan."""

    def generator(plan, shortlist=4, vocabulary=None):
        g, params, shape, adapter = parts
        if vocabulary is not None:
            shape = dataclasses.replace(shape, vocabulary=len(vocabulary))
            adapter = adapter | {"vocabulary": np.asarray(vocabulary, np.int32)}
        copies = jax.tree.map(jnp.copy, params)
        forward = fastest_forward(Decoder(g, scanned=False), shape)
        variables = forward.prepare(unstack_layers(copies), adapter)
        return Generator(forward, variables, None, (), Options(plan, shortlist))

    return generator


def tempered(logits, how):
    """The distribution that `how` asks for, by the definition and one row at a time."""
    p = np.exp((logits - logits.max()) / how.temperature)
    p /= p.sum()
    order = np.argsort(-p)
    kept = order[: how.top_k or V]
    share = p[kept] / p[kept].sum()
    size = int(np.searchsorted(np.cumsum(share), how.top_p - 1e-9)) + 1
    out = np.zeros(V)
    out[kept[:size]] = p[kept[:size]] / p[kept[:size]].sum()
    return out


@pytest.fixture(scope="module")
def exact(parts):
    """A function from a way to sample to the probability of every text of NEW tokens."""
    g, params, *_ = parts
    from mtp_jax.model.decoder import Decoder

    model = Decoder(g)
    texts = np.array(list(itertools.product(range(V), repeat=NEW)), np.int32)
    tokens = np.concatenate([np.tile(PROMPT, (len(texts), 1)), texts], axis=1)

    @jax.jit
    def forward(tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        latents, _ = model.apply({"params": params}, tokens, positions)
        return model.apply({"params": params}, latents, method="logits")

    with jax.default_matmul_precision("highest"):
        logits = np.asarray(forward(tokens), np.float64)[:, len(PROMPT) - 1 : -1]

    def joint(how, penalty=1.0):
        seen, probability = {}, np.ones(len(texts))
        for i, text in enumerate(texts):
            for j in range(NEW):
                key = tuple(text[:j])
                if key not in seen:
                    row = logits[i, j].copy()
                    past = list({*PROMPT, *key})
                    row[past] = np.where(row[past] < 0, row[past] * penalty, row[past] / penalty)
                    seen[key] = tempered(row, how)
                probability[i] *= seen[key][text[j]]
        assert abs(probability.sum() - 1) < 1e-9
        return probability

    return joint


def draws(generator, how, count=DRAWS):
    """Texts of NEW tokens by the compiled loop, as numbers, and their decoding steps."""
    numbers, steps = [], []
    for start in range(0, count, BATCH):
        for done in generator.complete([PROMPT] * BATCH, NEW, BATCH, how, start):
            numbers.append(int(np.polyval(done.token_ids, V)))
            steps.append(done.steps)
    return np.bincount(numbers, minlength=V**NEW), np.mean(steps)


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


WAYS = {
    "plain": Sampling(1.0, seed=7),
    "top-p": Sampling(0.8, top_p=0.85, seed=7),
    "top-k": Sampling(1.3, top_k=3, seed=7),
}
QUICK = (("quadratic:2", True, "top-p"), ("linear:2", False, "top-k"))
CASES = [
    pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow, id="-".join(map(str, case)))
    for case in itertools.product(("quadratic:2", "linear:2"), (True, False), WAYS)
]


@pytest.mark.parametrize(("plan", "sampled_drafts", "way"), CASES)
def test_draws_have_the_models_own_distribution(make, exact, plan, sampled_drafts, way):
    plan, how = parse_plan(plan), dataclasses.replace(WAYS[way], sampled_drafts=sampled_drafts)
    counts, steps = draws(make(plan), how)
    assert improbability(counts, exact(how)) > NEVER
    assert 2 <= steps < NEW - 1  # some drafts are accepted, not all


@pytest.mark.parametrize("shortlist", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_draws_with_drafts_of_few_tokens(make, exact, shortlist):
    how = WAYS["top-p"]
    counts, steps = draws(make(quadratic(2), shortlist, vocabulary=[0, 2, 5]), how)
    assert improbability(counts, exact(how)) > NEVER
    assert 2 <= steps < NEW - 1.02  # some drafts are accepted, not all


@pytest.mark.parametrize("sampled_drafts", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("plan", ["lookup:2", "quadratic:1+lookup:2"])
def test_draws_with_looked_up_drafts(make, exact, plan, sampled_drafts, monkeypatch):
    """And the same test rejects drafts that count as less certain than they are."""
    how = dataclasses.replace(WAYS["top-p"], sampled_drafts=sampled_drafts)
    counts, steps = draws(make(parse_plan(plan)), how, FEW)
    assert improbability(counts, exact(how)) > NEVER
    assert 2 <= steps < NEW - 1.02  # some drafts are accepted, not all

    def broken(p, drafts, valid, q, keys):
        return sampling.verify(p, drafts, valid, q._replace(probabilities=q.probabilities / 9), keys)

    monkeypatch.setattr(loop, "verify", broken)
    assert improbability(draws(make(parse_plan(plan)), how, FEW)[0], exact(how)) < NEVER


@pytest.mark.parametrize("name", ["jacobi:2", "draft:2"])
def test_draws_with_drafts_from_elsewhere(parts, make, exact, name):
    g, params, *_ = parts
    generator, draw = make(plain()), np.random.default_rng(6)
    near = jax.tree.map(lambda x: x + 0.1 * draw.standard_normal(x.shape).astype(np.float32), params)
    model = fastest_forward(Decoder(g, scanned=False), None)
    generator.variables = {**generator.variables, "draft": model.prepare(unstack_layers(near), None)}
    how = WAYS["top-p"]
    counts, steps = draws(generator.using(drafter=parse_drafter(name, model)), how, FEW)
    assert improbability(counts, exact(how)) > NEVER
    assert 2 <= steps < NEW - 1.02  # some drafts are accepted, not all


def test_draws_with_a_repetition_penalty(make, exact, monkeypatch):
    """And the same test rejects rows that are judged without the drafts before them."""
    how, processors = WAYS["top-p"], Processors(repetition_penalty=1.8)
    generator = make(quadratic(2))
    generator.settings = Settings(processors, None, (), ())
    counts, steps = draws(generator, how)
    assert improbability(counts, exact(how, 1.8)) > NEVER
    assert improbability(counts, exact(how)) < NEVER
    assert 2 <= steps < NEW - 1

    right = Processors.__call__
    monkeypatch.setattr(
        Processors, "__call__", lambda self, s, t, n, drafts, *rest: right(self, s, t, n, drafts * 0 + PROMPT[0], *rest)
    )
    generator.compiled = {}
    assert improbability(draws(generator, how)[0], exact(how, 1.8)) < NEVER


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-38, 1e-45])
def test_near_zero_a_temperature_is_greedy(temperature):
    logits = jnp.asarray([[3.0, -200.0, 3.0001, 0.0], [-1e30, 5.0, 4.0, 5.0]])
    for truncated in (False, True):
        how = sampling.Tempering(jnp.float32(temperature), jnp.int32(3), jnp.float32(0.9))
        p = np.asarray(sampling.distribution(logits, how, truncated))
        np.testing.assert_array_equal(p, [[0, 0, 1, 0], [0, 0.5, 0, 0.5]])


def test_more_likeliest_tokens_than_there_are_is_all(make):
    generator = make(quadratic(2))
    every = [done.token_ids for done in generator.complete([PROMPT] * 4, NEW, 4, Sampling(top_k=V, seed=2))]
    assert [d.token_ids for d in generator.complete([PROMPT] * 4, NEW, 4, Sampling(top_k=2**40, seed=2))] == every


@pytest.mark.slow
def test_the_whole_vocabulary_instead_of_a_shortlist(make, exact):
    how = Sampling(0.8, top_p=0.85, seed=1)
    counts, _ = draws(make(quadratic(2), shortlist=None), how)
    assert improbability(counts, exact(how)) > NEVER


def count_matches(monkeypatch):
    """Acceptance by the number of agreeing drafts, not by the prefix."""
    monkeypatch.setattr(sampling, "prefix", lambda right: jnp.sum(right, axis=1))


def ratio_untruncated(monkeypatch):
    """Drafts drawn from a truncated q, judged by the q before truncation."""
    right, real = drafting.distribution, loop.choose_drafts
    collected = []

    def distribution(logits, how, truncated):
        collected.append(right(logits, how, False))
        return right(logits, how, truncated)

    def choose(*arguments):
        collected.clear()
        chain, proposal = real(*arguments)
        return chain, proposal._replace(probabilities=jnp.stack(collected, axis=1))

    monkeypatch.setattr(drafting, "distribution", distribution)
    monkeypatch.setattr(loop, "choose_drafts", choose)


def residual_of_p(monkeypatch):
    """A rejected draft replaced by a draw from p, not from (p - q)+."""
    monkeypatch.setattr(sampling, "residual", lambda p, ids, mass: p)


@pytest.mark.parametrize("broken", [count_matches, ratio_untruncated, residual_of_p], ids=lambda rule: rule.__name__)
def test_the_same_test_rejects_a_broken_rule(make, exact, broken, monkeypatch):
    broken(monkeypatch)
    how = Sampling(1.3, top_p=0.75, seed=7)
    counts, _ = draws(make(quadratic(2)), how, FEW)
    assert improbability(counts, exact(how)) < NEVER


def test_a_rows_draws_depend_on_seed_and_number_alone(make):
    generator = make(quadratic(2))
    how = Sampling(seed=3)
    together = [done.token_ids for done in generator.complete([PROMPT] * 4, NEW, 2, how)]
    assert [done.token_ids for done in generator.complete([PROMPT] * 4, NEW, 1, how)] == together
    assert len({tuple(tokens) for tokens in together}) > 1
    assert [done.token_ids for done in generator.complete([PROMPT] * 2, NEW, 2, how, 2)] == together[2:]
    assert [done.token_ids for done in generator.complete([PROMPT] * 4, NEW, 2, Sampling(seed=4))] != together


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": 0.0}, "temperature 0.0: should be above 0"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_k": 0}, "top-k 0"),
        ({"top_p": 0.0}, "top-p 0.0"),
        ({"top_p": 1.5}, "top-p 1.5"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_what_cannot_be_sampled_from_is_refused(options, says):
    with pytest.raises(UserError, match=says):
        Sampling(**options)
