"""Documents of letters, and tokenizers of character codes, for the tests of data."""

import random

import numpy as np

from mtp_jax.data.documents import FileDocument


class Codes:
    """A tokenizer of character codes, with or without tokens at both ends."""

    def __init__(self, begin=None, end=None):
        self.begin, self.eos_token_id, self.eos_token = begin, end, None if end is None else chr(end)

    def __call__(self, text, add_special_tokens=True, verbose=True):
        begin = [self.begin] if add_special_tokens and self.begin is not None else []
        return {"input_ids": begin + [ord(c) for c in text]}

    def get_vocab(self):
        return {}


BARE, ENDS = Codes(), Codes(begin=1, end=2)


def make_documents(folder):
    """40 documents of unlike lengths, each of a letter of its own."""
    rng, made = random.Random(1), []
    for i in range(40):
        path = folder / f"{i:02}.txt"
        path.write_text(chr(0x100 + i) * rng.randint(1, 60), encoding="utf-8")
        made.append(FileDocument(path.name, path))
    return made


def ids(document, tokenizer):
    """A document's tokens."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return tokenizer(document.text(), verbose=False)["input_ids"] + end


def sequences_of(batch):
    """The sequences of a batch, each a mapping of [T] arrays."""
    return [{key: value[i] for key, value in batch.items()} for i in range(len(batch["tokens"]))]


def same(a, b):
    """Whether two batches hold equal arrays."""
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)
