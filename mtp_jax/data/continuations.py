"""The base model's own continuations of training documents: what an adapter for it learns best from.

Drafts are judged by what the base model writes next, and in its own text every later token is what it would choose.
"""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from mtp_jax.config import Continuations
from mtp_jax.data.encoding import Encoder
from mtp_jax.data.examples import Completion, Content, Example, Examples
from mtp_jax.data.streams import Documents, Stream
from mtp_jax.errors import UserError
from mtp_jax.storage import local

_FRUITLESS = 1000  # documents in a row that give no prompt, before giving up


class Prompt(NamedTuple):
    """A prompt, as a file of continuations holds it and as the tokenizer reads it back."""

    text: str
    tokens: list[int]


def choose_prompts(
    sources: list[Documents], weights: list[float], tokenizer: Any, wanted: Continuations, context: int, seed: int
) -> Iterator[Prompt]:
    """`wanted.count` prompts from training documents, each document once before any comes again.

    A text gives a window of `prompt_tokens` that ends anywhere; a prompt with completion its prompt; a conversation all
    up to one of the assistant's turns.

    Raises:
        UserError: no document is long enough for a prompt, or short enough for the model's context.
    """
    draw, encode = np.random.default_rng(seed), Encoder(tokenizer)
    share = np.asarray(weights) / np.sum(weights)
    turns = [_turns(source, draw) for source in sources]
    chosen = fruitless = 0
    while chosen < wanted.count:
        tokens, supervised, _ = encode(next(turns[int(draw.choice(len(sources), p=share))]))
        starts = np.flatnonzero(supervised[1:] & ~supervised[:-1]) + 1
        if len(starts):
            ids = tokens[: draw.choice(starts)]
        else:
            ends = np.arange(wanted.prompt_tokens, len(tokens))
            end = int(draw.choice(ends)) if len(ends) else 0
            ids = tokens[max(0, end - wanted.prompt_tokens) : end]
        prompt = _as_stored(ids, tokenizer)
        if not len(ids) or len(prompt.tokens) >= context - 1:
            fruitless += 1
            if fruitless == _FRUITLESS:
                raise UserError(
                    f"data.continuations: {_FRUITLESS} documents in a row gave no prompt: a text needs more than "
                    f"prompt_tokens={wanted.prompt_tokens} tokens, and a prompt fewer than the context of {context}."
                )
            continue
        chosen, fruitless = chosen + 1, 0
        yield prompt


def _turns(source: Documents, draw: np.random.Generator) -> Iterator[Example]:
    """The documents of a source over and over, in another order each time; those of a stream in its own."""
    while True:
        if isinstance(source, Stream):
            yield from source
        else:
            yield from (source[number] for number in reversed(draw.permutation(len(source)).tolist()))


def _as_stored(ids: np.ndarray, tokenizer: Any) -> Prompt:
    """What is left of a prompt after a file of text: its tokens are those that a trainer reads from there."""
    text = tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)
    tokens = tokenizer(text, verbose=False)["input_ids"]
    begin = tokenizer.bos_token
    if begin is not None and tokens[:2] == [tokenizer.bos_token_id] * 2:  # in the text, and added to it
        text = text.removeprefix(begin)
        tokens = tokenizer(text, verbose=False)["input_ids"]
    # What is added behind a text does not belong behind a prompt.
    if len(tokens) > 1 and tokens[-1] == tokenizer.eos_token_id and ids[-1] != tokens[-1]:
        tokens = tokens[:-1]
    return Prompt(text, list(tokens))


def record(prompt: Prompt, completion: list[int], tokenizer: Any) -> str:
    """A line of a file of continuations; a stop token that was written is part of it."""
    text = tokenizer.decode(completion, clean_up_tokenization_spaces=False)
    return json.dumps({"prompt": prompt.text, "completion": text}, ensure_ascii=False) + "\n"


class Continuation(Example):
    """One line of a file of continuations."""

    __slots__ = ("name", "number", "table")

    def __init__(self, table: Any, number: int):
        self.table, self.number = table, number
        self.name = f"continuations#{number}"

    def content(self) -> Content:
        row = self.table[self.number]
        return Completion(row["prompt"], row["completion"], whole=False)


def read_continuations(wanted: Continuations) -> Examples:
    """The examples of a finished file of continuations.

    Raises:
        UserError: no such file, or one that `python -m mtp_jax.regenerate` did not write.
    """
    from datasets import load_dataset

    path = local(wanted.path)
    if not path.is_file():
        raise UserError(
            f"data.continuations.path: {wanted.path}: no such file; `python -m mtp_jax.regenerate --config` with this "
            "config makes it."
        )
    try:
        table = load_dataset("json", data_files=str(path), split="train")
    except Exception as error:  # whatever the library raises, the file is at fault
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"data.continuations.path: {wanted.path}: cannot be read ({reason}).") from error
    if set(table.column_names) != {"prompt", "completion"}:
        raise UserError(
            f"data.continuations.path: {wanted.path}: should hold prompts and completions that "
            f"`python -m mtp_jax.regenerate` wrote; its columns are {', '.join(table.column_names)}."
        )
    if not len(table):
        raise UserError(f"data.continuations.path: {wanted.path}: is empty; remove it and regenerate.")
    return Examples(len(table), lambda number: Continuation(table, number))
