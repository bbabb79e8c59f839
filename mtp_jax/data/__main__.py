"""`python -m mtp_jax.data --config FILE [dotted.key=value ...]`: print what training would see, and write nothing.

Counts and lengths of documents, padding, what is supervised, where blocks of masks are, and some documents in colour.
"""

import argparse

from mtp_jax.errors import UserError, run_command


def main() -> None:
    """Parse, look, print."""
    parser = argparse.ArgumentParser(
        prog="python -m mtp_jax.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a training config; see configs/")
    parser.add_argument("--all", action="store_true", help="read a whole epoch, not a sample")
    parser.add_argument("--examples", type=int, default=3, metavar="N", help="documents to print (3)")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")
    arguments = parser.parse_intermixed_args()
    if arguments.examples < 0:
        raise UserError(f"--examples {arguments.examples}: should be at least 0.")
    from mtp_jax.config_file import load_config

    config = load_config(arguments.config, arguments.overrides)

    from rich.console import Console

    from mtp_jax.data import preview
    from mtp_jax.data.sources import check_supervision, read_sources

    console = Console(highlight=False)
    training, held_out = read_sources(config.data)
    tokenizer, origin = preview.preview_tokenizer(config, training)
    console.print(f"tokenizer: {origin}", markup=False)
    for line in check_supervision(training, tokenizer, config.train.sequence_length, config.data.too_long, held_out):
        console.print(line, markup=False)
    sequences = preview.survey_sequences(config, training, tokenizer, arguments.all)
    batch, names = next(sequences)
    for source in preview.survey_sources(config, training, tokenizer, arguments.all):
        preview.print_lines(source.name, preview.source_lines(source), console)
    console.print(f"held out: {len(held_out):,} documents")
    preview.print_lines("sequences", preview.sequence_lines(config, *next(sequences)), console)
    if arguments.examples:
        preview.print_documents(batch, names, tokenizer, arguments.examples, console)


if __name__ == "__main__":
    run_command(main)
