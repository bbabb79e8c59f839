"""Which tokens carry loss: in conversations, in prompts with completions, and in texts."""

import contextlib
import itertools
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from chats import LOOK, MARK, MARKED, PLAIN, TALK, THINKS, letters, turns, with_template
from tokenizers import processors

from mtp_jax.data.sources import source_documents
from mtp_jax.data.tokenizer import train_tokenizer
from mtp_jax.data.tokens import Encoder

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def trimming():
    """A tokenizer that trims white space off its offsets, as Llama 3's does."""
    tokenizer = train_tokenizer(["how are you? fine, the cat sat on the mat\n\n" * 9], 300)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


@pytest.fixture
def encoded(jsonl):
    """A function from a tokenizer and one record to what it is encoded to."""

    def encode(tokenizer, record, **keys):
        (document,) = source_documents(jsonl([record], **keys))
        return Encoder(tokenizer)(document)

    return encode


def supervised_runs(tokenizer, encoded):
    """The text of each unbroken stretch of supervised tokens."""
    pairs = zip(encoded.supervised, encoded.tokens, strict=True)
    runs = [(key, [token for _, token in group]) for key, group in itertools.groupby(pairs, lambda pair: pair[0])]
    return [tokenizer.decode(tokens) for key, tokens in runs if key]


# ---- conversations


@pytest.mark.parametrize("template", [MARKED, PLAIN], ids=["marked", "prefix difference"])
def test_the_assistant_alone_is_supervised(encoded, template):
    tokenizer = with_template(letters(), template)
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
def test_conversations_of_other_shapes(encoded, template, messages, runs):
    tokenizer = with_template(letters(), template)
    assert supervised_runs(tokenizer, encoded(tokenizer, {"messages": messages})) == runs


def test_a_turn_that_was_never_written_so_is_context(encoded):
    tokenizer = with_template(letters(), THINKS)
    found = encoded(tokenizer, {"messages": TALK})
    assert tokenizer.decode(found.tokens) == LOOK.replace("A:sat", "A:(thinks)sat")
    assert supervised_runs(tokenizer, found) == ["(thinks)sat on the mat\n"] and found.rewritten == 1


@contextlib.contextmanager
def switching_often():
    """Within: Python changes threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_threads_do_not_disturb_each_other(jsonl):
    tokenizer = with_template(letters(), MARKED)
    found = source_documents(jsonl([{"messages": turns("hi", str(i)) * 4} for i in range(200)]))
    encode = Encoder(tokenizer)
    with switching_often(), ThreadPoolExecutor(8) as pool:
        runs = [supervised_runs(tokenizer, encoded) for encoded in pool.map(encode, found)]
    assert runs == [[f"{i}\n"] * 4 for i in range(200)]


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


# ---- prompts with completions, and texts


def test_the_completion_alone_is_supervised(encoded):
    found = encoded(letters(), {"prompt": "how?", "completion": " so"})
    assert letters().decode(found.tokens) == "<|endoftext|>how? so<|endoftext|>"
    assert found.supervised.astype(int).tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1]


def test_a_token_that_reaches_into_the_completion_belongs_to_it(encoded, trimming):
    found = encoded(trimming, {"prompt": "you? fine, the c", "completion": "at sat"})
    (run,) = supervised_runs(trimming, found)
    assert run == " cat sat<|endoftext|>"


def test_texts_are_supervised_throughout(encoded):
    assert encoded(letters(), {"text": "all of it"}).supervised.all()
