"""Drafts without masks: the text is that of plain decoding, and drafts are what each definition says, step by step."""

import copy
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import mtp_jax
from mtp_jax import api
from mtp_jax.api import with_draft_model
from mtp_jax.decoding import loop
from mtp_jax.decoding.drafters import Jacobi, parse_drafter
from mtp_jax.decoding.lookup import look_up
from mtp_jax.decoding.loop import Decoding, Limits
from mtp_jax.decoding.options import Options
from mtp_jax.decoding.plan import parse_plan, plain, quadratic, unmasked
from mtp_jax.decoding.processors import Processors, Settings
from mtp_jax.errors import UserError
from mtp_jax.model.base import open_base
from mtp_jax.model.decoder import Decoder
from mtp_jax.model.weights import PROJECTIONS
from mtp_jax.mtp.adapter import AdapterShape, init_adapter

NEW, CONTEXT = 40, 64
# A random model whose text repeats itself.
REPETITIVE = {"num_hidden_layers": 1, "hidden_size": 16, "tie_word_embeddings": True}
WAYS = ("lookup", "jacobi", "draft")


@pytest.fixture(scope="module")
def folders(models, small_tokenizer, tmp_path_factory):
    """A base of 320 ids, 20 of which the tokenizer lacks, and draft models like it of fewer and of more ids."""
    whole = models.make("llama", vocab_size=340, **REPETITIVE)
    draw, found = torch.Generator().manual_seed(1), {}
    for name, V, noise in (("base", 320, 0.0), ("fewer", 300, 0.02), ("more", 340, 0.02)):
        model = copy.deepcopy(whole)
        model.resize_token_embeddings(V)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(noise * torch.randn(weight.shape, generator=draw))
        found[name] = tmp_path_factory.mktemp("models") / name
        model.save_pretrained(found[name])
        small_tokenizer.save_pretrained(found[name])
    return found


def drafted(folders, draft):
    """The base with a draft model, and without stop ids."""
    generator = with_draft_model(mtp_jax.load(str(folders["base"]), dtype="float32"), open_base(str(folders[draft])), 1)
    generator.stops = ()
    return generator


@pytest.fixture(scope="module")
def base(folders):
    """A generator with a draft model that knows fewer tokens."""
    return drafted(folders, "fewer")


@pytest.fixture(scope="module")
def prompts():
    draw = np.random.default_rng(5)
    return [draw.integers(2, 256, length).tolist() for length in (1, 5, 20)]


@pytest.fixture(scope="module")
def texts(base, prompts):
    """What plain decoding makes of the prompts."""
    return [done.token_ids for done in base.using(plan=plain()).complete(prompts, NEW, 3)]


def by(generator, name):
    """The generator with the drafter of that name, or by prompt lookup; it has a draft model."""
    if name.startswith("lookup:"):
        return generator.using(plan=parse_plan(name))
    return generator.using(drafter=parse_drafter(name, generator.options.drafter.forward))


@pytest.mark.parametrize("name", [f"{way}:{d}" for way in WAYS for d in (1, 4)])
def test_the_text_is_that_of_plain_decoding(base, prompts, texts, name):
    generator = by(base, name)
    for batch_size in (1, 4):  # alone; and ragged, with a row that only fills the batch
        done = generator.complete(prompts, NEW, batch_size)
        assert [d.token_ids for d in done] == texts
        for d in done:
            assert len(d.accepted) == generator.options.plan.drafts + 1 and sum(d.accepted) == d.steps
            assert sum(i * n for i, n in enumerate(d.accepted, 1)) == NEW - 1 and d.finish_reason == "length"
            assert d.emitted_by == sorted(d.emitted_by) and d.emitted_by[0] == 0 and d.emitted_by[-1] == d.steps
    assert sum(d.steps for d in done) < 3 * (NEW - 1)  # some drafts are accepted


@pytest.mark.parametrize("name", [f"{way}:3" for way in WAYS])
def test_xla_alone_gives_the_same_tokens_from_drafts_of_more_ids(folders, prompts, texts, name, monkeypatch):
    monkeypatch.setenv("MTP_JAX_NATIVE", "0")
    done = by(drafted(folders, "more"), name).complete(prompts, NEW, 3)
    assert [d.token_ids for d in done] == texts


@pytest.mark.parametrize("name", [f"{way}:4" for way in WAYS])
def test_limits_inside_drafts_are_exact(base, prompts, texts, name):
    generator = by(base, name)
    for new in (1, 2, 5, 17, 18, 19):
        assert [d.token_ids for d in generator.complete(prompts, new, 4)] == [text[:new] for text in texts]
    (done,) = generator.complete(prompts[2:], 1000, 1)
    assert len(done.token_ids) == CONTEXT - 20 and done.finish_reason == "context"
    assert done.token_ids[:NEW] == texts[2]


@pytest.mark.parametrize("name", [f"{way}:4" for way in WAYS])
def test_stop_ids_inside_drafts_end_a_row_exactly(base, prompts, texts, name, monkeypatch):
    monkeypatch.setattr(base, "compiled", {})  # programs for other numbers of stop ids
    generator, inside = by(base, name), 0
    for row, at in [(row, at) for row in range(3) for at in (1, 6, 12, 30)]:
        generator.stops = stops = (texts[row][at], texts[0][20])
        cut = [next((t[: i + 1] for i, token in enumerate(t) if token in stops), t) for t in texts]
        done = generator.complete(prompts, NEW, 4)
        assert [d.token_ids for d in done] == cut
        assert [d.finish_reason for d in done] == ["stop" if c[-1] in stops else "length" for c in cut]
        inside += sum(d.emitted_by.count(d.steps) > 1 for d in done if d.steps)
    assert inside


@pytest.mark.parametrize("name", [f"{way}:3" for way in WAYS])
def test_settings_of_a_generation_config_are_kept(base, prompts, texts, name, monkeypatch):
    processors = Processors(repetition_penalty=1.05, no_repeat_ngram_size=6, suppress_tokens=(12, 310))
    monkeypatch.setattr(base, "settings", Settings(processors, None, (), ()))
    wanted = [done.token_ids for done in base.using(plan=plain()).complete(prompts, NEW, 3)]
    assert [done.token_ids for done in by(base, name).complete(prompts, NEW, 3)] == wanted
    assert all(text != plainly for text, plainly in zip(wanted, texts, strict=True))


@pytest.mark.parametrize("processors", [None, Processors(repetition_penalty=1.3, no_repeat_ngram_size=2)])
def test_a_base_that_drafts_for_itself_is_always_right(folders, prompts, processors, monkeypatch):
    generator = drafted(folders, "base")
    monkeypatch.setattr(generator, "settings", Settings(processors, None, (), ()))
    for d in (1, 4):
        done = by(generator, f"draft:{d}").complete(prompts, NEW, 4)
        steps, left = divmod(NEW - 1, d + 1)
        histogram = [0] * d + [steps]
        if left:  # the last step is cut by the limit
            histogram[left - 1] += 1
        assert [each.accepted for each in done] == [histogram] * 3


# ---- drafts, step by step


def states(generator, prompts, new):
    """The loop's state after prefill and after each step, as arrays of numpy without cache."""
    decoding = Decoding(generator.forward, generator.options)
    lengths = np.array([len(ids) for ids in prompts], np.int32)
    rows = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, ids in zip(rows, prompts, strict=True):
        row[: len(ids)] = ids
    limits = Limits(jnp.asarray(lengths + new), jnp.zeros(0, jnp.int32))
    prefill, step = jax.jit(decoding.prefill, static_argnums=(4, 5)), jax.jit(decoding.step)
    slots = int(lengths.max()) + new + generator.options.plan.drafts + 1
    state = prefill(generator.variables, rows, lengths, limits, slots, "float32")
    while True:
        yield jax.device_get(state._replace(cache=None, drafter=None, keys=None))
        if state.done.all():
            return
        state = step(generator.variables, state, limits, None)


def choices_of(folder):
    """A function from a text to the likeliest token behind each of its tokens, and behind which of these; no cache."""
    opened = open_base(str(folder))
    model, params = Decoder(opened.g), {"params": opened.load(jnp.dtype("float32"))}

    @jax.jit
    def logits(tokens):
        latents, _ = model.apply(params, tokens, jnp.arange(tokens.shape[1])[None])
        return model.apply(params, latents, method="logits")[0]

    def choices(text, V=None):
        row = np.zeros((1, 80), np.int32)
        row[0, : len(text)] = np.minimum(text, opened.g.V - 1)
        return np.asarray(logits(row))[: len(text), :V].argmax(-1).tolist()

    return choices


def looked_up(text, d):
    """What follows the latest occurrence of the last three, two or one tokens that d tokens follow, else the first."""
    for n in (3, 2, 1):
        ends = [end for end in range(n, len(text)) if text[end - n : end] == text[-n:]]
        if ends:
            start = max((end for end in ends if end + d <= len(text)), default=ends[0])
            return text[start : start + d]
    return []


@pytest.mark.parametrize("d", [1, 4])
def test_lookups_are_those_of_a_search(d):
    """Texts of every length, whose unused slots hold what might be taken for a match."""
    draw = np.random.default_rng(d)
    for letters in (1, 2, 5, 40):
        texts, lengths = draw.integers(0, letters, (300, 24)), draw.integers(1, 25, 300)
        drafts, valid = jax.device_get(look_up(jnp.asarray(texts), jnp.asarray(lengths), d))
        assert len(set(valid.tolist())) > 1 or letters == 40
        for text, length, ours, count in zip(texts.tolist(), lengths, drafts.tolist(), valid, strict=True):
            assert ours[:count] == looked_up(text[:length], d)


@pytest.mark.parametrize("d", [1, 4])
def test_every_step_looks_up_in_all_that_was_emitted(base, prompts, d):
    valid = set()
    for state in states(by(base, f"lookup:{d}"), prompts, NEW):
        for row, length, drafts, count in zip(state.tokens, state.length, state.drafts, state.valid, strict=True):
            assert drafts[:count].tolist() == looked_up(row[:length].tolist(), d)
            valid.add(int(count))
    assert valid == set(range(d + 1))


@pytest.mark.parametrize("name", ["blocks:2,0,1+lookup:2", "linear:1+lookup:3"])
def test_every_step_looks_up_behind_the_drafts_of_its_masks(folders, prompts, texts, name):
    """As many of these as there are after what was accepted; the rest is what a search finds in the text and them."""
    opened, plan = open_base(str(folders["base"])), parse_plan(name)
    M, d = plan.block, plan.drafts
    shape = AdapterShape(2, 4, 8.0, PROJECTIONS, "residual")
    adapter = init_adapter(opened.g, shape, opened.load()["embed"]["embedding"], jax.random.key(1))
    generator = api.generator(opened, Options(plan), jnp.dtype("float32"), (shape, adapter))
    generator.stops = ()
    assert [done.token_ids for done in generator.complete(prompts, NEW, 3)] == texts
    seen, before = set(), None
    for state in states(generator, prompts, NEW):
        for i, (row, length, drafts, valid) in enumerate(
            zip(state.tokens, state.length, state.drafts, state.valid, strict=True)
        ):
            if before is None:
                of_masks = M
            else:
                accepted = int(length - before.length[i]) - 1
                of_masks = plan.masks[accepted] if not plan.floating else M * (accepted == before.valid[i])
            if state.done[i]:
                continue
            text = [*row[:length].tolist(), *drafts[:of_masks].tolist()]
            found = looked_up(text, d)[: d - of_masks]
            assert drafts[of_masks:valid].tolist() == found and valid == of_masks + len(found)
            seen.add((of_masks, int(valid)))
        before = state
    assert {0, M} <= {of_masks for of_masks, _ in seen} and len(seen) > 3


@pytest.mark.parametrize("d", [1, 4])
def test_jacobi_takes_the_steps_of_a_literal_loop(base, folders, prompts, texts, d):
    choices = choices_of(folders["base"])
    done = by(base, f"jacobi:{d}").complete(prompts, NEW, 3)
    for prompt, wanted, ours in zip(prompts, texts, done, strict=True):
        text = [*prompt, choices(prompt)[-1]]
        guess, steps = [text[-1]] * d, 0
        while len(text) < len(prompt) + NEW:
            behind = choices(text + guess)[len(text) - 1 :]
            right = 0
            while right < d and guess[right] == behind[right]:
                right += 1
            text += behind[: right + 1]
            guess, steps = (behind[right + 1 :] + [behind[-1]] * d)[:d], steps + 1
        assert text[len(prompt) :][:NEW] == wanted
        assert ours.steps == steps


@pytest.mark.parametrize("draft", ["fewer", "more"])
def test_a_draft_model_continues_the_text(folders, prompts, draft, monkeypatch):
    """In every step as it would without a cache, with no draft that the base has no id for."""
    monkeypatch.setattr(loop, "PREFILL_CHUNK", 8)
    generator, choices, seen = by(drafted(folders, draft), "draft:3"), choices_of(folders[draft]), set()
    for state in states(generator, prompts, 12):
        for row, length, drafts in zip(state.tokens, state.length, state.drafts, strict=True):
            text = row[:length].tolist()
            for _ in range(3):
                text.append(choices(text, 320)[-1])
            assert drafts.tolist() == text[length:]
        seen.update(np.flatnonzero(state.accepted.sum(axis=0)).tolist())
    assert len(seen) > 2  # what the cache holds of rejected drafts would matter


@pytest.mark.parametrize("native", ["0", "1"])
def test_ids_that_a_draft_model_lacks_are_read_as_its_last_one(folders, native, monkeypatch):
    monkeypatch.setenv("MTP_JAX_NATIVE", native)
    generator = drafted(folders, "fewer")
    drafter = generator.options.drafter

    def drafts(token):
        text, scores = jnp.full((1, 16), token), jnp.zeros((1, 1, 320))
        state = drafter.prefill(generator.variables, text[:, :4], jnp.asarray([4]), 16, 8)
        found, _, _ = drafter.draft(generator.variables, state, text, jnp.asarray([5]), scores, jnp.asarray([0]), None)
        return found.tolist()

    assert drafts(319) == drafts(299) != drafts(7)


# ---- names, options and what is refused


@pytest.mark.quick
def test_names_read_back():
    drafter = parse_drafter("jacobi:2")
    assert str(drafter) == "jacobi:2" and drafter == Jacobi(2) and hash(drafter) == hash(Jacobi(2))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("jacobi", "jacobi: unknown way to draft; give jacobi:d or draft:d"),
        ("jacobi:", "unknown way"),
        ("jacobi:x", "unknown way"),
        ("jacobi:-1", "unknown way"),
        ("lookup:2", "unknown way"),
        ("quadratic:2", "unknown way"),
        ("jacobi:0", "jacobi:0: should have at least 1 draft"),
        ("draft:4", "draft:4: there is no draft model"),
    ],
)
def test_names_that_do_not_do_are_refused(name, says):
    with pytest.raises(UserError, match=says):
        parse_drafter(name)


@pytest.mark.quick
def test_a_drafter_brings_its_plan_and_a_plan_takes_its_place():
    options = Options(shortlist=9).using(drafter=Jacobi(3))
    assert (options.plan, options.drafter, options.shortlist) == (unmasked(3), Jacobi(3), 9)
    assert options.using(shortlist=7) == Options(unmasked(3), 7, drafter=Jacobi(3))
    assert options.using(drafter=Jacobi(2)) == Options(unmasked(2), 9, drafter=Jacobi(2))
    assert options.using(plan=quadratic(2)) == Options(quadratic(2), 9)
    assert options.using(drafter=None) == Options(plain(), 9)
    assert Options(quadratic(2)).using(drafter=None) == Options(quadratic(2))
    with pytest.raises(ValueError, match="a drafter of 3 drafts takes a plan of as many and without masks"):
        options.using(plan=quadratic(3), drafter=Jacobi(3))


def test_a_draft_model_is_named_by_its_str_and_gives_way_to_a_plan(base, prompts, texts):
    assert str(by(base, "draft:2").options.drafter) == "draft:2"
    alone = base.using(plan=plain())
    assert alone.options.drafter is None
    assert [done.steps for done in alone.complete(prompts, NEW, 3)] == [NEW - 1] * 3


def test_a_draft_model_of_another_tokenizer_is_refused(folders, base, stories, tmp_path):
    with pytest.raises(UserError) as refused:
        with_draft_model(base, open_base(str(stories)), 2)
    token, other = (open_base(str(at)).tokenizer.convert_ids_to_tokens(0) for at in (stories, folders["base"]))
    (fault,) = refused.value.faults
    assert fault.startswith(f"{stories}: cannot draft for {folders['base']}, whose tokenizer has other tokens: ")
    assert f"id 0 is {token!r} here and {other!r} there" in fault

    folder = shutil.copytree(folders["more"], tmp_path / "more")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=f"id {len(tokenizer) - 1} is '<think>' here and none there"):
        with_draft_model(base, open_base(str(folder)), 2)


def test_a_draft_model_drafts_at_least_one_token(folders, base):
    with pytest.raises(UserError, match=r"fewer: should draft at least 1 token in each step, not 0\."):
        with_draft_model(base, open_base(str(folders["fewer"])), 0)
