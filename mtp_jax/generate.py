"""`python -m mtp_jax.generate --model DIR|bundled:NAME (--prompt TEXT | --prompts FILE.jsonl)`: continue texts."""

import argparse
import json
from pathlib import Path
from typing import Any

from mtp_jax.errors import UserError, run_command


def read_prompts(file: str) -> list[Any]:
    """Prompts of a JSONL file, a string `prompt` or a chat's `messages` on each line.

    Raises:
        UserError: an unreadable file, no prompts, or a broken line, by its number.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").split("\n")  # splitlines also cuts inside of texts
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {file}: cannot be read ({getattr(error, 'strerror', None) or error}).") from error
    prompts, faults = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompts.append(_prompt(json.loads(line)))
        except ValueError as error:
            faults.append(f"{file}, line {number}: {error}.")
    if faults:
        raise UserError(*faults)
    if not prompts:
        raise UserError(f"{file}: holds no prompts; each line is an object such as {{'prompt': 'def main():'}}.")
    return prompts


def _prompt(record: Any) -> Any:
    if isinstance(record, dict):
        if isinstance(prompt := record.get("prompt"), str):
            return prompt
        messages = record.get("messages")
        if isinstance(messages, list) and all(
            isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages
        ):
            return messages
    raise ValueError("needs a string 'prompt', or 'messages' with role and content")


def main() -> None:
    """Parse, decode, print."""
    parser = argparse.ArgumentParser(prog="python -m mtp_jax.generate", description=__doc__)
    parser.add_argument("--model", required=True, help="a Hugging Face folder, a hub name, or bundled:NAME")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--prompts", metavar="FILE.jsonl", help="lines with 'prompt' or 'messages'")
    parser.add_argument("--adapter", help="a run's folder, an adapter folder, bundled:NAME, or a hub name")
    parser.add_argument("--plan", default="none", choices=["none"], help="none: plain decoding, a token per step")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="float32 on CPU and bfloat16 elsewhere")
    parser.add_argument("--batch-size", type=int, default=1, metavar="B")
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt")
    arguments = parser.parse_args()
    faults = [
        f"--{name.replace('_', '-')} {value}: should be at least 1."
        for name in ("max_new_tokens", "batch_size")
        if (value := getattr(arguments, name)) < 1
    ]
    if faults:
        raise UserError(*faults)
    prompts = [arguments.prompt] if arguments.prompts is None else read_prompts(arguments.prompts)
    names = ["--prompt"] if arguments.prompts is None else [f"prompt {i + 1}" for i in range(len(prompts))]

    from rich.console import Console
    from rich.text import Text

    from mtp_jax.decoding.generator import Generator

    generator = Generator.load(arguments.model, arguments.dtype, arguments.adapter)
    encoded = [generator.encode(prompt, name) for prompt, name in zip(prompts, names, strict=True)]
    console = Console(highlight=False, soft_wrap=True)
    for at in range(0, len(encoded), arguments.batch_size):
        batch = encoded[at : at + arguments.batch_size]
        for i, done in enumerate(generator.complete(batch, arguments.max_new_tokens, arguments.batch_size), at):
            if arguments.json:
                record = {
                    "text": generator.text(done),
                    "token_ids": done.token_ids,
                    "new_tokens": len(done.token_ids),
                    "steps": done.steps,
                    "seconds": round(done.seconds, 6),
                }
                print(json.dumps(record, ensure_ascii=False), flush=True)
                continue
            shown = generator.tokenizer.decode(encoded[i], skip_special_tokens=True)
            console.print(Text.assemble((shown, "dim"), generator.text(done)))
            speed = len(done.token_ids) * len(batch) / done.seconds
            console.print(Text(f"[{len(done.token_ids)} tokens, {speed:.0f} tokens/s]\n", "green"))


if __name__ == "__main__":
    run_command(main)
