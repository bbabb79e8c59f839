"""Bytes that a compiled program moves to and from memory, by the names of the code that they belong to."""

import re
from collections import defaultdict
from collections.abc import Iterable

from mtp_jax.fitting.compiled import Instruction, array_bytes, computations, executed

# They name arrays, or hand them on, and move nothing.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}
_FREE |= {"iota", "partition-id", "replica-id", "opt-barrier", "add-dependency"}
_FREE |= {"async-start", "async-update"}  # what they call is counted itself
_SLICES = {"dynamic-slice", "slice", "gather"}
_ON_CHIP = re.compile(r"S\(1\)")
_OPERAND = re.compile(r"%([\w.-]+)")
_NAME = re.compile(r'op_name="([^"]*)"')


def traffic(text: str, scopes: Iterable[str] = ()) -> dict[str, int]:
    """Bytes that a step reads and writes, by the first of `scopes` in an instruction's name, `other` and `all`.

    A scope within another is named with it: `mask_rows/attend`.

    Every instruction reads its operands and writes its result once, but for what stays on the chip; of an array that is
    only sliced, the slices count, and of one that is updated in place, the update. A loop counts as often as it runs,
    and one whose length is not known once.
    """
    every, entry = computations(text)
    found: dict[str, int] = defaultdict(int)
    fused = {name for body in every.values() for i in body if i.op == "fusion" for name in _fused(i)}
    for name, times in executed(every, entry).items():
        if name in fused:
            continue
        shapes = {i.name: i.shape for i in every[name]}
        for instruction in every[name]:
            moved = times * _moved(instruction, shapes, every)
            named = _NAME.search(instruction.rest)
            parts = re.split(r"[/()]", named.group(1)) if named else []
            found[next((scope for scope in scopes if set(scope.split("/")) <= set(parts)), "other")] += moved
            found["all"] += moved
    return dict(found)


def _fused(instruction: Instruction) -> list[str]:
    return re.findall(r"\bcalls=%?([\w.-]+)", instruction.rest)


def _calls_alike(instruction: Instruction, every: dict[str, list[Instruction]]) -> bool:
    """Whether it calls what gives its own result; others call a comparison."""
    called = re.findall(r"called_computations=\{%?([\w.-]+)\}", instruction.rest)
    return any(_size(every[name][-1].shape) == _size(instruction.shape) for name in called if every.get(name))


def _moved(instruction: Instruction, shapes: dict[str, str], every: dict[str, list[Instruction]]) -> int:
    op = instruction.op
    if op in _FREE or op.endswith("-done"):
        return 0
    if op == "custom-call" and _calls_alike(
        instruction, every
    ):  # a gather beside the products, which is counted itself
        return 0
    operands = [name for name in _OPERAND.findall(instruction.rest.split("), ")[0]) if name in shapes]
    if op == "fusion":
        (inside,) = [every[name] for name in _fused(instruction)]
        return _fusion(inside, [shapes[name] for name in operands], instruction.shape)
    written = _size(instruction.shape)
    if op in _SLICES:  # read wherever the result goes
        source = shapes[operands[0]] if operands else ""
        return written + (
            0 if _ON_CHIP.search(source) else sum(sum(array_bytes(piece)) for piece in _pieces(instruction.shape))
        )
    if op == "dynamic-update-slice":
        return 2 * _size(shapes[operands[1]])
    if op.endswith("-start"):  # the result also names the operands
        return sum(_size(shapes[name]) for name in operands) + max(0, written - sum(_size(shapes[n]) for n in operands))
    return written + sum(_size(shapes[name]) for name in operands)


def _fusion(inside: list[Instruction], operands: list[str], shape: str) -> int:
    """What a fusion reads and writes: of an operand that is only sliced, the slices.

    Products may run beside a collective that began before: its arrays are handed through and count where it begins.
    """
    by_name, root = {i.name: i for i in inside}, inside[-1]
    begins = any("AsyncCollectiveStart" in i.rest for i in inside)
    flying = {i.name for i in inside if not begins and ("chain_id" in i.rest or "AsyncCollective" in i.rest)}
    uses: dict[str, list[tuple[Instruction, int]]] = defaultdict(list)
    for instruction in inside:
        for at, name in enumerate(_OPERAND.findall(instruction.rest.split("), ")[0])):
            if name in by_name:
                uses[name].append((instruction, at))

    def ends(name: str) -> list[tuple[Instruction, int]]:
        """What uses an array in the end, bitcasts aside."""
        found = []
        for user, at in uses[name]:
            found += ends(user.name) if user.op == "bitcast" else [(user, at)]
        return found

    moved = 0
    updated = False
    for parameter in (i for i in inside if i.op == "parameter"):
        number = int(parameter.rest.split(")")[0])
        users = ends(parameter.name)
        if flying and all(user.name in flying or user is root for user, _ in users):
            continue
        if users and all(user.op in _SLICES and at == 0 for user, at in users):
            moved += sum(_size(user.shape) for user, _ in users) if not _ON_CHIP.search(operands[number]) else 0
        elif users and all(user.op == "dynamic-update-slice" and at == 0 for user, at in users):
            updated = True
            for user, _ in users:
                update = _OPERAND.findall(user.rest.split("), ")[0])[1]
                moved += 2 * _size(by_name[update].shape)
        else:
            moved += _size(operands[number])
    if updated:
        return moved
    if not flying:
        return moved + _size(shape)
    results = _OPERAND.findall(root.rest.split("), ")[0]) if root.op == "tuple" else [root.name]
    pieces = _pieces(shape)
    if len(pieces) != len(results):
        return moved + _size(shape)
    own = (name not in flying and by_name[name].op != "parameter" for name in results)
    return moved + sum(_size(piece) for piece, is_own in zip(pieces, own, strict=True) if is_own)


def _size(shape: str) -> int:
    """Bytes of the arrays of a shape that lie in memory and not on the chip."""
    return sum(sum(array_bytes(piece)) for piece in _pieces(shape) if not _ON_CHIP.search(piece))


def _pieces(shape: str) -> list[str]:
    """The arrays of a shape."""
    return re.findall(r"[a-z]+\d*(?:e\d+m\d+\w*)?\[[\d,]*\](?:\{[^}]*\})?", shape)
