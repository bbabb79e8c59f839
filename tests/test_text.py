"""Text of new tokens is decode(prompt + new) minus decode(prompt), at once and as it comes."""

import io
import random
from types import SimpleNamespace

import pytest
from kinds import KINDS, texts
from rich.console import Console

from mtp_jax.data.prompts import read_prompts
from mtp_jax.decoding.generator import Completion, Generator
from mtp_jax.decoding.show import PassWriter
from mtp_jax.encoding import check_characters
from mtp_jax.errors import BadRecord, UserError
from mtp_jax.text import TextStream

pytestmark = pytest.mark.quick


@pytest.fixture(params=KINDS, scope="module")
def tokenizer(request):
    return KINDS[request.param]()


def splits(tokenizer, count):
    """Prompt and new ids of random texts, cut anywhere, some with random ids, which no text encodes to."""
    draw = random.Random(1)
    for text in texts(count):
        ids = tokenizer(text)["input_ids"]
        if draw.random() < 0.5:
            ids += draw.choices(range(len(tokenizer)), k=draw.randint(1, 12))
        at = draw.randint(1, len(ids))
        yield ids[:at], ids[at:]


def pieces(new, draw):
    """New ids a few at a time, each with the step that gave it."""
    at, step = 0, 0
    while at < len(new):
        size, step = draw.randint(1, 4), step + draw.randint(0, 1)
        yield new[at : at + size], [step] * len(new[at : at + size])
        at += size


def test_streamed_printed_and_json_text_is_the_difference(tokenizer):
    draw, otherwise = random.Random(2), 0
    for prompt, new in splits(tokenizer, 200):
        before, after = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, prompt + new))
        done = Completion(new, [], 0, [], 0.0, 0.0, prompt)
        text = Generator.text(SimpleNamespace(tokenizer=tokenizer), done)
        assert after.endswith(text)
        if after.startswith(before):
            assert before + text == after
            otherwise += text != tokenizer.decode(new, skip_special_tokens=True)

        stream = TextStream(tokenizer, prompt, skip_special_tokens=True)
        given = [stream(tokens) for tokens, _ in pieces(new, draw)] + [stream.finish()]
        assert stream.prompt + "".join(own for own, _ in given) == after.removesuffix(text)
        assert "".join(added for _, added in given) == text

        for shown, whole in ((True, after), (False, text)):
            console = Console(file=io.StringIO(), highlight=False, soft_wrap=True)
            writer = PassWriter(tokenizer, console, prompt, shown)
            for tokens, by in pieces(new, draw):
                writer(tokens, by)
            writer.finish()
            assert console.file.getvalue() == whole + "\n"
    assert otherwise  # decoded alone, new tokens are another text


def test_text_appears_once_it_is_certain():
    tokenizer = KINDS["byte_level"]()
    emoji, word = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("𝄞", " the"))
    stream = TextStream(tokenizer, word + emoji[:2])
    assert stream.prompt == " the"
    assert stream(emoji[2:3]) == ("", "") and stream(emoji[3:]) == ("", "𝄞") and stream(word) == ("", " the")
    assert stream(emoji[:1]) == ("", "") and stream.finish() == ("", "\ufffd")


def test_bytes_as_tokens_wait_for_the_end_of_their_run():
    tokenizer = KINDS["sentencepiece"]()
    cat, euro = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("cat", "€"))
    stream = TextStream(tokenizer, cat)
    assert stream(euro[1:]) == ("", "")  # followed by half a character, it would be three replacement characters
    assert stream(cat) == ("", "€ cat")


@pytest.mark.parametrize(("text", "says"), [("a\ud800b", "half a surrogate pair"), ("\udcff", "the byte 0xff")])
def test_half_a_character_is_no_text(text, says):
    with pytest.raises(BadRecord, match=f"here: holds .*{says}"):
        check_characters(text, "here")
    check_characters("🙂 日本 é \ufffd", "here")


@pytest.mark.parametrize("record", ['{"prompt": "a\\ud800"}', '{"messages": [{"role": "user", "content": "\\udc00"}]}'])
def test_a_prompt_with_half_a_character_is_named_by_its_line(tmp_path, record):
    (tmp_path / "p.jsonl").write_text('{"prompt": "fine"}\n' + record + "\n" + "[" * 99_999)
    with pytest.raises(UserError) as refused:
        read_prompts(str(tmp_path / "p.jsonl"))
    assert ["line 2: holds" in refused.value.faults[0], "line 3" in refused.value.faults[1]] == [True, True]
