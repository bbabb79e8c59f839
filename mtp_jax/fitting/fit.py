"""Whether a program fits: compiled for a place, attached or not, and compared with the memory of its chips."""

import contextlib
import re
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax import sharding
from mtp_jax.config import Config
from mtp_jax.decoding.plan import parse_plan, plain, quadratic
from mtp_jax.errors import UserError
from mtp_jax.files import expanded, read_json
from mtp_jax.fitting.chips import EFFICIENCY, Chip, local_chip, parse_topology, topology_devices
from mtp_jax.fitting.compiled import bytes_by_kind, collectives, flops
from mtp_jax.fitting.decoding import decoding_program
from mtp_jax.fitting.traffic import traffic
from mtp_jax.locate import find_folder
from mtp_jax.model.geometry import Geometry
from mtp_jax.mtp.losses import MultiTokenLoss
from mtp_jax.training.objectives import adapter_shape
from mtp_jax.training.program import Program, build_program, check_divides, check_length, check_vocabulary


class Place(NamedTuple):
    """Where a program would run."""

    name: str
    mesh: jax.sharding.Mesh
    chip: Chip | None  # None where nothing is known about it
    memory: int | None  # bytes of a chip; None where that is unknown


@dataclass(frozen=True)
class Fit:
    """What one chip holds, computes and receives in a step of a program."""

    what: str
    place: str
    chips: int
    mesh: str
    fits: bool
    memory: int | None  # bytes a chip has
    arguments: int  # bytes; weights, state and batch, or cache
    temporaries: int
    peak: int
    flops: float
    traffic: dict[str, int] | None  # bytes read from memory and written to it, by part of the model, and `all`
    moved: dict[str, int] | None  # bytes received, by kind of collective; None where the program cannot be read
    largest_gather: int  # bytes; a gathered array is whole on each chip
    seconds: float | None  # expected for a step
    tokens: int  # that a step processes, or emits at least
    compiling: float  # seconds that compiling took
    remedies: tuple[str, ...] = ()

    def figures(self) -> dict[str, Any]:
        """Every figure by name, for a line of JSON."""
        return asdict(self) | {"efficiency": EFFICIENCY}

    def __str__(self) -> str:
        has = "" if self.memory is None else f" of {_gb(self.memory)}"
        verdict = "fits" if self.fits else "DOES NOT FIT"
        if self.moved is None:
            received = "not known: this compiler's program cannot be read; the expected time leaves it out"
        else:
            moved = ", ".join(f"{kind} {_gb(size)}" for kind, size in sorted(self.moved.items())) or "none"
            received = f"{moved}; at most {_gb(self.largest_gather)} in one gather"
        lines = [
            f"{self.what} on {self.place}, {self.chips} chip{'s' * (self.chips > 1)} ({self.mesh}): {verdict}",
            f"  a chip holds      {_gb(self.peak)}{has}: arguments {_gb(self.arguments)}, "
            f"temporaries {_gb(self.temporaries)}",
            f"  it computes       {self.flops / 1e12:.2f} TFLOP in a step",
            f"  it reads, writes  {_parts(self.traffic)}",
            f"  it receives       {received}",
        ]
        if self.seconds is not None:
            lines.append(
                f"  expected          {self.seconds:.3g} s a step, {self.tokens / self.seconds:,.0f} tokens/s "
                f"(EFFICIENCY {EFFICIENCY} of peak arithmetic, memory and links)"
            )
        lines.append(f"  compiled in       {self.compiling:.0f} s")
        lines += [f"  would need less:  {remedy}" for remedy in self.remedies]
        return "\n".join(lines)


def find_geometry(config: Config) -> Geometry:
    """The geometry of a config's model, from its config.json alone.

    Raises:
        UserError: no config.json there, or one of a model that this decoder does not compute.
    """
    return replace(_stated_geometry(config), int8=config.model.weights == "int8")


def _stated_geometry(config: Config) -> Geometry:
    model = config.model
    if model.scratch is not None:
        return Geometry.from_config(model.scratch.config, "model.scratch.config")
    if model.geometry is not None:
        return Geometry.from_config(read_json(expanded(model.geometry)), model.geometry)
    assert model.path is not None
    try:
        file = find_folder(model.path, patterns=("config.json",)) / "config.json"
    except UserError as error:
        raise UserError(
            f"model.path={model.path}: its config.json is not here, and the Hugging Face hub did not give it; name "
            "a file with model.geometry=FILE (configs/geometries/ has some)."
        ) from error
    return Geometry.from_config(read_json(file), str(file))


def place_of(config: Config, topology: str | None) -> Place:
    """The mesh of a config on a topology, or on the devices of this machine.

    Raises:
        UserError: an unknown topology, or a mesh that does not multiply to its devices.
    """
    if topology is not None:
        known = parse_topology(topology)
        return Place(topology, sharding.make_mesh(config.mesh, topology_devices(topology)), known, known.memory)
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return Place(f"this machine's {device.device_kind}", sharding.make_mesh(config.mesh), local_chip(device), limit)


def check_training(config: Config, g: Geometry, place: Place) -> Fit:
    """Compile the training step.

    Raises:
        UserError: a batch that does not divide over the mesh, sequences longer than the model's context, or a draft
            vocabulary larger than the model's.
    """
    check_divides(config, place.mesh)
    check_length(config, g)
    check_vocabulary(config, g.V)
    program = build_program(config, g, place.mesh)
    tokens = config.train.batch_size * config.train.sequence_length
    arguments = (program.state, program.frozen, program.batch)
    return _fit("training", place, program.step, arguments, tokens, remedies(config, g, program))


def check_decoding(config: Config, g: Geometry, place: Place, plan: str | None, slots: int, batch: int) -> Fit:
    """Compile one decoding step, in bfloat16.

    Raises:
        UserError: an unknown plan, one with more masks than the adapter has, or more slots than the model's context.
    """
    if slots > g.max_positions:
        raise UserError(f"--slots {slots}: the model's context has {g.max_positions}.")
    shape = None if config.objective == "next_token" else adapter_shape(config, g)
    most = shape.masks if shape else 0
    chosen = parse_plan(plan) if plan else quadratic(most) if most else plain()
    if chosen.block > most:
        raise UserError(f"--plan {chosen}: takes {chosen.block} masks, but the config's adapter has {most}.")
    step, arguments = decoding_program(g, shape, chosen, slots, batch, jnp.dtype("bfloat16"), place.mesh)
    ways = {axis: size for axis, size in place.mesh.shape.items() if axis != "data"}
    hints = [f"--slots or --batch-size: less than {slots} tokens of {batch} sequences"]
    if len(place.mesh.devices.flat) > ways["tensor"]:
        hints.insert(0, "mesh.data=1 mesh.fsdp=1 mesh.tensor=-1: weights and cache split over all chips")
    return _fit(f"decoding {chosen}, batch {batch}", place, step, arguments, batch, tuple(hints))


def _fit(what: str, place: Place, step: Any, arguments: Any, tokens: int, hints: tuple[str, ...]) -> Fit:
    chips, platform = place.mesh.size, place.mesh.devices.flat[0].platform
    mesh = ", ".join(f"{axis}={size}" for axis, size in place.mesh.shape.items())
    begin = time.perf_counter()
    with sharding.on(place.mesh), tempfile.TemporaryDirectory() as printed:
        traced = step.trace(*arguments)
        work = flops(traced.jaxpr.jaxpr) / chips
        held = sum(_local_bytes(leaf) for leaf in jax.tree.leaves(arguments))
        try:
            lowered = traced.lower(lowering_platforms=(platform,))
            # libtpu 0.0.52 makes programs that JAX cannot read back, but it can print them itself.
            options = {"xla_dump_to": printed, "xla_dump_hlo_as_text": True} if platform == "tpu" else None
            compiled = lowered.compile(options)
        except jax.errors.JaxRuntimeError as error:
            said = re.search(r"Used ([\d.]+)([MGT]) of ([\d.]+)([MGT]) hbm", str(error))
            if said is None:
                raise
            peak, limit = (int(float(n) * _UNITS[unit]) for n, unit in (said.groups()[:2], said.groups()[2:]))
            spent = time.perf_counter() - begin
            return Fit(
                *(what, place.name, chips, mesh, False, limit, held, max(0, peak - held), peak, work, None, {}, 0),
                *(None, tokens, spent, hints),
            )
        spent = time.perf_counter() - begin
        moved, largest, touched = None, 0, None
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            texts = [path.read_text() for path in Path(printed).glob("*.after_codegen.txt")]
            text = max(texts, key=len) if texts else compiled.as_text()
            found, touched = collectives(text), traffic(text, _SCOPES)
            moved, largest = bytes_by_kind(found), max((c.size for c in found if c.kind == "all-gather"), default=0)
    memory = compiled.memory_analysis()
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    held, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes + new
    peak = held + temporaries + memory.generated_code_size_in_bytes
    fits = place.memory is None or peak <= place.memory
    seconds = None
    if place.chip is not None:  # arithmetic, memory and communication overlap
        chip = place.chip
        memory_bytes = touched["all"] if touched else held  # what is held is read at least once
        needed = (work / chip.flops, memory_bytes / chip.bandwidth, sum((moved or {}).values()) / chip.links)
        seconds = max(needed) / EFFICIENCY
    return Fit(
        *(what, place.name, chips, mesh, fits, place.memory, held, temporaries, peak, work, touched, moved, largest),
        *(seconds, tokens, spent, () if fits else hints),
    )


# Parts of the model that a program's bytes are counted for. `attend` is attention without its projections.
_SCOPES = ("mask_rows/attend", "mask_rows/attention", "mask_rows/mlp", "real_rows", "vocabulary")
_UNITS = {"M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def remedies(config: Config, g: Geometry, program: Program) -> tuple[str, ...]:
    """Settings that would reduce memory, most effective first."""
    t, found = config.train, []
    shape, ways = program.mesh.shape, program.mesh.shape["data"] * program.mesh.shape["fsdp"]
    held = sum(_local_bytes(leaf) for leaf in jax.tree.leaves((program.state, program.frozen)))
    if shape["data"] > 1:
        found.append(f"mesh.data=1 mesh.fsdp={shape['data'] * shape['fsdp']}: weights split over all chips")
    if config.model.compute_dtype == "float32":
        found.append("model.compute_dtype=bfloat16: half of everything but the optimizer")
    if config.model.remat != "full":
        found.append("model.remat=full: layers are recomputed in the backward pass")
    sequences = t.batch_size // t.accumulation // ways
    if sequences > 1:
        found.append(f"train.accumulation={t.accumulation * sequences}: one sequence on a chip at a time")
    if isinstance(program.objective, MultiTokenLoss) and program.anchors is not None and program.objective.shape.gated:
        blocks = program.objective.anchor_chunk or program.anchors.count or t.sequence_length
        if blocks > 1:
            found.append(f"train.anchor_chunk={max(1, blocks // 2)}: half of the mask rows at a time")
    if t.loss_chunk > 128:
        logits = 4 * t.loss_chunk * g.V // 2 / shape["tensor"]
        found.append(f"train.loss_chunk={t.loss_chunk // 2}: {_gb(logits)} less for each array of logits")
    found.append(f"more chips: weights, adapter and optimizer take {_gb(held)} on each of {program.mesh.size}")
    return tuple(found)


def _local_bytes(leaf: Any) -> int:
    sharding = getattr(leaf, "sharding", None)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    size = 1
    for n in shape:
        size *= n
    return size * (leaf.dtype.itemsize if hasattr(leaf.dtype, "itemsize") else 4)


def _parts(traffic: dict[str, int] | None) -> str:
    if traffic is None:
        return "not known: this compiler's program cannot be read"
    parts = sorted((name, size) for name, size in traffic.items() if name not in ("all", "other"))
    named = ", ".join(f"{name.replace('_', ' ')} {_gb(size)}" for name, size in parts)
    return _gb(traffic["all"]) + (f": {named}" if named else "")


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
