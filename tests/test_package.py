"""What is installed: the wheel, what importing it loads, its commands, and papers that must agree with the code."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from shutil import copy, copytree, ignore_patterns
from types import UnionType
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

import mtp_jax
from mtp_jax.config import Config

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The wheel of this checkout, unpacked far from it. It is built from a copy, so that no stale build/ gets in."""
    folder = tmp_path_factory.mktemp("package")
    source, wheels, site = folder / "source", folder / "wheels", folder / "site"
    copytree(ROOT / "mtp_jax", source / "mtp_jax", ignore=ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    built = subprocess.run([*pip, "--wheel-dir", wheels, source], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(wheels.glob("mtp_jax-*.whl"))) as wheel:
        wheel.extractall(site)
    return site


def run_in(folder: Path, site: Path, *arguments: str) -> str:
    """Output of this Python with `site` before everything installed, started in `folder`."""
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def files_of(package: Path) -> set[str]:
    """Every file below a package but compiled ones."""
    return {
        path.relative_to(package).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_wheel_holds_every_file_of_the_package(unpacked):
    assert files_of(unpacked / "mtp_jax") == files_of(ROOT / "mtp_jax")
    assert {"py.typed", "bundled/__init__.py"} <= files_of(unpacked / "mtp_jax")


def test_wheel_holds_the_licence(unpacked):
    licence = next(unpacked.glob("mtp_jax-*.dist-info/licenses/LICENSE"))
    assert licence.read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert "Apache License" in licence.read_text()


def test_wheel_is_what_runs_outside_the_checkout(unpacked, tmp_path):
    program = (
        "import mtp_jax; from importlib import resources; from mtp_jax.locate import bundled_models\n"
        "print(mtp_jax.__file__, mtp_jax.__version__, resources.files('mtp_jax.bundled'), bundled_models(), sep='\\n')"
    )
    file, version, bundled, models = run_in(tmp_path, unpacked, "-c", program).splitlines()
    assert Path(file) == unpacked / "mtp_jax" / "__init__.py"
    assert version == PROJECT["version"]
    assert Path(bundled) == unpacked / "mtp_jax" / "bundled"
    assert models == str(sorted(path.parent.name for path in (ROOT / "mtp_jax" / "bundled").glob("*/config.json")))


def test_import_without_metadata(tmp_path):
    copytree(ROOT / "mtp_jax", tmp_path / "mtp_jax", ignore=ignore_patterns("__pycache__"))
    # -S keeps site-packages, and the metadata there, out of sight.
    assert run_in(tmp_path, tmp_path, "-S", "-c", "import mtp_jax; print(mtp_jax.__version__)") == "unknown\n"


@pytest.mark.parametrize("command", ["train", "generate", "evaluate", "export"])
def test_help(command, unpacked, tmp_path):
    assert f"python -m mtp_jax.{command}" in run_in(tmp_path, unpacked, "-m", f"mtp_jax.{command}", "--help")


def test_no_module_imports_torch(tmp_path):
    program = (
        "import importlib, pkgutil, sys, mtp_jax\n"
        "names = [m.name for m in pkgutil.walk_packages(mtp_jax.__path__, 'mtp_jax.')]\n"
        "for name in names: importlib.import_module(name)\n"
        "print(len(names), 'torch' in sys.modules)"
    )
    count, torch = run_in(tmp_path, ROOT, "-c", program).split()
    assert int(count) >= len(list((ROOT / "mtp_jax").rglob("[!_]*.py")))
    assert torch == "False"


def test_pickle_is_never_used():
    uses = re.compile(
        r"\bimport\s+(cloud)?pickle|\bfrom\s+(cloud)?pickle\b|allow_pickle\s*=\s*True|\bc?pickle\.|torch\.load\b"
    )
    found = [path.name for path in (ROOT / "mtp_jax").rglob("*.py") if uses.search(path.read_text(encoding="utf-8"))]
    assert not found


def test_changelog_begins_with_this_version():
    versions = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert versions[0] == PROJECT["version"]
    assert mtp_jax.__version__ in (PROJECT["version"], "unknown")


# ---- docs/configuration.md


def section_in(annotation: Any) -> tuple[type[BaseModel] | None, str]:
    """The section inside an annotation, and what a key puts between itself and the section's keys."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, "."
    for part in get_args(annotation):
        section, between = section_in(part)
        if section:
            return section, between if isinstance(annotation, UnionType) else ".N."
    return None, ""


def keys_of(section: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Every key below a section by its dotted name, N standing for a place in a list, and its default."""
    keys = {}
    for name, field in section.model_fields.items():
        keys[prefix + name] = "required" if field.is_required() else field.get_default()
        if isinstance(keys[prefix + name], BaseModel):  # a section that may be left out
            keys[prefix + name] = keys[prefix + name].model_dump()
        inner, between = section_in(field.annotation)
        if inner:
            keys |= keys_of(inner, prefix + name + between)
    return keys


def documented() -> dict[str, str]:
    """Keys of the tables of docs/configuration.md, and what stands in the column `default`."""
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^\| `([\w.]+)` \| [^|]+ \| `?([^|`]+)`? \| [^|]+ \|$", text, re.MULTILINE))


def test_every_config_key_is_documented_with_its_default():
    top_level = {name for name, field in Config.model_fields.items() if section_in(field.annotation)[0]}
    expected = {key: default for key, default in keys_of(Config).items() if key not in top_level}
    found = documented()
    assert found.keys() == expected.keys()
    for key, default in expected.items():
        assert default == (found[key] if default == "required" else yaml.safe_load(found[key])), key
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert all(f"## `{name}`" in text for name in top_level)


def test_documented_overrides_name_real_keys():
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/training.md")]
    used = [key for text in texts for key in re.findall(r"(?<![\w./-])([a-z_]+(?:\.\w+)+)=", text)]
    known = keys_of(Config).keys()
    assert used and not [key for key in used if re.sub(r"\.\d+\b", ".N", key) not in known]
