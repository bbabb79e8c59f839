"""The house: folders import one way, and only one line knows of the CPU engine."""

import ast
import graphlib
import re
from collections import defaultdict
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

PACKAGE = Path(__file__).resolve().parents[1] / "mtp_jax"


def imports(path):
    """The modules of the package that a file imports, anywhere in it."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return [name.removeprefix("mtp_jax.") for name in found if name.startswith("mtp_jax.")]


def room_of(parts):
    """A folder of the package, or a module that lies at its root."""
    return parts[0].removesuffix(".py")


def rooms(package=PACKAGE):
    """Which rooms each room imports from."""
    found = defaultdict(set)
    for path in package.rglob("*.py"):
        room = room_of(path.relative_to(package).parts)
        if room == "__init__":  # the public API: names of modules, imported when they are asked for
            continue
        for name in imports(path):
            other = name.split(".")[0]
            if other != room and ((package / other).is_dir() or (package / f"{other}.py").is_file()):
                found[room].add(other)
    return found


def test_no_folder_imports_in_a_circle():
    graphlib.TopologicalSorter(rooms()).prepare()  # raises CycleError with the circle


def test_arrows_run_from_commands_to_the_core():
    order = ["sharding", "model", "mtp", "decoding", "data", "runs", "training", "fitting", "exporting", "evaluating"]
    allowed = {room: set(order[:i]) for i, room in enumerate(order)}
    allowed["data"].discard("decoding")
    allowed["evaluating"] -= {"fitting", "exporting"}
    wrong = {
        room: sorted(others & set(order) - allowed[room])
        for room, others in rooms().items()
        if room in order and others & set(order) - allowed[room]
    }
    assert not wrong


def test_a_circle_is_found(tmp_path):
    for folder, text in {"a": "from mtp_jax.b import x", "b": "def f():\n    from mtp_jax.a import y"}.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "one.py").write_text(text)
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(rooms(tmp_path)).prepare()


# What would give away that a module knows of the C++.
NATIVE = re.compile(r"mtp_jax\.cpu|import cpu\b|CpuForward|Panel|\bC\+\+|[cC]pp\b|\bffi\b|ffi_call|MTP_JAX_NATIVE")


def lines_that_know():
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.relative_to(PACKAGE).parts[0] == "cpu":
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if NATIVE.search(line):
                yield f"{path.relative_to(PACKAGE)}:{number}: {line.strip()}"


def test_one_line_outside_of_its_folder_names_the_cpu_engine():
    (line,) = lines_that_know()
    assert line.startswith("api.py:") and "from mtp_jax.cpu import fastest_forward" in line


def test_commands_are_all_there():
    from mtp_jax.__main__ import COMMANDS

    modules = {path.stem for path in PACKAGE.glob("*.py") if "run_command(main)" in path.read_text()}
    assert COMMANDS.keys() == modules | {"data"}
