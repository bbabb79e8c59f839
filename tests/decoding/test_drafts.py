"""Decoding with drafts gives the tokens of plain decoding, whatever the adapter holds, in as few steps as it can."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtp_jax
from mtp_jax import api
from mtp_jax.decoding import generator as module
from mtp_jax.decoding import loop
from mtp_jax.decoding.forward import XlaForward
from mtp_jax.decoding.loop import Decoding, Limits
from mtp_jax.decoding.options import Options, Sampling
from mtp_jax.decoding.plan import linear, parse_plan, quadratic
from mtp_jax.decoding.processors import Processors
from mtp_jax.errors import UserError
from mtp_jax.model.base import open_base
from mtp_jax.model.decoder import Decoder
from mtp_jax.model.weights import PROJECTIONS
from mtp_jax.mtp.adapter import AdapterShape, init_adapter
from mtp_jax.mtp.adapter_folder import write_adapter
from mtp_jax.mtp.blocks import Noise
from mtp_jax.mtp.estimate import Continuations, Estimator, tokens_per_step

M = 4
NEW = 40
SLOW = pytest.mark.slow
QUICK = ("linear:4", "quadratic:2", "blocks:3,1,0,2", "quadratic:2+lookup:3")
RARE = ("linear:1", "quadratic:1", "blocks:4,2,1,1,4", "linear:2+lookup:2")
PLANS = [*QUICK, *(pytest.param(p, marks=pytest.mark.slow) for p in RARE)]


def noise(base, sampler="residual", scale=0.3, vocabulary=None, rows=None):
    """An adapter full of noise, with a draft vocabulary where its ids are given, and with `rows` of noise."""
    U = None if vocabulary is None else len(vocabulary)
    shape = AdapterShape(M, 8, 16.0, PROJECTIONS, "none" if rows else sampler, vocabulary=U, noise=rows)
    adapter = init_adapter(base.g, shape, base.load()["embed"]["embedding"], jax.random.key(1))
    draw = np.random.default_rng(2)  # not JAX, which would compile a program for each shape
    adapter = jax.tree.map(lambda x: x + scale * draw.standard_normal(x.shape).astype(np.float32), adapter)
    return shape, adapter if vocabulary is None else adapter | {"vocabulary": np.asarray(vocabulary, np.int32)}


def equipped(folder, dtype="float32", xla=False, options=None, **of_noise):
    """A generator without stop ids whose adapter is noise, and that adapter."""
    base, dtype = open_base(str(folder)), jnp.dtype(dtype)
    shape, adapter = noise(base, **of_noise)
    forward = XlaForward(Decoder(base.g, dtype, scanned=False), shape) if xla else None
    generator = api.generator(base, options or Options(), dtype, (shape, adapter), forward=forward)
    generator.stops = ()
    return generator, adapter


@pytest.fixture(scope="module")
def small(small_folder):
    """A generator with a noise adapter, ragged prompts, and what plain decoding makes of them."""
    generator, _ = equipped(small_folder)
    draw = np.random.default_rng(5)
    prompts = [draw.integers(2, 256, length).tolist() for length in (1, 5, 20)]
    return generator, prompts, [done.token_ids for done in generator.complete(prompts, NEW, 1)]


def decoded(generator, plan, *arguments, **options):
    plan = parse_plan(plan) if isinstance(plan, str) else plan
    return generator.using(plan=plan).complete(*arguments, **options)


class Oracle:
    """Drafts that are the tokens of given texts, in place of the sampler's."""

    def __init__(self, texts, wrong_from=None):
        width = max(map(len, texts)) + 2 * M + 2
        self.texts = jnp.asarray([text + [0] * (width - len(text)) for text in texts])
        self.wrong_from = wrong_from  # drafts from this one on are wrong

    def patch(self, monkeypatch):
        oracle = self

        def drafts(decoding, variables, state, block, *rest):
            count, V = block.shape[1], decoding.forward.model.g.V
            at = state.length[:, None] + jnp.arange(count)
            right = jnp.take_along_axis(oracle.texts, jnp.minimum(at, oracle.texts.shape[1] - 1), axis=1)
            if oracle.wrong_from is not None:
                right = jnp.where(jnp.arange(count) >= oracle.wrong_from, (right + 1) % V, right)
            return right, None

        monkeypatch.setattr(loop.Decoding, "_drafts", drafts)


@pytest.mark.parametrize("plan", PLANS)
def test_noise_in_the_adapter_changes_no_token(small, plan):
    generator, prompts, texts = small
    for batch_size in (1, 3):
        done = decoded(generator, plan, prompts, NEW, batch_size)
        assert [d.token_ids for d in done] == texts
        assert all(1 <= d.tokens_per_step < (9 if "lookup" in plan else 1.3) for d in done)
        for d in done:
            assert sum(d.accepted) == d.steps and sum(i * n for i, n in enumerate(d.accepted, 1)) == NEW - 1
            assert d.emitted_by == sorted(d.emitted_by) and d.emitted_by[0] == 0 and d.emitted_by[-1] == d.steps


@pytest.mark.parametrize(
    ("form", "one_head", "shortlist"),
    [
        ("none", True, None),
        ("paper", False, None),
        ("paper", True, 7),
        pytest.param("none", False, 7, marks=pytest.mark.slow),
        pytest.param("residual", True, None, marks=pytest.mark.slow),
    ],
)
def test_every_way_to_draft_is_lossless(small_folder, small, form, one_head, shortlist):
    _, prompts, texts = small
    generator, _ = equipped(small_folder, options=Options(one_head=one_head, shortlist=shortlist), sampler=form)
    done = decoded(generator, "quadratic:2", prompts, NEW, 3)
    assert [d.token_ids for d in done] == texts


@pytest.mark.parametrize("plan", PLANS)
def test_noise_rows_are_lossless_and_a_text_does_not_depend_on_its_batch(small_folder, small, plan):
    _, prompts, texts = small
    generator, _ = equipped(small_folder, scale=0.02, rows=Noise(3, 200))
    together = decoded(generator, plan, prompts, NEW, 3)
    assert [d.token_ids for d in together] == texts
    if plan == "quadratic:2":
        (alone,) = decoded(generator, plan, prompts[2:], NEW, 1, number=2)
        assert (alone.token_ids, alone.accepted) == (together[2].token_ids, together[2].accepted)
        assert any(sum(d.accepted[1:]) for d in together)  # some draft is accepted


@pytest.mark.parametrize("xla", [False, True])
def test_mask_rows_hold_noise_that_differs_by_step_sequence_and_row(small_folder, xla):
    generator, adapter = equipped(small_folder, xla=xla, rows=Noise(3, 60))
    assert "mtp" not in adapter
    decoding, offsets = Decoding(generator.forward, Options(quadratic(2))), np.asarray([1, 2, 1, 2, 1, 2])
    table = np.asarray(generator.forward.embedded(generator.variables, jnp.arange(300)))
    drawn = []
    for length in (7, 8):
        keys, lengths = jax.vmap(jax.random.key)(jnp.arange(64)), jnp.full(64, length)
        rows = np.asarray(decoding.mask_embeddings(generator.variables, keys, lengths, offsets))
        drawn.append(np.argmax(np.all(rows[:, :, None] == table[3:60], axis=-1), axis=-1) + 3)
        assert np.array_equal(table[drawn[-1]], rows)
    ids = np.stack(drawn)  # [steps, sequences, rows]
    assert ids.min() == 3 and ids.max() == 59
    assert max(np.mean(np.diff(ids, axis=axis) == 0) for axis in range(3)) < 0.1


EVERY, ODD = np.arange(300), np.arange(1, 300, 2)  # draft vocabularies: of all tokens, and of half of them


@pytest.mark.parametrize(
    ("form", "shortlist", "xla"),
    [
        ("residual", 7, False),
        pytest.param("paper", None, False, marks=pytest.mark.slow),
        pytest.param("none", None, True, marks=pytest.mark.slow),
        pytest.param("residual", 7, True, marks=pytest.mark.slow),
    ],
)
def test_a_draft_vocabulary_of_all_tokens_drafts_as_none_does(small_folder, small, form, shortlist, xla):
    _, prompts, texts = small
    found = []
    for ids in (None, EVERY):
        options = Options(quadratic(2), shortlist)
        generator, _ = equipped(small_folder, xla=xla, options=options, sampler=form, scale=0.02, vocabulary=ids)
        done = generator.complete(prompts, NEW, 3)
        sampled = generator.complete(prompts, NEW, 3, Sampling(0.9, seed=1))
        found.append([(d.token_ids, d.accepted) for d in (*done, *sampled)])
    assert found[0] == found[1] and [tokens for tokens, _ in found[0][:3]] == texts
    assert any(accepted[0] < sum(accepted) for _, accepted in found[0])  # some draft is accepted


@pytest.mark.parametrize(
    ("form", "shortlist", "one_head"),
    [
        ("residual", 7, True),
        pytest.param("none", None, False, marks=pytest.mark.slow),
        pytest.param("paper", None, True, marks=pytest.mark.slow),
    ],
)
def test_drafts_are_of_the_draft_vocabulary_and_texts_of_any_token(small_folder, small, form, shortlist, one_head):
    _, prompts, texts = small
    options = Options(quadratic(2), shortlist, one_head)
    generator, _ = equipped(small_folder, options=options, sampler=form, vocabulary=ODD)
    done = generator.complete(prompts, NEW, 3)
    assert [d.token_ids for d in done] == texts
    assert any(token % 2 == 0 for text in texts for token in text)
    other = generator.using(one_head=not one_head).complete(prompts, NEW, 3)  # changes no draft
    assert [d.accepted for d in other] == [d.accepted for d in done]
    processors = Processors(repetition_penalty=1.3, suppress_tokens=(5, 8))
    for chosen in (None, processors):  # what changes logits sees rows of all tokens
        decoding = Decoding(generator.forward, options, None, chosen)
        limits = Limits(jnp.asarray([40, 30]), jnp.zeros(0, jnp.int32), jnp.asarray([20, 13]))
        state = jax.jit(decoding.prefill, static_argnums=(4, 5))(
            generator.variables, np.arange(2, 42).reshape(2, 20), limits.prompt, limits, 48, generator.dtype
        )
        state = jax.jit(decoding.step)(generator.variables, state, limits, None)
        assert np.all(np.asarray(state.drafts) % 2 == 1) and (chosen is None or not np.any(state.drafts == 5))


def test_xla_alone_gives_the_same_tokens(small_folder, small):
    _, prompts, texts = small
    generator, _ = equipped(small_folder, xla=True)
    for plan in ("none", "quadratic:2"):
        assert [d.token_ids for d in decoded(generator, plan, prompts, NEW, 3)] == texts


@pytest.mark.parametrize(("V", "count"), [(300, 32), (256, 64), (7, 6)])
def test_candidates_are_the_likeliest_tokens(small, V, count):
    scores = np.random.default_rng(0).normal(size=(2, 3, V)).astype(np.float32)
    found = np.asarray(XlaForward(small[0].forward.model).candidates(jnp.asarray(scores), count))
    for row, ids in zip(scores.reshape(-1, V), found.reshape(-1, count), strict=True):
        assert sorted(ids) == sorted(sorted(range(V), key=row.__getitem__)[-count:])


@pytest.mark.parametrize("plan", ["linear:4", "quadratic:2", "blocks:4,2,1,1,4"])
@pytest.mark.parametrize("new", [1, 17, pytest.param(NEW, marks=pytest.mark.slow)])
def test_perfect_drafts_take_as_few_steps_as_there_can_be(small, plan, new, monkeypatch):
    generator, prompts, texts = small
    Oracle([p + t for p, t in zip(prompts, texts, strict=True)]).patch(monkeypatch)
    generator.compiled.clear()
    done = decoded(generator, plan, prompts, new, 3)
    generator.compiled.clear()
    assert [d.token_ids for d in done] == [text[:new] for text in texts]
    # Also with fewer masks behind rows in the middle: the block behind the last draft is a full one.
    assert {d.steps for d in done} == {-(-(new - 1) // (parse_plan(plan).drafts + 1))}


def test_what_follows_a_wrong_draft_is_not_accepted(small, monkeypatch):
    generator, prompts, texts = small
    Oracle([p + t for p, t in zip(prompts, texts, strict=True)], wrong_from=2).patch(monkeypatch)
    generator.compiled.clear()
    done = decoded(generator, "quadratic:4", prompts, NEW, 3)
    generator.compiled.clear()
    assert [d.token_ids for d in done] == texts
    assert {d.steps for d in done} == {-(-(NEW - 1) // 3)}


def test_linear_drafts_anew_after_a_rejection_and_not_in_the_step_itself(small, monkeypatch):
    """One of two drafts wrong: the floating block stood behind the last one, so the next step verifies nothing."""
    generator, prompts, texts = small
    Oracle([prompts[0] + texts[0]], wrong_from=1).patch(monkeypatch)
    generator.compiled.clear()
    (done,) = decoded(generator, "linear:2", prompts[:1], 16, 1)
    generator.compiled.clear()
    # steps alternate: two tokens (one draft and the base model's own), then one
    assert done.token_ids == texts[0][:16] and done.steps == 10
    assert done.accepted == [5, 5, 0]


@pytest.mark.parametrize("plan", [pytest.param("linear:4", marks=pytest.mark.slow), "quadratic:4"])
def test_stop_ids_inside_drafts_end_a_row_exactly(small, plan, monkeypatch):
    generator, prompts, texts = small
    Oracle([p + t for p, t in zip(prompts, texts, strict=True)]).patch(monkeypatch)
    generator.compiled.clear()
    for at in (1, 3, 4, 5, 6):
        stops = (texts[0][at], texts[2][at + 3])
        generator.stops = stops
        done = decoded(generator, plan, prompts, NEW, 3)
        generator.stops = ()
        cut = [next((t[: i + 1] for i, token in enumerate(t) if token in stops), t) for t in texts]
        assert [d.token_ids for d in done] == cut
    generator.compiled.clear()


def test_context_limit_inside_drafts_is_exact(small, monkeypatch):
    generator, prompts, texts = small
    Oracle([prompts[2] + texts[2]]).patch(monkeypatch)
    generator.compiled.clear()
    (done,) = decoded(generator, "quadratic:4", [prompts[2]], 1000, 1)
    generator.compiled.clear()
    assert len(done.token_ids) == 64 - 20 and done.token_ids[:NEW] == texts[2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prefill_leaves_real_rows_bit_identical_whatever_the_adapter_holds(small_folder, dtype):
    generator, _ = equipped(small_folder, dtype, scale=5.0)
    prompts = np.arange(2, 42, dtype=np.int32).reshape(2, 20)
    limits = Limits(jnp.asarray([40, 30]), jnp.zeros(0, jnp.int32))
    prefill = jax.jit(Decoding(generator.forward, Options(quadratic(2))).prefill, static_argnums=(4, 5))

    def of_adapter(path):
        """Whether a variable is the adapter's: masks, sampler, or a LoRA's A or B."""
        names = [getattr(key, "key", getattr(key, "name", None)) for key in path]
        return names[0] == "mtp" or "loras" in names or (names[0] == "fused" and {"a", "b"} & set(names))

    found = [path for path, _ in jax.tree.leaves_with_path(generator.variables) if of_adapter(path)]
    assert len(found) > 2 * generator.g.L

    def left(scale):
        variables = jax.tree.map_with_path(lambda path, x: x * scale if of_adapter(path) else x, generator.variables)
        state = prefill(variables, prompts, jnp.asarray([20, 13]), limits, 48, generator.dtype)
        first = jnp.take_along_axis(state.tokens, jnp.asarray([[20], [13]]), axis=1)
        return jax.device_get((state.cache, first)), np.asarray(state.drafts)

    (still, _), (noisy, drafts) = left(0.0), left(1.0)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(still), jax.tree.leaves(noisy), strict=True))
    assert not np.array_equal(left(0.0)[1], drafts)  # the masks do meet the adapter


ONE = Noise(7, 8)  # every row the same token, so that decoding and the estimate draw alike


@pytest.mark.parametrize(
    ("masks", "ids", "rows"), [(2, None, None), pytest.param(4, None, None, marks=SLOW), (2, ODD, None), (2, None, ONE)]
)
def test_steps_are_those_of_the_estimate(small_folder, small, masks, ids, rows):
    """Tokens per step by decoding and by the training-time estimate, from unlike code: an adapter near the identity."""
    _, prompts, texts = small
    generator, adapter = equipped(small_folder, scale=0.02, vocabulary=ids, rows=rows)
    width = max(len(p + t) for p, t in zip(prompts, texts, strict=True))
    rows = [p + t + [0] * (width - len(p + t)) for p, t in zip(prompts, texts, strict=True)]
    starts = jnp.asarray([len(p) for p in prompts])
    of = Continuations(jnp.asarray(rows), starts, starts + NEW)
    scanned = dataclasses.replace(generator.forward.model, scanned=True)
    frozen = {"params": open_base(str(small_folder)).load(jnp.dtype("float32"))}
    if ids is not None:
        frozen["vocabulary"] = jnp.asarray(adapter["vocabulary"])
    with jax.default_matmul_precision("highest"):
        accepted = Estimator(scanned, generator.shape).accepted(adapter, frozen, of)
    done = decoded(generator.using(shortlist=None), quadratic(masks), prompts, NEW, 3)
    assert [d.token_ids for d in done] == texts
    estimate = tokens_per_step(np.asarray(accepted), of, masks)
    assert sum(len(d.token_ids) - 1 for d in done) / sum(d.steps for d in done) == estimate
    assert module.tokens_per_step(done) == estimate


def test_prompts_of_one_bucket_share_a_program(small):
    generator, prompts, _ = small
    generator.compiled.clear()
    for prompt in (prompts[0], prompts[1], prompts[2]):
        decoded(generator, "quadratic:2", [prompt], 10, 1)
    assert len(generator.compiled) == 1


@pytest.mark.slow
def test_bfloat16_flips_no_more_than_plain_decoding_itself(small_folder):
    """In bfloat16 nearly equal logits may swap; a draft is still only accepted where the base model chose it."""
    generator, _ = equipped(small_folder, "bfloat16")
    prompt = [list(range(5, 15))]
    (plain,) = generator.complete(prompt, 20, 1)
    (drafted,) = decoded(generator, "quadratic:2", prompt, 20, 1)
    agree = next((i for i, (a, b) in enumerate(zip(plain.token_ids, drafted.token_ids, strict=True)) if a != b), 20)
    assert agree >= 5


def test_a_plan_may_not_take_more_masks_than_there_are(small, small_folder):
    generator, _, _ = small
    with pytest.raises(UserError, match="plan quadratic:5: takes 5 masks, but the adapter has 4"):
        generator.using(plan=quadratic(5))
    with pytest.raises(UserError, match="plan linear:1: takes 1 mask, but there is no adapter"):
        mtp_jax.load(str(small_folder), plan=linear(1))


def test_an_adapter_folder_decodes(small_folder, small, tmp_path, command):
    generator, prompts, _ = small
    opened = open_base(str(small_folder))
    shape, adapter = noise(opened)
    base = {"name": "small", "fingerprint": opened.fingerprint}
    write_adapter(tmp_path / "adapter", generator.g, shape, adapter, base, {}, jnp.dtype("float32"))
    loaded = mtp_jax.load(str(small_folder), adapter=str(tmp_path / "adapter"), plan=quadratic(4))
    loaded.stops = ()
    ours = decoded(generator, quadratic(4), prompts, NEW, 3)
    theirs = loaded.complete(prompts, NEW, 3)
    assert [(d.token_ids, d.accepted) for d in ours] == [(d.token_ids, d.accepted) for d in theirs]
    outcome = command(
        "generate", "--model", small_folder, "--adapter", tmp_path / "adapter", "--plan", "quadratic:2", "--json",
        "--prompt", "the cat", "--max-new-tokens", 9,
    )  # fmt: skip
    record = json.loads(outcome.out)
    assert record["steps"] == sum(record["accepted"]) and len(record["accepted"]) == 3
