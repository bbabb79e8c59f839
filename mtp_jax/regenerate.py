"""`python -m mtp_jax.regenerate --config FILE [dotted.key=value ...]`: continue training documents with the base model.

Writes the file that `data.continuations` of the config names. Run again after an interruption, it continues the file.
"""

import argparse

from mtp_jax.errors import UserError, run_command, warn


def main() -> None:
    """Parse, continue, print."""
    parser = argparse.ArgumentParser(
        prog="python -m mtp_jax.regenerate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a training config with data.continuations")
    parser.add_argument("--batch-size", type=int, default=64, metavar="B", help="prompts decoded at a time (64)")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")
    arguments = parser.parse_intermixed_args()
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size {arguments.batch_size}: should be at least 1.")
    from mtp_jax.config_file import load_config

    config = load_config(arguments.config, arguments.overrides)
    wanted = config.data.continuations
    if wanted is None:
        raise UserError(f"{arguments.config}: has no section data.continuations, which says what to write and where.")

    from rich.console import Console
    from rich.progress import Progress

    from mtp_jax.api import load
    from mtp_jax.data.continuations import by_length, choose_prompts, count_written, sampling_of, write_continuations
    from mtp_jax.data.sources import read_sources
    from mtp_jax.decoding.options import Sampling
    from mtp_jax.files import expanded

    sources, _ = read_sources(config.data, continuations=False)
    weights = [source.weight for source in config.data.sources]
    assert config.model.path is not None
    generator = load(config.model.path, dtype=config.model.compute_dtype, weights=config.model.weights)
    tokenizer, context, seed = generator.tokenizer, generator.g.max_positions, config.seed
    prompts = by_length(list(choose_prompts(sources, weights, tokenizer, wanted, context, seed)))
    out, console = expanded(wanted.path), Console(stderr=True)
    sampled = sampling_of(wanted, seed)
    sampling = Sampling(**sampled) if sampled else None
    done = count_written(out, prompts, sampled)
    if out.exists():
        print(f"continuations: {out} (already there)")
        return
    if done:
        console.print(f"{done} of {len(prompts)} continuations are there already", highlight=False)
    cut_short = 0
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("regenerating", total=len(prompts), completed=done)

        def complete(batch: list[list[int]], number: int) -> list[list[int]]:
            nonlocal cut_short
            completions = generator.complete(batch, wanted.new_tokens, arguments.batch_size, sampling, number)
            cut_short += sum(completion.finish_reason == "context" for completion in completions)
            progress.advance(bar, len(batch))
            return [completion.token_ids for completion in completions]

        write_continuations(out, prompts, tokenizer, complete, arguments.batch_size, sampled)
    if cut_short:
        warn(f"{cut_short} continuations are cut short, as the context of {context} tokens is full.")
    print(f"continuations: {out}")


if __name__ == "__main__":
    run_command(main)
