"""The most frequent tokens are those that counting gives, by hand and one token at a time."""

from collections import Counter

import numpy as np
import pytest

from mtp_jax.config import Data, Source
from mtp_jax.data import frequency
from mtp_jax.data.documents import Completion, Document, Documents, Text
from mtp_jax.data.frequency import frequent_tokens
from mtp_jax.data.sources import read_sources
from mtp_jax.data.tokens import Encoder
from mtp_jax.model.base import open_base

STOPS = (0, 7)


class Given(Document):
    """A document of given content."""

    def __init__(self, name, content):
        self.name, self.given = name, content

    def content(self):
        return self.given


@pytest.fixture(scope="module")
def base(small_folder):
    return open_base(str(small_folder))


def documents(*contents):
    given = [Given(f"d{i}", content) for i, content in enumerate(contents)]
    return Documents(len(given), given.__getitem__)


def by_hand(base, sources, weights, count):
    """Shares of a mixture by documents, token by token."""
    share = dict.fromkeys(range(base.g.V), 0.0)
    for source, weight in zip(sources, weights, strict=True):
        for document in source:
            tokens, supervised, _ = Encoder(base.tokenizer)(document)
            for token, counted in list(zip(tokens.tolist(), supervised, strict=True))[1:]:
                share[token] += weight / len(source) * bool(counted)
    ranked = sorted(share, key=lambda token: (token not in STOPS, -share[token], token))
    return sorted(ranked[:count])


@pytest.mark.parametrize("count", [2, 9, 40, 256])
def test_the_most_frequent_supervised_tokens(base, corpus, count):
    data = Data(sources=[Source(kind="text", path=str(corpus))], held_out=0.2)
    texts = read_sources(data)[0][0]
    answers = documents(*(Completion("zzzzzz" * 40, f" q{i}k") for i in range(5)))
    sources, weights = [texts, answers], [1.0, 3.0]
    found = frequent_tokens(sources, weights, base.tokenizer, count, base.g.V, STOPS)
    assert found.dtype == np.int32 and found.tolist() == by_hand(base, sources, weights, count)


def test_weights_count_and_prompts_do_not(base):
    many, few = documents(Text("aaaaaaaaa")), documents(Completion("cccccccc", "bbb", whole=False))
    a, b, c = (base.tokenizer(letter)["input_ids"][-1] for letter in "abc")
    likeliest = lambda weights: frequent_tokens([many, few], weights, base.tokenizer, 1, base.g.V, ())[0]  # noqa: E731
    assert (likeliest([1.0, 1.0]), likeliest([1.0, 9.0])) == (a, b)
    rest = Counter(frequent_tokens([few], [1.0], base.tokenizer, 2, base.g.V, ()).tolist())
    assert c not in rest or c in (0, 1)  # nothing else occurs: the smallest other id fills up


def test_counting_is_bounded(base, monkeypatch):
    read = []

    class Watched(Given):
        def content(self):
            read.append(self.name)
            return super().content()

    watched = [Watched(f"d{i}", Text("abc" * 20)) for i in range(100)]
    monkeypatch.setattr(frequency, "ENOUGH_TOKENS", 300)
    source = Documents(len(watched), watched.__getitem__)
    first = frequent_tokens([source], [1.0], base.tokenizer, 3, base.g.V, ())
    before = list(read)
    again = frequent_tokens([source], [1.0], base.tokenizer, 3, base.g.V, ())
    assert 2 <= len(before) < 20 and read == before * 2 and np.array_equal(again, first)
