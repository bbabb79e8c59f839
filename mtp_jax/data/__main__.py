"""`python -m mtp_jax.data --config FILE [dotted.key=value ...]`: print what training would see, and write nothing.

Counts and lengths of documents, padding, what is supervised, where blocks of masks stand, and some documents in colour.
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
    parser.add_argument("--examples", type=int, default=3, metavar="N", help="documents to show (3)")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")
    arguments = parser.parse_args()
    if arguments.examples < 0:
        raise UserError(f"--examples {arguments.examples}: should be at least 0.")
    from mtp_jax.config_file import load_config

    config = load_config(arguments.config, arguments.overrides)

    from rich.console import Console

    from mtp_jax.data import preview
    from mtp_jax.data.sources import read_sources
    from mtp_jax.data.supervision import check_supervision

    console = Console(highlight=False)
    training, held_out = read_sources(config.data)
    tokenizer, origin = preview.preview_tokenizer(config, training)
    console.print(f"tokenizer: {origin}", markup=False)
    for line in check_supervision(training, tokenizer, config.train.sequence_length, config.data.too_long):
        console.print(line, markup=False, soft_wrap=True)
    sequences = preview.survey_sequences(config, training, tokenizer, arguments.all)
    batch, names = next(sequences)
    console.print(preview.sources_table(preview.survey_sources(config, training, tokenizer, arguments.all)))
    console.print(f"held out: {len(held_out):,} documents")
    for line in preview.sequence_lines(config, *next(sequences)):
        console.print(line, soft_wrap=True)
    if arguments.examples:
        preview.print_documents(batch, names, tokenizer, arguments.examples, console)


if __name__ == "__main__":
    run_command(main)
