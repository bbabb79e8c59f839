"""Held-out documents: batches of all of them, and prompts cut from them."""

import itertools

import numpy as np
import pytest
from characters import ENDS, ids, make_documents, same, sequences_of
from chats import LOOK, MARK, MARKED, PLAIN, TALK, letters, turns, with_template

from mtp_jax.data.held_out import held_out_batches, held_out_prompts
from mtp_jax.data.sources import source_documents
from mtp_jax.data.tokens import Encoder
from mtp_jax.mtp.blocks import Anchors

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return make_documents(tmp_path_factory.mktemp("documents"))


# ---- batches


@pytest.mark.parametrize("length", [8, 16, 100])
def test_held_out_batches_are_all_windows_of_all_documents(found, length):
    stream = [(d, token) for d, document in enumerate(found) for token in ids(document, ENDS)]
    windows = [stream[i : i + length + 1] for i in range(0, len(stream), length + 1)]
    sequences = [s for batch in held_out_batches(found, ENDS, 4, length) for s in sequences_of(batch)]
    assert len(sequences) == -(-len(windows) // 4) * 4
    for sequence, window in itertools.zip_longest(sequences, windows, fillvalue=[]):
        real = sequence["segments"] > 0
        pairs = list(itertools.pairwise(window))
        assert list(zip(sequence["documents"][real], sequence["tokens"][real], strict=True)) == window[:length]
        labels = [after[1] for before, after in pairs if before[0] == after[0]]
        assert sequence["labels"][sequence["supervised"]].tolist() == labels
        assert not sequence["supervised"][~real].any()


def test_held_out_batches_are_the_same_each_time_and_in_any_order(found):
    first = list(held_out_batches(found, ENDS, 4, 16))
    again = list(held_out_batches(found[::-1], ENDS, 4, 16))
    assert len(first) == len(again) and all(same(a, b) for a, b in zip(first, again, strict=True))


def test_held_out_batches_end_with_padding_and_at_the_limit(found):
    every = list(held_out_batches(found, ENDS, 5, 16))
    last = every[-1]
    assert last["segments"][-1].min() == 0 and not last["supervised"][last["segments"] == 0].any()
    limited = list(held_out_batches(found, ENDS, 5, 16, limit=2))
    assert len(limited) == 2 and all(same(a, b) for a, b in zip(limited, every, strict=False))


def test_each_process_takes_its_sequences_of_held_out_batches(found):
    for part in (range(1), range(1, 4)):
        whole = held_out_batches(found, ENDS, 4, 16, anchors=Anchors(4, 0))
        mine = held_out_batches(found, ENDS, 4, 16, anchors=Anchors(4, 0), sequences=part)
        for batch, own in itertools.zip_longest(whole, mine):
            assert same(own, {key: value[part.start : part.stop] for key, value in batch.items()})


@pytest.mark.parametrize("template", [MARKED, PLAIN], ids=["marked", "prefix difference"])
def test_anchors_stand_behind_the_last_prompt_token_and_none_before(jsonl, template):
    tokenizer = with_template(letters(), template)
    found = source_documents(jsonl([{"messages": TALK}]))
    (batch,) = held_out_batches(found, tokenizer, 1, 60, anchors=Anchors(None, 0))
    (sequence,) = sequences_of(batch)
    anchors = sequence["anchors"][sequence["anchors"] >= 0].tolist()
    # A row is supervised where the character after it is the assistant's.
    supervised = [t for t in range(len(LOOK) - 1) if MARK[t + 1] == "^"]
    assert np.flatnonzero(sequence["supervised"]).tolist() == supervised
    assert anchors == supervised
    assert LOOK[: anchors[0] + 1] == "U:how are you?\nA:" and tokenizer.decode(sequence["labels"][anchors[0]]) == " "


def test_a_conversation_longer_than_a_sequence_is_cut_and_kept_whole(jsonl):
    tokenizer = with_template(letters(), PLAIN)
    found = source_documents(jsonl([{"messages": TALK}]))
    sequences = [s for batch in held_out_batches(found, tokenizer, 1, 9) for s in sequences_of(batch)]
    # Windows of ten tokens, of which the first is no label.
    expected = [MARK[i + 1 : i + 10].ljust(9, "_") for i in range(0, len(MARK), 10)]
    assert ["".join("_^"[flag] for flag in s["supervised"].astype(int)) for s in sequences] == expected


# ---- prompts


def test_prompts_of_the_estimate_end_before_supervised_tokens(jsonl):
    tokenizer = with_template(letters(), PLAIN)
    found = source_documents(
        jsonl([{"messages": turns(f"number {i}?", f"yes, it is {i}, that is so" * 2)} for i in range(20)])
    )
    prompts = held_out_prompts(found, tokenizer, 5, 12)
    texts = [tokenizer.decode(encoded.tokens) for encoded in map(Encoder(tokenizer), found)]
    assert len(prompts) == 5
    for prompt in prompts:
        (text,) = [text for text in texts if tokenizer.decode(prompt) in text][:1]
        assert len(prompt) == 12 and text.index(tokenizer.decode(prompt)) + 12 >= text.index("A:") + 2
