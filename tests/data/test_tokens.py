"""Which tokens carry loss: in conversations, in prompts with completions, and in texts."""

import contextlib
import itertools
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from chats import (
    ENDS_WITH_ASSISTANT,
    KEEPS_THOUGHT,
    LOOK,
    MARK,
    MARKED,
    NEEDS_FIRST,
    NEEDS_USER,
    OPENS_THOUGHT,
    OTHER_PROMPT,
    PLAIN,
    TALK,
    THINKS,
    letters,
    turns,
    with_template,
)
from tokenizers import AddedToken, processors

from mtp_jax.data.sources import source_documents
from mtp_jax.data.tokenizer import train_tokenizer
from mtp_jax.data.tokens import Encoder
from mtp_jax.encoding import encode_prompt
from mtp_jax.errors import UserError

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


THOUGHT = {"role": "assistant", "reasoning_content": "so", "content": "yes"}
FIRST = [{"role": "assistant", "content": "welcome"}, *turns("hi", "yes")]
SYSTEM = [{"role": "system", "content": "be kind"}, *FIRST]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
CALLED = '[{"function": {"name": "f", "arguments": {}}}]\n'
CALLS = PLAIN.replace(
    "{{ m.content + '\n' }}", "{{ m.content + (m.tool_calls | tojson if m.tool_calls else '') + '\n' }}", 1
)


@pytest.mark.parametrize("trimmed", [False, True])
@pytest.mark.parametrize(
    ("template", "messages", "runs", "rewritten"),
    [
        # the generation prompt is not what a turn begins with
        (OTHER_PROMPT, TALK, [" fine \n\n", "sat on the mat\n"], 0),
        (OPENS_THOUGHT, turns("a", "<b> fine", "b", "yes"), ["<b> fine\n", "yes\n"], 0),
        (OPENS_THOUGHT, turns("a", "<think>so</think>fine"), ["fine\n"], 0),
        (KEEPS_THOUGHT, turns("a", "fine", "b", "yes"), ["\n</think>yes\n"], 1),
        (KEEPS_THOUGHT, [*turns("a"), THOUGHT], ["so\n</think>yes\n"], 0),
        # the template refuses a part of the conversation
        (NEEDS_USER, SYSTEM, ["welcome\n", "yes\n"], 0),
        (NEEDS_USER, FIRST, ["welcome\n", "yes\n"], 0),
        (NEEDS_USER, [FIRST[0], FIRST[0], *turns("hi")], ["welcome\n"] * 2, 0),
        (NEEDS_USER.replace(PLAIN, OPENS_THOUGHT), SYSTEM, ["welcome\n", "yes\n"], 0),
        (NEEDS_FIRST, FIRST, ["welcome\n", "yes\n"], 0),
        (NEEDS_FIRST, SYSTEM, ["welcome\n", "yes\n"], 0),
        (ENDS_WITH_ASSISTANT, TALK, [" fine \n\n", "sat on the mat\n"], 0),
        (ENDS_WITH_ASSISTANT, turns("a", "b", "c", "b", "e", "b"), ["b\n"] * 3, 0),
        (NEEDS_USER.replace(PLAIN, CALLS), [CALL, *turns("hi", "yes")], [CALLED, "yes\n"], 0),
        (NEEDS_FIRST, [{"role": "assistant", "content": ""}, *turns("hi", "yes")], ["\n", "yes\n"], 0),
    ],
)  # fmt: skip
def test_what_a_template_renders_as_a_whole_trains(encoded, trimming, template, messages, runs, rewritten, trimmed):
    tokenizer = with_template(trimming if trimmed else letters(), template)
    found = encoded(tokenizer, {"messages": messages})
    assert found.tokens.tolist() == tokenizer.apply_chat_template(messages)["input_ids"]
    assert (supervised_runs(tokenizer, found), found.rewritten) == (runs, rewritten)


@pytest.mark.parametrize("template", [MARKED, PLAIN, OTHER_PROMPT, NEEDS_FIRST])
@pytest.mark.parametrize("context", [2, 3])
def test_the_completion_of_a_conversation_alone_is_supervised(encoded, template, context):
    tokenizer, messages = (
        with_template(letters(), template),
        [*turns("hi", "yes", "so?"), *turns("x", "no", "y", "ok")[1:]],
    )
    found = encoded(tokenizer, {"prompt": messages[:context], "completion": messages[context:]})
    assert found.tokens.tolist() == tokenizer.apply_chat_template(messages)["input_ids"]
    assert supervised_runs(tokenizer, found) == ["no\n", "ok\n"]


def test_a_template_for_tools_is_used_with_tools(encoded):
    tokenizer = with_template(letters(), {"default": PLAIN, "tool_use": "{{ tools | length }}" + MARKED})
    tools = [{"type": "function", "function": {"name": "f"}}]
    for record in (
        {"messages": TALK},
        {"messages": TALK, "tools": tools},
        {"messages": TALK, "tools": [*tools, *tools]},
    ):
        found = encoded(tokenizer, record)
        expected = tokenizer.apply_chat_template(TALK, tools=record.get("tools"))["input_ids"]
        assert found.tokens.tolist() == expected
        assert supervised_runs(tokenizer, found) == [" fine \n\n", "sat on the mat\n"]


BARE = "{% for m in messages %}{{ m.content }}{% endfor %}"
PARTS = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, {"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize(
    ("template", "messages", "says"),
    [
        (BARE, PARTS, "message 0: the chat template takes its content for a text, and it is a list"),
        (BARE, [*TALK, {"role": "tool", "content": {"a": 1}}], "message 4: the chat template takes its content"),
        (MARKED.replace("+", "~"), [*TALK, {"role": "user", "content": ["a"]}], "message 4: the chat template takes"),
        (PLAIN, PARTS, "refuses the conversation (can only concatenate str"),
        (PLAIN, [{"role": "user", "content": None}, *TALK], "refuses the conversation ("),
        ("{{ raise_exception('No!') }}", TALK, "refuses the conversation (No!)."),
        ("{{ messages[0].content[9:][0].x.y }}", TALK, "refuses the conversation ("),
        ("{{ 1 / 0 }}", TALK, "refuses the conversation (division by zero)."),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", TALK, "refuses the conversation ("),
    ],
)  # fmt: skip
def test_a_conversation_that_cannot_be_rendered_is_named(encoded, template, messages, says):
    with pytest.raises(UserError) as caught:
        encoded(with_template(letters(), template), {"messages": messages})
    (fault,) = caught.value.faults
    assert fault.startswith("rows.jsonl#0: ") and says in fault and "\n" not in fault


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


# ---- what begins and ends a text


def specials(before, after, added=()):
    """A tokenizer of bytes that adds tokens before and after a text."""
    from tokenizers import processors

    tokenizer = with_template(train_tokenizer(["a"], 258), None)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.add_tokens([AddedToken("[CLS]", special=True)])
    names = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<s>", "</s>", "[CLS]")}
    parts = [*before, "$A", *after]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(parts), special_tokens=list(names.items())
    )
    return tokenizer


ADDS = {"nothing": ([], []), "begin": (["<s>"], []), "both": (["<s>"], ["</s>"]), "two": (["<s>", "[CLS]"], ["</s>"])}


@pytest.mark.parametrize("adds", ADDS)
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("ended", ["", "</s>", "</s>\n"])
@pytest.mark.parametrize("kind", ["text", "completion"])
def test_what_begins_and_ends_a_text_stands_there_once(encoded, adds, begun, ended, kind):
    tokenizer, begin = specials(*ADDS[adds]), "".join(ADDS[adds][0]) or "<s>"
    text = (begin if begun else "") + "how? so" + ended
    record = {"text": text} if kind == "text" else {"prompt": text[:-5], "completion": text[-5:]}
    if kind == "completion" and ended:
        record = {"prompt": text.partition(" so")[0], "completion": " so" + ended}
    found = encoded(tokenizer, record)
    whole = (begin if begun or adds != "nothing" else "") + "how? so" + (ended or "</s>")
    assert found.tokens.tolist() == tokenizer(whole, add_special_tokens=False)["input_ids"]
    first = (
        0
        if kind == "text"
        else len(whole.partition(record["completion"])[0].replace(begin, "")) + begin_count(whole, begin, tokenizer)
    )
    assert np.flatnonzero(found.supervised).tolist() == list(range(first, len(found.tokens)))


def begin_count(whole, begin, tokenizer):
    return len(tokenizer(begin, add_special_tokens=False)["input_ids"]) if whole.startswith(begin) else 0


@pytest.mark.parametrize("adds", ADDS)
@pytest.mark.parametrize("begun", [False, True])
def test_a_prompt_is_begun_once_and_not_ended(adds, begun):
    tokenizer, begin = specials(*ADDS[adds]), "".join(ADDS[adds][0]) or "<s>"
    ids = encode_prompt(tokenizer, (begin if begun else "") + "how?")
    expected = (begin if begun or adds != "nothing" else "") + "how?"
    assert ids == tokenizer(expected, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("adds", ADDS)
@pytest.mark.parametrize(
    "template",
    ["{{ bos_token }}" + PLAIN, "{{ bos_token }}" + MARKED.replace("'\n' }}{% end", "eos_token }}{% end"), PLAIN],
)
def test_a_template_writes_special_tokens_itself(encoded, adds, template):
    tokenizer = with_template(specials(*ADDS[adds]), template)
    found = encoded(tokenizer, {"messages": TALK})
    assert found.tokens.tolist() == tokenizer.apply_chat_template(TALK)["input_ids"]
    assert found.tokens.tolist().count(tokenizer.bos_token_id) == template.count("bos_token")
