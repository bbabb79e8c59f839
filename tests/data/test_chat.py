"""Which tokens are to be predicted: of conversations, of prompts with completions, and what follows for anchors."""

import contextlib
import copy
import itertools
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tokenizers import processors

from mtp_jax.config_file import validate
from mtp_jax.data.encoding import Encoder
from mtp_jax.data.pipeline import Anchors, held_out_batches, training_batches
from mtp_jax.data.sources import documents
from mtp_jax.data.supervision import check_supervision
from mtp_jax.data.tokenizer import train_tokenizer
from mtp_jax.errors import UserError
from mtp_jax.training.evaluation import held_out_prompts
from mtp_jax.training.run import train

MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content + '\n' }}{% endgeneration %}"
    "{% else %}{{ m.role[0].upper() + ':' + m.content + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)
PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# Thinks in the last turn alone, as Qwen3's template does.
THINKS = PLAIN.replace("A:{{ m.content", "A:{{ ('(thinks)' if loop.last else '') + m.content")
# What the generation prompt promises is not how a turn begins.
BROKEN = PLAIN.replace("{% if add_generation_prompt %}A:", "{% if add_generation_prompt %}Assistant:")


def turns(*texts):
    """A conversation, the user first; a text that begins with `system ` is one of the system."""
    return [{"role": role, "content": text} for role, text in zip(itertools.cycle(["user", "assistant"]), texts)]


TALK = turns("how are you?", " fine \n", "the cat?", "sat on the mat")
LOOK = "U:how are you?\nA: fine \n\nU:the cat?\nA:sat on the mat\n"
MARK = "_________________^^^^^^^^_____________^^^^^^^^^^^^^^^"  # under LOOK: what the assistant wrote


def with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def letters():
    """A tokenizer of single bytes, whose tokens are the characters."""
    return train_tokenizer(["a"], 258)


@pytest.fixture(scope="module")
def trimming():
    """A tokenizer that trims white space off its offsets, as Llama 3's does."""
    tokenizer = train_tokenizer(["how are you? fine, the cat sat on the mat\n\n" * 9], 300)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


@pytest.fixture
def encoded(jsonl):
    """A function from a tokenizer and one row to what it is encoded to."""

    def encode(tokenizer, row, **keys):
        (example,) = documents(jsonl([row], **keys))
        return Encoder(tokenizer)(example)

    return encode


def supervised_runs(tokenizer, encoded):
    """The text of each unbroken stretch of supervised tokens."""
    pairs = zip(encoded.supervised, encoded.tokens, strict=True)
    runs = [(key, [token for _, token in group]) for key, group in itertools.groupby(pairs, lambda pair: pair[0])]
    return [tokenizer.decode(tokens) for key, tokens in runs if key]


# ---- conversations


@pytest.mark.parametrize("template", [MARKED, PLAIN], ids=["marked", "prefix difference"])
def test_the_assistant_alone_is_supervised(encoded, letters, template):
    tokenizer = with_template(letters, template)
    found = encoded(tokenizer, {"messages": TALK})
    assert len(LOOK) == len(MARK) and tokenizer.decode(found.tokens) == LOOK
    assert "".join("_^"[flag] for flag in found.supervised.astype(int)) == MARK


@pytest.mark.parametrize("template", [MARKED, PLAIN], ids=["marked", "prefix difference"])
def test_white_space_at_the_ends_of_a_turn_is_kept(encoded, trimming, template):
    tokenizer = with_template(trimming, template)
    found = encoded(tokenizer, {"messages": TALK})
    assert len(found.tokens) < len(LOOK) and tokenizer.decode(found.tokens) == LOOK
    assert supervised_runs(tokenizer, found) == [" fine \n\n", "sat on the mat\n"]
    tokenizer.chat_template = template.replace("m.content + '\n' }}{% end", "m.content }}{% end").replace(
        "A:{{ m.content + '\n'", "A:{{ m.content"
    )
    found = encoded(tokenizer, {"messages": turns("a", " fine  ", "b", " ")})
    assert supervised_runs(tokenizer, found) == [" fine  ", " "]


@pytest.mark.parametrize("template", [MARKED, PLAIN], ids=["marked", "prefix difference"])
@pytest.mark.parametrize(
    ("messages", "runs"),
    [
        (turns("hi"), []),
        ([{"role": "system", "content": "be kind"}, *turns("hi", "yes")], ["yes\n"]),
        ([*turns("hi", "yes"), {"role": "assistant", "content": "日本 é"}], ["yes\n", "日本 é\n"]),
        ([{"role": "assistant", "content": "welcome"}], ["welcome\n"]),
        (turns("hi", "yes", "bye"), ["yes\n"]),
    ],
)
def test_conversations_of_other_shapes(encoded, letters, template, messages, runs):
    tokenizer = with_template(letters, template)
    assert supervised_runs(tokenizer, encoded(tokenizer, {"messages": messages})) == runs


def test_a_turn_that_was_never_written_so_is_context(encoded, letters, jsonl):
    tokenizer = with_template(letters, THINKS)
    found = encoded(tokenizer, {"messages": TALK})
    assert tokenizer.decode(found.tokens) == LOOK.replace("A:sat", "A:(thinks)sat")
    assert supervised_runs(tokenizer, found) == ["(thinks)sat on the mat\n"] and found.rewritten == 1
    (line,) = check_supervision([documents(jsonl([{"messages": TALK}] * 3))], tokenizer)
    assert line == (
        "data.sources.0: 3 conversations, supervised in assistant turns by prefix difference of the chat template; in "
        "3 of them, 3 earlier turns that the template rewrites are not"
    )


@contextlib.contextmanager
def switching_often():
    """Within: Python changes threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_threads_do_not_disturb_each_other(jsonl, letters):
    tokenizer = with_template(letters, MARKED)
    rows = documents(jsonl([{"messages": turns("hi", str(i)) * 4} for i in range(200)]))
    encode = Encoder(tokenizer)
    with switching_often(), ThreadPoolExecutor(8) as pool:
        runs = [supervised_runs(tokenizer, found) for found in pool.map(encode, rows)]
    assert runs == [[f"{i}\n"] * 4 for i in range(200)]


@pytest.mark.parametrize(
    ("template", "how"), [(MARKED, "where the chat template marks {% generation %}"), (PLAIN, "by prefix difference")]
)
def test_which_way_is_used_is_told(jsonl, letters, template, how):
    rows = documents(jsonl([{"messages": TALK}] * 100))
    (line,) = check_supervision([rows], with_template(letters, template))
    assert line.startswith("data.sources.0: 100 conversations, supervised ") and how in line


def test_the_template_of_trio(encoded):
    root = Path(os.environ.get("MTP_JAX_SHARED") or Path(__file__).resolve().parents[3] / "shared")
    folder = root / "models" / "trio-17m"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"{folder} is not there; MTP_JAX_SHARED names the folder that holds models/trio-17m")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    marked = encoded(tokenizer, {"messages": TALK})
    assert supervised_runs(tokenizer, marked) == [" fine \n<|end|>\n", "sat on the mat<|end|>\n"]
    template = tokenizer.chat_template
    tokenizer.chat_template = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    by_prefix = encoded(tokenizer, {"messages": TALK})
    assert all(np.array_equal(a, b) for a, b in zip(marked, by_prefix, strict=True))
    tokenizer.chat_template = template
    masked = tokenizer.apply_chat_template(TALK, return_assistant_tokens_mask=True, return_dict=True)
    assert masked["input_ids"] == marked.tokens.tolist()
    assert masked["assistant_masks"] == marked.supervised.astype(int).tolist()


# ---- prompts with completions


def test_the_completion_alone_is_supervised(encoded, letters):
    found = encoded(letters, {"prompt": "how?", "completion": " so"})
    assert letters.decode(found.tokens) == "<|endoftext|>how? so<|endoftext|>"
    assert found.supervised.astype(int).tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1]


def test_a_token_that_reaches_into_the_completion_belongs_to_it(encoded, trimming):
    found = encoded(trimming, {"prompt": "you? fine, the c", "completion": "at sat"})
    (run,) = supervised_runs(trimming, found)
    assert run == " cat sat<|endoftext|>"


def test_texts_are_supervised_throughout(encoded, letters):
    assert encoded(letters, {"text": "all of it"}).supervised.all()


# ---- what is wrong is told before a run starts


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "data.sources.0: the tokenizer has no chat template"),
        (BROKEN, "data.sources.0: rows.jsonl#0: the chat template cannot tell what the assistant wrote in message 1"),
        (
            "{{ raise_exception('no') }}",
            "data.sources.0: rows.jsonl#0: the chat template refuses the conversation (no)",
        ),
        ("{{ messages[0].content }}{% if %}", "data.sources.0: rows.jsonl#0: the chat template refuses"),
        ({"one": PLAIN, "two": PLAIN}, "data.sources.0: the tokenizer's chat template cannot be chosen"),
        (
            "{{ messages[0].content }}{% generation %}{% endgeneration %}",
            "data.sources.0: none of the 5 rows looked at",
        ),
    ],
)
def test_a_template_that_does_not_do_is_one_fault(jsonl, letters, template, says):
    rows = documents(jsonl([{"messages": TALK}] * 5))
    with pytest.raises(UserError) as caught:
        check_supervision([rows], with_template(letters, template))
    (fault,) = caught.value.faults
    assert fault.startswith(says)


def test_a_run_that_lacks_a_template_leaves_no_trace(jsonl, tree, small_folder, tmp_path):
    source = jsonl([{"messages": TALK}] * 30).model_dump()
    for model in ({"path": str(small_folder)}, tree["model"]):  # the second trains its tokenizer
        with pytest.raises(UserError, match="no chat template"):
            train(validate({**tree, "model": model, "data": {"sources": [source], "held_out": 0.2}}, "tree"))
    assert not Path(tree["output_dir"]).exists()


# ---- batches


def rows_of(batch):
    return [{key: value[i] for key, value in batch.items()} for i in range(len(batch["tokens"]))]


@pytest.mark.parametrize("template", [MARKED, PLAIN], ids=["marked", "prefix difference"])
def test_anchors_stand_behind_the_last_prompt_token_and_none_before(jsonl, letters, template):
    tokenizer = with_template(letters, template)
    examples = documents(jsonl([{"messages": TALK}]))
    ((row,),) = (rows_of(batch) for batch in held_out_batches(examples, tokenizer, 1, 60, anchors=Anchors(None, 0)))
    anchors = row["anchors"][row["anchors"] >= 0].tolist()
    # A row is supervised where the character after it is the assistant's.
    supervised = [t for t in range(len(LOOK) - 1) if MARK[t + 1] == "^"]
    assert np.flatnonzero(row["supervised"]).tolist() == supervised
    assert anchors == supervised
    assert LOOK[: anchors[0] + 1] == "U:how are you?\nA:" and tokenizer.decode(row["labels"][anchors[0]]) == " "


def test_training_batches_keep_supervision_through_packing(jsonl, letters):
    tokenizer = with_template(letters, PLAIN)
    examples = documents(jsonl([{"messages": turns("hi", "yes" * i)} for i in range(1, 8)]))
    batches, found = training_batches([examples], [1.0], tokenizer, 2, 32, 0, Anchors(8, 0))
    encode, anchored = Encoder(tokenizer), 0
    for row in itertools.chain.from_iterable(rows_of(next(batches)) for _ in range(12)):
        for segment in range(1, row["segments"].max() + 1):
            inside = row["segments"] == segment
            whole = encode(found[row["documents"][inside][0]])
            assert row["tokens"][inside].tolist() == whole.tokens.tolist()
            assert row["supervised"][inside].tolist() == [*whole.supervised[1:].tolist(), False]
            # The 6 rows before the last prompt token of "U:hi", a new line, "A:", and that token.
            assert row["supervised"][inside][:7].astype(int).tolist() == [0, 0, 0, 0, 0, 0, 1]
        anchors = row["anchors"][row["anchors"] >= 0]
        anchored += len(anchors)
        assert row["supervised"][anchors].all()
    assert anchored


def test_rows_that_are_too_long_are_told_before_a_run_starts(jsonl, letters):
    tokenizer = with_template(letters, PLAIN)
    rows = documents(jsonl([{"messages": turns("hi", "yes" * i)} for i in (1, 1, 20)]))
    (line,) = check_supervision([rows], tokenizer, 32, "cut")
    assert line.endswith("; 1 of 3 looked at are longer than a sequence of 32 and are cut")
    (line,) = check_supervision([rows], tokenizer, 128, "cut")
    assert "longer" not in line
    with pytest.raises(UserError, match=r"all of the 3 rows looked at are longer than train\.sequence_length=4"):
        check_supervision([rows], tokenizer, 4, "drop")


def test_a_conversation_longer_than_a_sequence_is_cut_and_kept_whole(jsonl, letters):
    tokenizer = with_template(letters, PLAIN)
    examples = documents(jsonl([{"messages": TALK}]))
    rows = [row for batch in held_out_batches(examples, tokenizer, 1, 9) for row in rows_of(batch)]
    # Windows of ten tokens, of which the first is no label.
    expected = [MARK[i + 1 : i + 10].ljust(9, "_") for i in range(0, len(MARK), 10)]
    assert ["".join("_^"[flag] for flag in row["supervised"].astype(int)) for row in rows] == expected


def test_prompts_of_the_estimate_end_before_supervised_tokens(jsonl, letters):
    tokenizer = with_template(letters, PLAIN)
    examples = documents(
        jsonl([{"messages": turns(f"number {i}?", f"yes, it is {i}, that is so" * 2)} for i in range(20)])
    )
    prompts = held_out_prompts(examples, tokenizer, 5, 12)
    texts = [tokenizer.decode(encoded.tokens) for encoded in map(Encoder(tokenizer), examples)]
    assert len(prompts) == 5
    for prompt in prompts:
        (text,) = [text for text in texts if tokenizer.decode(prompt) in text][:1]
        assert len(prompt) == 12 and text.index(tokenizer.decode(prompt)) + 12 >= text.index("A:") + 2
