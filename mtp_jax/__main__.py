"""The console script `mtp-jax`: its first argument names a command of this package, the rest is passed on."""

import importlib
import sys

from mtp_jax import __version__
from mtp_jax.errors import UserError, run_command

COMMANDS = {
    "train": "run or resume a training run",
    "generate": "continue texts, with or without drafts",
    "evaluate": "held-out figures of a model or an adapter",
    "regenerate": "write the base model's own continuations, to train on",
    "data": "show what training would see",
    "preflight": "compile for a pod without having one: does it fit?",
    "export": "write a folder that runs in Hugging Face transformers",
}


def _dispatch() -> None:
    name, *rest = sys.argv[1:] or ["--help"]
    if name == "--version":
        print(f"mtp_jax {__version__}")
    elif name in ("-h", "--help"):
        print("usage: mtp-jax COMMAND ...\n")
        for command, purpose in COMMANDS.items():
            print(f"  {command:11} {purpose}")
        print("\n`mtp-jax COMMAND --help` says more.")
    elif name not in COMMANDS:
        raise UserError(f"{name}: no such command; there are {', '.join(COMMANDS)}.")
    else:
        sys.argv = [f"mtp-jax {name}", *rest]
        module = "mtp_jax.data.__main__" if name == "data" else f"mtp_jax.{name}"
        importlib.import_module(module).main()


def main() -> None:
    """Run the command that the first argument names."""
    run_command(_dispatch)


if __name__ == "__main__":
    main()
