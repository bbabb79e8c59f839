"""`python -m mtp_jax.export (--run DIR | --adapter DIR) --out DIR`: a folder that runs in Hugging Face transformers."""

import argparse
import sys
from typing import TYPE_CHECKING

from mtp_jax.errors import UserError, run_command

if TYPE_CHECKING:
    from mtp_jax.exporting.source import Source


def main() -> None:
    """Parse, check, write, upload."""
    parser = argparse.ArgumentParser(prog="python -m mtp_jax.export", description=__doc__)
    made = parser.add_mutually_exclusive_group(required=True)
    made.add_argument("--run", metavar="DIR", help="a run's output folder: its finished adapter or model")
    made.add_argument(
        "--adapter", metavar="DIR", help="an adapter folder, an exported folder, bundled:NAME or a hub name"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder, here or in a bucket (gs://)")
    parser.add_argument("--overwrite", action="store_true", help="replace what --out holds")
    parser.add_argument("--model", help="the base model, where it is no longer where the adapter was trained with it")
    parser.add_argument(
        "--engine",
        choices=["sglang", "vllm", "peft-mtp"],
        help="write what this engine loads: the LoRA alone, of an adapter with rows of noise (peft-mtp: a proposal)",
    )
    parser.add_argument(
        "--base",
        choices=["copy", "reference"],
        help="copy the base model's files, bit for bit (default), or only point to it by name and revision",
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of what was trained; as stored by default"
    )
    parser.add_argument("--peft", action="store_true", help="also write the LoRA in PEFT's format, which has no gate")
    parser.add_argument(
        "--prompts", nargs="+", metavar="FILE.jsonl", help="measure tokens per step for the card; a file is a domain"
    )
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload it as org/name")
    a = parser.parse_args()

    import jax.numpy as jnp

    from mtp_jax.exporting.folder import check_apart, check_target, target, write_export
    from mtp_jax.exporting.hub import check_hub, upload
    from mtp_jax.exporting.peft import WARNING
    from mtp_jax.exporting.source import find_source
    from mtp_jax.storage import is_bucket

    check_target(a.out, a.overwrite)
    if a.push_to_hub is not None:
        check_hub(a.push_to_hub)
        if is_bucket(a.out):
            raise UserError("--push-to-hub: the hub takes a folder of this machine; name one with --out.")
    source = find_source(a.run, a.adapter, a.model)
    check_apart(a.out, a.run or a.adapter, source)
    _check_options(a, source)
    measured = None
    if a.prompts:
        from mtp_jax.exporting.measure import measure

        measured = measure(source, a.prompts)
    with target(a.out) as out:
        dtype = a.dtype and jnp.dtype(a.dtype)
        write_export(source, out, a.base or "copy", a.peft, dtype, measured, a.push_to_hub, a.engine)
    if a.peft:
        print(f"warning: {WARNING}", file=sys.stderr)
    print(f"exported: {a.out if is_bucket(a.out) else out}")
    if a.push_to_hub is not None:
        print(f"uploaded: {upload(out, a.push_to_hub)}")


def _check_options(a: argparse.Namespace, source: "Source") -> None:
    """Raise UserError for options that do not fit what is exported."""
    if a.engine is not None:
        options = {"--base": a.base, "--peft": a.peft, "--prompts": a.prompts}
        if given := [name for name, value in options.items() if value]:
            raise UserError(f"{', '.join(given)}: --engine writes the LoRA alone, without base or card; leave it out.")
        from mtp_jax.exporting.engines import check_engine

        check_engine(source, a.engine)
        return
    if a.peft and source.base.g.fused:
        raise UserError(
            f"--peft: {source.base.g.family} stores q, k and v as one matrix, gate and up as another: PEFT has a "
            "pair for each, and this adapter several. Leave it out."
        )
    if source.adapter is not None:
        if a.base == "reference" and source.name.startswith("bundled:"):
            raise UserError(f"--base reference: transformers does not know {source.name}; give --base copy.")
        from mtp_jax.decoding.processors import read_settings

        settings = read_settings(source.base.generation, source.base.g.V, str(source.base.folder))
        if refused := (*settings.ignored, *settings.ignored_sampling):
            raise UserError(
                f"{source.base.folder}: generation_config.json sets {', '.join(refused)}, which multi-token decoding "
                "does not compute: every call of generate would be refused; remove it there and export again."
            )
        return
    options = {
        "--base reference": a.base == "reference",
        "--peft": a.peft,
        "--prompts": a.prompts,
        "--model": a.model,
    }
    if given := [name for name, value in options.items() if value]:
        raise UserError(f"{', '.join(given)}: this run trained a whole model; leave it out.")


if __name__ == "__main__":
    run_command(main)
