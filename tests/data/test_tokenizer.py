"""The tokenizer recipe loses nothing and begins every text with <|endoftext|>."""

import pytest

from mtp_jax.data.tokenizer import END_OF_TEXT, save_tokenizer, train_tokenizer

pytestmark = pytest.mark.quick

ODD = [
    "",
    " ",
    "plain words",
    "tabs\tand\t\ttabs \n\n\r\n line ends \r",
    "  leading and trailing  ",
    "ünïcödé — “quotes” … ß",
    "日本語のテキスト 한국어 русский العربية",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈",
    "a ,b .c !d 're n't",
    "x = 3.14159 + 0x1F - 2e-4",
    "def f(x):\n    return x  # comment\n",
    "\x00\x01\x7f\u200b\ufeff\u2028",
    "e\u0301 is not \u00e9",
]


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_tokenizer((p.read_text() for p in sorted(corpus.iterdir())), 300)


@pytest.fixture(scope="module", params=["made", "saved"])
def either(request, tokenizer, tmp_path_factory):
    """The tokenizer as made, and as loaded again from its folder."""
    if request.param == "made":
        return tokenizer
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokens") / "tokenizer"
    save_tokenizer(tokenizer, folder)
    assert [p.name for p in folder.parent.iterdir()] == ["tokenizer"]
    return AutoTokenizer.from_pretrained(str(folder))


@pytest.mark.parametrize("text", ODD)
def test_no_text_loses_anything(either, text):
    ids = either(text)["input_ids"]
    assert either.decode(ids[1:]) == text
    assert either.decode(ids, skip_special_tokens=True) == text


def test_every_byte_comes_back(either):
    text = "".join(map(chr, range(0x2000)))
    assert either.decode(either(text)["input_ids"][1:]) == text


def test_a_text_begins_with_end_of_text(either):
    ids = either("words")["input_ids"]
    assert ids[0] == either.eos_token_id == either.bos_token_id == 0
    assert either.convert_ids_to_tokens(0) == END_OF_TEXT and either.pad_token_id == 1
    assert either("words", add_special_tokens=False)["input_ids"] == ids[1:]


def test_digits_are_split(either):
    assert len(either("12345", add_special_tokens=False)["input_ids"]) == 5
    assert all(sum(c.isdigit() for c in token) <= 1 for token in either.get_vocab())


def test_the_vocabulary_has_the_size_asked_for_and_is_deterministic(tokenizer, corpus):
    assert len(tokenizer) == 300
    again = train_tokenizer((p.read_text() for p in sorted(corpus.iterdir())), 300)
    assert again.get_vocab() == tokenizer.get_vocab()
