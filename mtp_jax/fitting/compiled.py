"""What a step costs: arithmetic counted in the traced program, communication in the compiled one."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.extend

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BITS = {"s4": 4, "u4": 4, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32, "u32": 32, "f32": 32}
_BITS |= {"s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<shape>.*?) (?P<op>[a-z][a-z0-9-]*)\((?P<rest>.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|\w+_computations?)=(\{[^}]*\}|%[\w.-]+)")


class Instruction(NamedTuple):
    """One line of a compiled program."""

    name: str
    shape: str
    op: str
    rest: str  # operands and attributes


@dataclass(frozen=True)
class Collective:
    """A communication between chips, and how often a step runs it."""

    kind: str
    times: int
    devices: int  # that communicate with each other
    size: int  # bytes of the whole array, over all of these devices

    @property
    def moved(self) -> int:
        """Bytes that a chip receives in a step, with ring algorithms."""
        passes = 2 if self.kind == "all-reduce" else 1
        share = 1.0 if self.kind == "collective-permute" else (self.devices - 1) / self.devices
        return int(self.times * self.size * passes * share)


def collectives(text: str) -> list[Collective]:
    """Every collective of a compiled program's HLO; one in a loop counts as often as the loop runs.

    A loop whose length the program does not state (decoding's) counts once.
    """
    every, entry = computations(text)
    found: list[Collective] = []
    for name, times in executed(every, entry).items():
        body = every[name]
        begun = "AsyncCollectiveStart" in " ".join(i.rest for i in body if i.op == "custom-call")
        scatters = name.startswith("all-reduce-scatter")  # how the TPU compiler writes a reduce-scatter
        for instruction in body:
            kind = instruction.op.removesuffix("-start")
            if kind not in KINDS:
                continue
            # A collective that overlaps with other work is written in every computation it overlaps with.
            if "chain_id" in instruction.rest and not begun:
                continue
            kind = "reduce-scatter" if kind == "all-reduce" and scatters else kind
            devices = _group(instruction.rest)
            sizes = array_bytes(instruction.shape)
            # The result of a start also names its operands; of a gather the result is the larger.
            size = max(sizes) if instruction.op.endswith("-start") and kind != "all-reduce" else sum(sizes)
            if kind == "reduce-scatter" and instruction.op == "reduce-scatter":
                size *= devices
            found.append(Collective(kind, times, devices, size))
    return [collective for collective in found if collective.devices > 1]


def bytes_by_kind(found: list[Collective]) -> dict[str, int]:
    """Bytes that a chip receives in a step, by kind."""
    total: dict[str, int] = defaultdict(int)
    for collective in found:
        total[collective.kind] += collective.moved
    return dict(total)


def array_bytes(shape: str) -> list[int]:
    """Bytes of each array in a shape as HLO writes it; a tuple has several."""
    found = []
    for dtype, dims in _ARRAY.findall(shape):
        bits = _BITS.get(dtype, 8)  # all others have eight: pred, s8, the float8 kinds
        found.append(math.prod(int(n) for n in dims.split(",") if n) * bits // 8)
    return found


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of each computation of a compiled program's HLO, and the name of the one that is run."""
    found: dict[str, list[Instruction]] = {}
    current, entry = "", ""
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")):
            current = line.removeprefix("ENTRY ").removeprefix("%").split(" ")[0]
            found[current] = []
            if line.startswith("ENTRY"):
                entry = current
        elif current and (match := _INSTRUCTION.match(line)):
            found[current].append(Instruction(**match.groupdict()))
    return found, entry


def executed(every: dict[str, list[Instruction]], entry: str) -> dict[str, int]:
    """How often a step runs each computation.

    Of a conditional's branches the one that writes least counts. They are alike, as for windows of layers, or the
    larger is for a rare case, as where most rows choose the same experts.
    """
    times: dict[str, int] = defaultdict(int)

    def written(name: str) -> int:
        own = sum(sum(array_bytes(i.shape)) for i in every.get(name, []) if i.op != "parameter")
        return own + sum(written(inner) for i in every.get(name, []) for inner in _called(i.rest))

    def visit(name: str, count: int) -> None:
        times[name] += count
        for instruction in every.get(name, []):
            if instruction.op == "while":
                body = _named(instruction.rest, "body")
                visit(body, count * _trips(every, instruction.rest))
            elif instruction.op == "conditional":
                visit(min(_called(instruction.rest), key=written), count)
            elif instruction.op not in ("all-reduce", "reduce-scatter", "all-reduce-start"):  # these call an addition
                for inner in _called(instruction.rest):
                    visit(inner, count)

    visit(entry, 1)
    return {name: count for name, count in times.items() if name in every}


def _called(rest: str) -> list[str]:
    return [name for called in _CALLED.findall(rest) for name in re.findall(r"[\w.-]+", called)]


def _named(rest: str, attribute: str) -> str:
    match = re.search(rf"\b{attribute}=%?([\w.-]+)", rest)
    return match.group(1) if match else ""


def _trips(every: dict[str, list[Instruction]], rest: str) -> int:
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', rest):
        return int(known.group(1))
    names, limits = [_named(rest, "condition")], [1]
    while names:
        for instruction in every.get(names.pop(), []):
            names += _called(instruction.rest)
            if instruction.op == "constant" and instruction.shape.startswith("s32[]"):
                limits.append(int(instruction.rest.split(")")[0]))
    return max(limits)


def _group(rest: str) -> int:
    """How many devices a collective runs between."""
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(match.group(1).split(","))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(match.group(1))
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", match.group(2)))
    if match := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        return match.group(1).count("{")
    return 1


def flops(jaxpr: Any) -> float:
    """Operations of all matrix products of a traced program, on all devices together; a multiply and an add are two.

    A scan counts as often as it runs, any other loop once; what a backward pass recomputes counts again. The smallest
    branch counts, as in `executed`; a product by groups counts as if each of its rows were in one.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left.shape[i] for i in contracted)
        elif equation.primitive.name == "ragged_dot_general":
            total += 2.0 * equation.invars[0].aval.size * equation.outvars[0].aval.shape[-1]
        elif equation.primitive.name == "pallas_call":
            cost = equation.params.get("cost_estimate")
            total += 0.0 if cost is None else float(cost.flops)
        else:
            inner = [flops(sub) for sub in _inside(equation)]
            if equation.primitive.name == "scan":
                total += equation.params["length"] * sum(inner)
            elif equation.primitive.name == "cond":
                total += min(inner, default=0.0)
            elif equation.primitive.name == "shard_map":
                total += equation.params["mesh"].size * sum(inner)
            else:
                total += sum(inner)
    return total


def _inside(equation: Any) -> Iterator[Any]:
    """The programs within an equation; of a custom derivative only the one that runs."""
    for value in equation.params.values():
        for leaf in value if isinstance(value, tuple | list) else (value,):
            if isinstance(leaf, jax.extend.core.ClosedJaxpr):
                yield leaf.jaxpr
            elif isinstance(leaf, jax.extend.core.Jaxpr):
                yield leaf
