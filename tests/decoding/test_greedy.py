"""Greedy decoding emits what transformers emits, alone or in a ragged batch, and ends where it should."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import mtp_jax
from mtp_jax.decoding.loop import Decoding, Limits
from mtp_jax.errors import UserError

# A divergence is a tie only where the two best logits are closer than this.
TIE = 1e-4
NEW = 200
PROMPTS = [
    "Once upon a time",
    "Once upon a time, there was a little girl named Lily. She loved",
    "Tom and his dog went to the park. They",
    "The big red ball",
    "One day, a small bird",
    "Sara was sad because",
    "In the garden there was a",
    'Mom said, "Do not',
    "The cat",
    "A",
    "Ben likes to play with cars. He has a red car and a blue car. One day, he",
    "There was a king who had",
    "It was raining and",
    '"Can I have a cookie?" asked',
    "The sun was hot. The frog",
    "Lily and Max are friends. They like to",
    "Once there was a tree that",
    "The old man",
    "On a cold day, the little mouse looked for food. She found",
    "He was very happy. The end.",
]


class Reference:
    """Greedy continuations by transformers, each with the gap between the two best logits at every token."""

    def __init__(self, folder):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")

    def __call__(self, ids, new, stops=(), context=512):
        new = min(new, context - len(ids))
        with torch.no_grad():
            out = self.model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=new,
                do_sample=False,
                eos_token_id=list(stops) or None,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            )
        best = torch.stack(out.logits)[:, 0].topk(2).values
        return out.sequences[0, len(ids) :].tolist(), (best[:, 0] - best[:, 1]).tolist()


def ties(ours, theirs, gaps, name):
    """Where `ours` leaves `theirs`: nothing, or one tie; anything else fails."""
    if ours == theirs:
        return []
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    assert at < min(len(ours), len(theirs)), f"{name}: {len(ours)} tokens, not {len(theirs)}"
    assert gaps[at] < TIE, f"{name}: token {at} is {ours[at]}, not {theirs[at]}, though {gaps[at]:.6f} better"
    return [f"{name}: tie at token {at}, gap {gaps[at]:.1e}"]


@pytest.fixture(scope="module")
def story_teller(stories):
    return mtp_jax.load(str(stories), dtype="float32")


def story_prompts(generator):
    ids = [generator.encode(prompt) for prompt in PROMPTS]
    assert len(ids) == 20 and len({len(i) for i in ids}) > 8
    return ids


@pytest.mark.parametrize("batch_size", [1, 8])
def test_every_token_of_20_stories_is_the_best_of_transformers(stories, story_teller, batch_size, record_property):
    """By induction over the tokens this is the continuation that greedy decoding by transformers gives."""
    reference, found = Reference(stories), []
    prompts = story_prompts(story_teller)
    for ids, done in zip(prompts, story_teller.complete(prompts, NEW, batch_size), strict=True):
        ours = done.token_ids
        assert len(ours) == NEW or ours[-1] in story_teller.stops
        assert not set(ours[:-1]) & set(story_teller.stops)
        assert done.steps == len(ours) - 1
        with torch.no_grad():
            logits = reference.model(torch.tensor([ids + ours])).logits[0, len(ids) - 1 : -1]
        gaps = logits.max(dim=-1).values - logits[torch.arange(len(ours)), torch.tensor(ours)]
        assert gaps.max() < TIE, f"{ids}: token {int(gaps.argmax())} is {float(gaps.max())} below the best"
        found += [f"{ids}: tie at token {i}, gap {gaps[i]:.1e}" for i in gaps.nonzero()[:, 0].tolist()]
    record_property("ties", found)
    print("\n".join(found) or "no ties")


def same_text(stories, generator, prompts, new):
    reference, found = Reference(stories), []
    for ids, done in zip(prompts, generator.complete(prompts, new, 1), strict=True):
        theirs, gaps = reference(ids, new, generator.stops)
        found += ties(done.token_ids, theirs, gaps, str(ids))
        if not found:
            whole, prompt = (generator.tokenizer.decode(i, skip_special_tokens=True) for i in (ids + theirs, ids))
            assert prompt + generator.text(done) == whole
    print("\n".join(found) or "no ties")


def test_story_equals_generate_of_transformers(stories, story_teller):
    same_text(stories, story_teller, story_prompts(story_teller)[4:5], 80)


@pytest.mark.slow
def test_20_stories_equal_generate_of_transformers(stories, story_teller):
    same_text(stories, story_teller, story_prompts(story_teller), NEW)


def test_batches_agree_with_single_prompts(story_teller):
    ids = [story_teller.encode(prompt) for prompt in PROMPTS[:5]]
    single = [story_teller.complete([i], 60, 1)[0].token_ids for i in ids]
    assert [done.token_ids for done in story_teller.complete(ids, 60, 5)] == single
    assert [done.token_ids for done in story_teller.complete(ids, 60, 3)] == single  # the last batch is filled up


@pytest.fixture(scope="module")
def small(small_folder):
    """A generator that never stops by itself, and its prompts of length 1, 5 and 20."""
    generator = mtp_jax.load(str(small_folder), dtype="float32")
    generator.stops = ()
    draw = np.random.default_rng(5)
    return generator, [draw.integers(2, 256, length).tolist() for length in (1, 5, 20)]


@pytest.fixture(scope="module")
def free(small, small_folder):
    """What transformers writes after each prompt, without a stop id, and the gaps."""
    reference = Reference(small_folder)
    return [reference(prompt, 24, context=64) for prompt in small[1]]


def cut(tokens, stops):
    """Tokens up to the first stop id, that one included."""
    return next((tokens[: i + 1] for i, token in enumerate(tokens) if token in stops), tokens)


def test_ragged_batch_equals_transformers(small, free):
    generator, prompts = small
    done = generator.complete(prompts, 24, 3)
    assert [ties(d.token_ids, *f, "small") for d, f in zip(done, free, strict=True)] == [[], [], []]
    assert [d.steps for d in done] == [23, 23, 23]


@pytest.mark.parametrize("picks", [[(0, 0)], [(1, 4)], [(0, 9), (2, 5)], [(0, 3), (1, 0), (2, 20)]])
def test_each_row_ends_at_its_first_stop_id(small, free, monkeypatch, picks):
    generator, prompts = small
    stops = tuple(free[row][0][at] for row, at in picks)
    monkeypatch.setattr(generator, "stops", stops)
    monkeypatch.setattr(generator, "compiled", {})  # programs for other numbers of stop ids
    done = generator.complete(prompts, 24, 3)
    texts = [cut(tokens, stops) for tokens, _ in free]
    assert [d.token_ids for d in done] == texts
    assert [d.steps for d in done] == [len(text) - 1 for text in texts]
    assert min(len(text) for text in texts) < 24


def test_stop_ids_come_from_the_folder(small_folder, free, small, tmp_path):
    folder = shutil.copytree(small_folder, tmp_path / "model")
    stops = [free[0][0][2], free[1][0][6]]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    done = mtp_jax.load(str(folder), dtype="float32").complete(small[1], 24, 3)
    assert [d.token_ids for d in done] == [cut(tokens, stops) for tokens, _ in free]


@pytest.mark.parametrize("new", [1, 2, 24])
def test_length_limit_is_exact(small, free, new):
    generator, prompts = small
    done = generator.complete(prompts, new, 3)
    assert [d.token_ids for d in done] == [tokens[:new] for tokens, _ in free]
    assert [d.steps for d in done] == [new - 1] * 3


def test_context_limit_is_exact(small, small_folder):
    generator, (short, _, long) = small
    prompt = (long * 3)[:60]
    (alone,) = generator.complete([prompt], 100, 1)
    theirs = Reference(small_folder)(prompt, 100, context=64)
    assert len(alone.token_ids) == 4 and not ties(alone.token_ids, *theirs, "context")
    ragged = generator.complete([prompt, short, prompt[:-1] + [2] * 4], 100, 3)
    assert [len(d.token_ids) for d in ragged] == [4, 63, 1]
    assert ragged[0].token_ids == alone.token_ids


def test_rows_that_only_fill_a_batch_change_nothing(small, free):
    generator, prompts = small
    done = generator.complete(prompts[1:], 24, 4)
    assert [d.token_ids for d in done] == [tokens for tokens, _ in free[1:]]


def test_a_row_without_room_takes_no_step(small):
    generator, prompts = small
    rows = jnp.asarray([prompts[1], prompts[1]])
    limits = Limits(jnp.asarray([9, 0]), jnp.zeros(0, jnp.int32))
    state = Decoding(generator.forward).decode(generator.variables, rows, jnp.asarray([5, 5]), limits, 16, jnp.float32)
    assert state.length.tolist() == [9, 5]
    assert state.steps.tolist() == [3, 0]
    assert state.done.tolist() == [True, True]
    assert state.tokens[1, :5].tolist() == prompts[1]


def test_prompts_that_do_not_fit_are_refused(small):
    generator, _ = small
    with pytest.raises(UserError, match="is empty"):
        generator.encode("")
    with pytest.raises(UserError, match=r"64 tokens leave no room .* context of 64"):
        generator.encode("x" * 63)  # and a first token
    assert len(generator.encode("x" * 62)) == 63
    with pytest.raises(UserError, match="no chat template"):
        generator.encode([{"role": "user", "content": "hello"}])
