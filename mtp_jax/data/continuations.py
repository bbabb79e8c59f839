"""The base model's own continuations of training documents, which an adapter for it learns best from.

Drafts are verified against what the base model would write next, and its own text holds exactly that at every token.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mtp_jax.config import Continuations
from mtp_jax.data.datasets import SourceDocuments, Stream
from mtp_jax.data.documents import Completion, Content, Document, Documents, Tokens
from mtp_jax.data.json_lines import DataFile, JsonLines, parse
from mtp_jax.data.tokens import Encoder
from mtp_jax.encoding import special_tokens
from mtp_jax.errors import UserError, reason, warn
from mtp_jax.storage import local
from mtp_jax.text import added_text

_FRUITLESS = 1000  # consecutive documents that give no prompt, before giving up
_WINDOW = 512  # prompts that are sorted by length, whatever the batch size is: a file is continued with any
_CHECKED = 1000  # continuations that are compared with the tokenizer, spread evenly over the file
_OLD_KEYS = ("prompt", "completion")
_KEYS = (*_OLD_KEYS, "prompt_ids", "completion_ids")
_SAMPLED_KEYS = (*_KEYS, "sampling")


class Prompt(NamedTuple):
    """What the model continues: token ids, and their text for people."""

    text: str
    tokens: list[int]


def choose_prompts(
    sources: list[SourceDocuments], weights: list[float], tokenizer: Any, wanted: Continuations, context: int, seed: int
) -> Iterator[Prompt]:
    """`wanted.count` prompts from training documents; every document is used once before any is used again.

    A text gives a window of `prompt_tokens` that ends anywhere, behind what the tokenizer puts before a text, a prompt
    with completion its prompt, and a conversation everything up to one of the assistant's turns.

    Raises:
        UserError: no document is long enough for a prompt, or short enough for the model's context.
    """
    draw, encode = np.random.default_rng(seed), Encoder(tokenizer)
    before, _ = special_tokens(tokenizer)
    share = np.asarray(weights) / np.sum(weights)
    turns = [_turns(source, draw) for source in sources]
    chosen = fruitless = 0
    while chosen < wanted.count:
        tokens, supervised, _ = encode(next(turns[int(draw.choice(len(sources), p=share))]))
        starts = np.flatnonzero(supervised[1:] & ~supervised[:-1]) + 1
        if len(starts):
            ids = tokens[: draw.choice(starts)].tolist()
        else:
            ends = np.arange(wanted.prompt_tokens, len(tokens))
            end = int(draw.choice(ends)) if len(ends) else 0
            start = max(0, end - wanted.prompt_tokens)
            ids = (before if start else []) + tokens[start:end].tolist()
        if not ids or len(ids) >= context - 1:
            fruitless += 1
            if fruitless == _FRUITLESS:
                raise UserError(
                    f"data.continuations: {_FRUITLESS} consecutive documents gave no prompt: a text needs more than "
                    f"prompt_tokens={wanted.prompt_tokens} tokens, and a prompt fewer than the context of {context}."
                )
            continue
        chosen, fruitless = chosen + 1, 0
        shown = ids[len(before) :] if ids[: len(before)] == before else ids
        yield Prompt(tokenizer.decode(shown, clean_up_tokenization_spaces=False), ids)


def _turns(source: SourceDocuments, draw: np.random.Generator) -> Iterator[Document]:
    """The documents of a source again and again, in a new order each time; those of a stream in its own."""
    while True:
        if isinstance(source, Stream):
            yield from source
        else:
            yield from (source[number] for number in reversed(draw.permutation(len(source)).tolist()))


def _added(tokenizer: Any, prompt: list[int], new: list[int]) -> str:
    return added_text(tokenizer, prompt, new, clean_up_tokenization_spaces=False)


# ---- the file


def sampling_of(wanted: Continuations, seed: int) -> dict[str, Any] | None:
    """How continuations are sampled, as their records say it; None for greedy ones, whose records say nothing."""
    if wanted.temperature is None:
        return None
    return {"temperature": wanted.temperature, "top_k": wanted.top_k, "top_p": wanted.top_p, "seed": seed}


def by_length(prompts: list[Prompt]) -> list[Prompt]:
    """Windows of prompts, each in order of length: a batch is padded to its longest one."""
    windows = (prompts[at : at + _WINDOW] for at in range(0, len(prompts), _WINDOW))
    return [prompt for window in windows for prompt in sorted(window, key=lambda prompt: len(prompt.tokens))]


def count_written(path: Path, prompts: list[Prompt], sampling: dict[str, Any] | None = None) -> int:
    """How many continuations of `prompts`, sampled so, a file already holds, finished or cut off.

    Raises:
        UserError: a finished file that holds other continuations.
    """
    finished = path.exists()
    # A finished file without token ids, as older versions wrote it, stays; one that was cut off begins anew.
    kinds = (_KEYS, _SAMPLED_KEYS)
    records = _whole_records(path, (*kinds, _OLD_KEYS)) if finished else _whole_records(_part(path), kinds)
    ours = len(records) <= len(prompts) and all(
        record["prompt"] == prompt.text
        and record.get("prompt_ids", prompt.tokens) == prompt.tokens
        and record.get("sampling") == sampling
        for record, prompt in zip(records, prompts, strict=False)
    )
    if finished and not (ours and len(records) == len(prompts)):
        raise UserError(f"{path}: holds other continuations than this config asks for; remove it or name another file.")
    return len(records) if ours else 0


def write_continuations(
    path: Path,
    prompts: list[Prompt],
    tokenizer: Any,
    complete: Callable[[list[list[int]], int], list[list[int]]],
    batch_size: int,
    sampling: dict[str, Any] | None = None,
) -> None:
    """Write the file of continuations or the rest of one that was cut off; a finished file stays as it is.

    The file ends in `.part` until it is whole.

    Args:
        path: The file.
        prompts: One for each record of the file.
        tokenizer: The model's.
        complete: Takes the tokens of at most `batch_size` prompts, and the number of the first, and returns the tokens
            that the model adds to each.
        batch_size: Prompts completed at a time.
        sampling: See `sampling_of`.

    Raises:
        UserError: a finished file that holds other continuations.
    """
    done, part = count_written(path, prompts, sampling), _part(path)
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with part.open("r+b" if done else "wb") as file:
        if done:
            file.truncate(sum(len(line) for line in part.read_bytes().splitlines(keepends=True)[:done]))
            file.seek(0, 2)
        for at in range(done, len(prompts), batch_size):
            batch = prompts[at : at + batch_size]
            completions = complete([prompt.tokens for prompt in batch], at)
            for prompt, completion in zip(batch, completions, strict=True):
                file.write(_record(prompt, completion, tokenizer, sampling).encode())
            file.flush()
    part.rename(path)


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _record(prompt: Prompt, completion: list[int], tokenizer: Any, sampling: dict[str, Any] | None) -> str:
    """A line of the file; a stop token that was written is part of it. Training reads the ids, people the text."""
    values = (prompt.text, _added(tokenizer, prompt.tokens, completion), prompt.tokens, completion)
    record = dict(zip(_KEYS, values, strict=True)) | ({"sampling": sampling} if sampling else {})
    return json.dumps(record, ensure_ascii=False) + "\n"


def _whole_records(path: Path, kinds: tuple[tuple[str, ...], ...]) -> list[dict[str, Any]]:
    """The records of a file that may have been cut off anywhere."""
    records: list[dict[str, Any]] = []
    if not path.exists():
        return records
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line) if line.endswith(b"\n") else {}
        except ValueError:
            break
        if tuple(record) not in kinds:
            break
        records.append(record)
    return records


class Continuation(Document):
    """One record of a file of continuations."""

    __slots__ = ("name", "number", "table")

    def __init__(self, table: Any, number: int):
        self.table, self.number = table, number
        self.name = f"continuations#{number}"

    def values(self) -> dict[str, Any]:
        """The record; raises UserError where the line is none."""
        try:
            return parse(self.table[self.number])
        except ValueError as error:
            raise UserError(f"{self.table.place(self.number)}: {error}.") from error

    def text(self) -> str:
        values = self.values()
        return values["prompt"] + values["completion"]

    def content(self) -> Content:
        values = self.values()
        if values.get("prompt_ids") is None:
            return Completion(values["prompt"], values["completion"], whole=False)
        return Tokens(values["prompt_ids"], values["completion_ids"])


def read_continuations(wanted: Continuations) -> Documents:
    """The documents of a finished file of continuations.

    Raises:
        UserError: no such file, one that `python -m mtp_jax.regenerate` did not write, or one whose first record is
            sampled otherwise.
    """
    path = local(wanted.path)
    if not path.is_file():
        raise UserError(
            f"data.continuations.path: {wanted.path}: no such file; `python -m mtp_jax.regenerate --config` with this "
            "config writes it."
        )
    try:
        table = JsonLines.of_files([DataFile(str(path), path.name)])
        if not len(table):
            raise UserError(f"data.continuations.path: {wanted.path}: is empty; remove it and regenerate.")
        columns = parse(table[0])
    except ValueError as error:
        raise UserError(f"data.continuations.path: {wanted.path}: cannot be read ({reason(error)}).") from error
    if set(columns) not in map(set, (_KEYS, _SAMPLED_KEYS, _OLD_KEYS)):
        raise UserError(
            f"data.continuations.path: {wanted.path}: should hold the prompts and completions that "
            f"`python -m mtp_jax.regenerate` writes; its columns are {', '.join(columns)}."
        )
    found, asked = _how(columns.get("sampling")), _how(sampling_of(wanted, seed=0))
    if found != asked:
        raise UserError(
            f"data.continuations.path: {wanted.path}: its continuations are {found}, and this config asks for {asked} "
            "ones; name another file and regenerate, or set what this one was made with."
        )
    return Documents(len(table), lambda number: Continuation(table, number))


def _how(sampling: Any) -> str:
    """In words, without the seed: any will do for training."""
    if not isinstance(sampling, dict):
        return "greedy"
    said = (f"{key}={value}" for key, value in sampling.items() if key != "seed" and value is not None)
    return f"sampled ({', '.join(said)})"


def check_continuations(found: Sequence[Document], tokenizer: Any) -> None:
    """Compare a sample of a file with the tokenizer: warn of text whose tokens may not be those that the model wrote.

    Raises:
        UserError: token ids of another tokenizer.
    """
    count = min(_CHECKED, len(found))
    doubtful = 0
    for document in (found[n * len(found) // count] for n in range(count)):
        assert isinstance(document, Continuation)
        content, text = document.content(), document.values()["completion"]
        if isinstance(content, Completion):
            doubtful += not _comes_back(content, tokenizer)
        elif isinstance(content, Tokens) and _added(tokenizer, content.prompt, content.completion) != text:
            raise UserError(f"{document.name}: its token ids are of another tokenizer; regenerate the file.")
    if doubtful:
        warn(
            f"data.continuations: {doubtful} of {count} are text alone, of an older version, whose tokens may differ "
            "from those that the model wrote; regenerate the file."
        )


def _comes_back(content: Completion, tokenizer: Any) -> bool:
    """Whether the tokens of a text can be only those of its prompt and, behind them, of its completion."""
    pieces = (content.prompt, content.completion, content.prompt + content.completion)
    prompt, new, both = (tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in pieces)
    return both == prompt + new and _added(tokenizer, prompt, new) == content.completion
