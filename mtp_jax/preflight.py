"""`python -m mtp_jax.preflight --config FILE [--topology v5e:4x4,...] [dotted.key=value ...]`: will it fit?

Compiles the training step of a config, and with --decode the decoding step, for a pod of chips without having one, and
prints what each chip would hold, compute and receive. Of the model it needs only the config.json, from `model.path` or
`model.geometry=FILE`. Exit code 1: it does not fit.
"""

import argparse
import json
import sys

from mtp_jax.errors import UserError, run_command


def main() -> None:
    """Parse, compile, print."""
    parser = argparse.ArgumentParser(
        prog="python -m mtp_jax.preflight", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file; see configs/")
    parser.add_argument(
        "--topology",
        metavar="T,...",
        help="TPU topologies, separated by commas, such as v5e:4x4,v5p:2x2x4; by default the devices of this machine",
    )
    parser.add_argument("--decode", action="store_true", help="compile the decoding step too, on the config's mesh")
    parser.add_argument("--plan", metavar="P", help="block plan of --decode; quadratic:M with all masks by default")
    parser.add_argument("--slots", type=int, default=2048, metavar="N", help="--decode: length of the cache, in tokens")
    parser.add_argument("--batch-size", type=int, default=1, metavar="B", help="--decode: sequences")
    parser.add_argument("--json", action="store_true", help="print one JSON object per program")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="for instance train.batch_size=4")
    a = parser.parse_intermixed_args()
    _check(a)
    from mtp_jax.config_file import load_config
    from mtp_jax.fitting.chips import parse_topology, without_chip

    config = load_config(a.config, a.overrides)
    topologies = a.topology.split(",") if a.topology else [None]
    for name in filter(None, topologies):
        parse_topology(name)
    if a.topology:
        without_chip()
    from mtp_jax.fitting.fit import Fit, check_decoding, check_training, find_geometry, place_of

    g, fits = find_geometry(config), True
    faults: list[str] = []
    for name in topologies:
        try:
            place = place_of(config, name)
            reports: list[Fit] = [check_training(config, g, place)]
            if a.decode:
                reports.append(check_decoding(config, g, place, a.plan, a.slots, a.batch_size))
        except UserError as error:  # another topology may still fit
            faults += error.faults
            continue
        for report in reports:
            fits &= report.fits
            print(json.dumps(report.figures()) if a.json else report, flush=True)
    if faults:
        raise UserError(*faults)
    if not fits:
        sys.exit(1)


def _check(a: argparse.Namespace) -> None:
    """Raise UserError for arguments that cannot be."""
    faults = [
        f"--{name} {value}: should be at least 1."
        for name, value in {"slots": a.slots, "batch-size": a.batch_size}.items()
        if value < 1
    ]
    if a.plan and not a.decode:
        faults.append("--plan is for the decoding step: give --decode too.")
    if a.plan == "auto":
        faults.append("--plan auto measures on the machine that decodes; name a plan.")
    if a.topology is not None and not all(a.topology.split(",")):
        faults.append(f"--topology {a.topology}: holds an empty name; give topologies such as v5e:4x4,v5p:2x2x4.")
    if faults:
        raise UserError(*faults)


if __name__ == "__main__":
    run_command(main)
