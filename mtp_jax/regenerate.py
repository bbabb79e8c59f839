"""`python -m mtp_jax.regenerate --config FILE [dotted.key=value ...]`: continue training documents with the base model.

Writes the file that `data.continuations` of the config names. A run that was stopped goes on where it was.
"""

import argparse
import json
from pathlib import Path

from mtp_jax.errors import UserError, run_command


def main() -> None:
    """Parse, continue, write."""
    parser = argparse.ArgumentParser(
        prog="python -m mtp_jax.regenerate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a training config with data.continuations")
    parser.add_argument("--batch-size", type=int, default=64, metavar="B", help="prompts decoded at a time")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")
    arguments = parser.parse_args()
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size {arguments.batch_size}: should be at least 1.")
    from mtp_jax.config_file import load_config

    config = load_config(arguments.config, arguments.overrides)
    wanted = config.data.continuations
    if wanted is None:
        raise UserError(f"{arguments.config}: has no section data.continuations, which says what to write and where.")

    from rich.console import Console
    from rich.progress import track

    from mtp_jax.data.continuations import choose_prompts, record
    from mtp_jax.data.sources import read_sources
    from mtp_jax.decoding.generator import Generator

    console = Console(stderr=True)
    out = Path(wanted.path).expanduser()
    part = out.with_name(out.name + ".part")
    found = out if out.exists() else part
    sources, _ = read_sources(config.data, continuations=False)
    assert config.model.path is not None
    generator = Generator.load(config.model.path, config.model.compute_dtype)
    weights = [source.weight for source in config.data.sources]
    prompts = list(
        choose_prompts(sources, weights, generator.tokenizer, wanted, generator.g.max_positions, config.seed)
    )
    lines = _whole_lines(found)
    ours = len(lines) <= len(prompts) and all(
        line["prompt"] == prompt.text for line, prompt in zip(lines, prompts, strict=False)
    )
    if found == out and not (ours and len(lines) == len(prompts)):
        raise UserError(f"{out}: holds other continuations than this config asks for; remove it or name another file.")
    if found == out:
        print(f"continuations: {out} (already there)")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    done = len(lines) if ours else 0
    with part.open("r+b" if done else "wb") as file:
        if done:
            console.print(f"{done} of {len(prompts)} continuations are there already", highlight=False)
            file.truncate(sum(len(line) for line in part.read_bytes().splitlines(keepends=True)[:done]))
            file.seek(0, 2)
        batches = range(done, len(prompts), arguments.batch_size)
        for at in track(batches, "regenerating", console=console, disable=not console.is_terminal):
            batch = prompts[at : at + arguments.batch_size]
            completions = generator.complete(
                [prompt.tokens for prompt in batch], wanted.new_tokens, arguments.batch_size
            )
            for prompt, completion in zip(batch, completions, strict=True):
                file.write(record(prompt, completion.token_ids, generator.tokenizer).encode())
            file.flush()
    part.rename(out)
    print(f"continuations: {out}")


def _whole_lines(path: Path) -> list[dict[str, str]]:
    """The complete lines of a file that may have been cut anywhere."""
    lines: list[dict[str, str]] = []
    if not path.exists():
        return lines
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            lines.append(json.loads(line) if line.endswith(b"\n") else {})
        except ValueError:
            break
        if lines[-1].keys() != {"prompt", "completion"}:
            lines.pop()
            break
    return lines


if __name__ == "__main__":
    run_command(main)
