"""The base model's own continuations of training documents, which an adapter for it learns best from.

Drafts are verified against what the base model would write next, and its own text holds exactly that at every token.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mtp_jax.config import Continuations
from mtp_jax.data.datasets import SourceDocuments, Stream, first_line
from mtp_jax.data.documents import Completion, Content, Document, Documents
from mtp_jax.data.tokens import Encoder
from mtp_jax.errors import UserError
from mtp_jax.storage import local

_FRUITLESS = 1000  # consecutive documents that give no prompt, before giving up


class Prompt(NamedTuple):
    """A prompt as a file of continuations holds it, and as the tokenizer reads it back."""

    text: str
    tokens: list[int]


def choose_prompts(
    sources: list[SourceDocuments], weights: list[float], tokenizer: Any, wanted: Continuations, context: int, seed: int
) -> Iterator[Prompt]:
    """`wanted.count` prompts from training documents; every document is used once before any is used again.

    A text gives a window of `prompt_tokens` that ends anywhere, a prompt with completion its prompt, and a conversation
    everything up to one of the assistant's turns.

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
                    f"data.continuations: {_FRUITLESS} consecutive documents gave no prompt: a text needs more than "
                    f"prompt_tokens={wanted.prompt_tokens} tokens, and a prompt fewer than the context of {context}."
                )
            continue
        chosen, fruitless = chosen + 1, 0
        yield prompt


def _turns(source: SourceDocuments, draw: np.random.Generator) -> Iterator[Document]:
    """The documents of a source again and again, in a new order each time; those of a stream in its own."""
    while True:
        if isinstance(source, Stream):
            yield from source
        else:
            yield from (source[number] for number in reversed(draw.permutation(len(source)).tolist()))


def _as_stored(ids: np.ndarray, tokenizer: Any) -> Prompt:
    """A prompt as it comes back from a file of text: its tokens are those that training reads from there."""
    text = tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)
    tokens = tokenizer(text, verbose=False)["input_ids"]
    begin = tokenizer.bos_token
    if begin is not None and tokens[:2] == [tokenizer.bos_token_id] * 2:  # in the text, and added to it
        text = text.removeprefix(begin)
        tokens = tokenizer(text, verbose=False)["input_ids"]
    # What the tokenizer adds at the end of a text does not belong at the end of a prompt.
    if len(tokens) > 1 and tokens[-1] == tokenizer.eos_token_id and ids[-1] != tokens[-1]:
        tokens = tokens[:-1]
    return Prompt(text, list(tokens))


# ---- the file


def count_written(path: Path, prompts: list[Prompt]) -> int:
    """How many continuations of `prompts` a file already holds, finished or cut off.

    Raises:
        UserError: a finished file that holds other continuations.
    """
    finished = path.exists()
    records = _whole_records(path if finished else _part(path))
    ours = len(records) <= len(prompts) and all(
        record["prompt"] == prompt.text for record, prompt in zip(records, prompts, strict=False)
    )
    if finished and not (ours and len(records) == len(prompts)):
        raise UserError(f"{path}: holds other continuations than this config asks for; remove it or name another file.")
    return len(records) if ours else 0


def write_continuations(
    path: Path,
    prompts: list[Prompt],
    tokenizer: Any,
    complete: Callable[[list[list[int]]], list[list[int]]],
    batch_size: int,
) -> None:
    """Write the file of continuations or the rest of one that was cut off; a finished file stays as it is.

    The file ends in `.part` until it is whole.

    Args:
        path: The file.
        prompts: One for each record of the file.
        tokenizer: The model's.
        complete: Takes the tokens of at most `batch_size` prompts and returns the tokens that the model adds to each.
        batch_size: Prompts completed at a time.

    Raises:
        UserError: a finished file that holds other continuations.
    """
    done, part = count_written(path, prompts), _part(path)
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with part.open("r+b" if done else "wb") as file:
        if done:
            file.truncate(sum(len(line) for line in part.read_bytes().splitlines(keepends=True)[:done]))
            file.seek(0, 2)
        for at in range(done, len(prompts), batch_size):
            batch = prompts[at : at + batch_size]
            completions = complete([prompt.tokens for prompt in batch])
            for prompt, completion in zip(batch, completions, strict=True):
                file.write(_record(prompt, completion, tokenizer).encode())
            file.flush()
    part.rename(path)


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _record(prompt: Prompt, completion: list[int], tokenizer: Any) -> str:
    """A line of the file; a stop token that was written is part of it."""
    text = tokenizer.decode(completion, clean_up_tokenization_spaces=False)
    return json.dumps({"prompt": prompt.text, "completion": text}, ensure_ascii=False) + "\n"


def _whole_records(path: Path) -> list[dict[str, str]]:
    """The records of a file that may have been cut off anywhere."""
    records: list[dict[str, str]] = []
    if not path.exists():
        return records
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            records.append(json.loads(line) if line.endswith(b"\n") else {})
        except ValueError:
            break
        if records[-1].keys() != {"prompt", "completion"}:
            records.pop()
            break
    return records


class Continuation(Document):
    """One record of a file of continuations."""

    __slots__ = ("name", "number", "table")

    def __init__(self, table: Any, number: int):
        self.table, self.number = table, number
        self.name = f"continuations#{number}"

    def content(self) -> Content:
        values = self.table[self.number]
        return Completion(values["prompt"], values["completion"], whole=False)


def read_continuations(wanted: Continuations) -> Documents:
    """The documents of a finished file of continuations.

    Raises:
        UserError: no such file, or one that `python -m mtp_jax.regenerate` did not write.
    """
    from datasets import load_dataset

    path = local(wanted.path)
    if not path.is_file():
        raise UserError(
            f"data.continuations.path: {wanted.path}: no such file; `python -m mtp_jax.regenerate --config` with this "
            "config writes it."
        )
    try:
        table = load_dataset("json", data_files=str(path), split="train")
    except Exception as error:  # whatever the library raises, the file is at fault
        raise UserError(f"data.continuations.path: {wanted.path}: cannot be read ({first_line(error)}).") from error
    if set(table.column_names) != {"prompt", "completion"}:
        raise UserError(
            f"data.continuations.path: {wanted.path}: should hold the prompts and completions that "
            f"`python -m mtp_jax.regenerate` writes; its columns are {', '.join(table.column_names)}."
        )
    if not len(table):
        raise UserError(f"data.continuations.path: {wanted.path}: is empty; remove it and regenerate.")
    return Documents(len(table), lambda number: Continuation(table, number))
