"""`python -m mtp_jax.train --config FILE [dotted.key=value ...]`: run or resume a training run."""

import argparse
from pathlib import PurePath

from mtp_jax.errors import run_command


def main() -> None:
    """Parse, train, print where the result is."""
    parser = argparse.ArgumentParser(prog="python -m mtp_jax.train", description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file; see configs/")
    parser.add_argument("--adapter", help="start from this adapter; the same as model.adapter=...")
    parser.add_argument("--profile", metavar="DIR", help="write a trace of a few steps, for TensorBoard or Perfetto")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="for instance train.steps=100")
    arguments = parser.parse_intermixed_args()
    from mtp_jax.runs import processes

    with processes.together():
        from mtp_jax.config_file import load_config

        overrides = [*arguments.overrides, *([f"model.adapter={arguments.adapter}"] if arguments.adapter else [])]
        config = load_config(arguments.config, overrides)
        from mtp_jax.training.run import train

        out = train(config, arguments.profile)
        if processes.is_first():
            print(f"{PurePath(out).name}: {out}")


if __name__ == "__main__":
    run_command(main)
