"""A run's config from a YAML file and overrides: every fault is named with its key, and all are reported at once."""

import contextlib
import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from mtp_jax.config import RULES, Config, Lora, Mtp, source_faults
from mtp_jax.errors import UserError
from mtp_jax.storage import local


class _Loader(yaml.SafeLoader):
    """YAML 1.2's idea of a number (2e-4 is one), and no key twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise yaml.composer.ComposerError(None, None, f"key {twice[0]!r} stands twice", node.start_mark)
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def load_config(file: str, overrides: list[str]) -> Config:
    """Read a YAML config and apply `dotted.key=value` overrides, which reach into lists by number.

    Raises:
        UserError: one fault per unknown key (with the nearest valid one), wrong value and contradiction.
    """
    tree = _parse_yaml(_read(file), file)
    if not isinstance(tree, dict):
        raise UserError(f"{file}: should hold a mapping of keys to values, not {type(tree).__name__}.")
    faults: list[str] = []
    for override in overrides:
        try:
            _apply(tree, override)
        except UserError as error:
            faults += error.faults
    if faults:
        raise UserError(*faults)
    return validate(tree, file)


def _read(file: str) -> str:
    try:
        return local(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: the config cannot be read ({getattr(error, 'strerror', None) or error}).") from error


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: no valid YAML ({error}).") from error


def _apply(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    *parents, last = dotted.split(".")
    if not equals or not all([*parents, last]):
        raise UserError(f"{override!r}: an override has the form dotted.key=value.")
    value = _parse_yaml(text, override)
    node: Any = tree
    for depth, name in enumerate(parents):
        if isinstance(node, list):
            node = _item(node, name, override)
        else:
            if node.get(name) is None:
                node[name] = {}
            node = node[name]
        if not isinstance(node, dict | list):
            raise UserError(f"{override!r}: {'.'.join(parents[: depth + 1])} is a value, it has no keys below it.")
    if isinstance(node, list):
        _item(node, last, override)
        node[int(last)] = value
    else:
        node[last] = value


def _item(node: list[Any], name: str, override: str) -> Any:
    if not name.isdecimal() or int(name) >= len(node):
        right = (
            f"should be a number from 0 to {len(node) - 1}, the list's last"
            if node
            else "is not there, the list is empty"
        )
        raise UserError(f"{override!r}: {name!r} {right}.")
    return node[int(name)]


def validate(tree: dict[str, Any], where: str) -> Config:
    """A config from a parsed tree; all faults are reported at once."""
    faults: list[str] = []
    bad: set[tuple[Any, ...]] = set()
    config = None
    try:
        config = Config.model_validate(tree)
        if config.objective == "multi_token":  # sections left out stand for their defaults
            config = config.model_copy(update={"lora": config.lora or Lora(), "mtp": config.mtp or Mtp()})
    except ValidationError as error:
        for fault in error.errors():
            # Where a text or a section may stand, each is tried: report the one that was meant.
            if fault["loc"][-1:] == ("str" if isinstance(fault["input"], dict) else "TokenizerRecipe",):
                continue
            loc = tuple(part for part in fault["loc"] if part not in _UNION_TAGS)
            text, meant = _explain({**fault, "loc": loc})
            faults.append(text)
            bad |= {loc, meant}
    faults += _contradictions(_readable(Config, tree, bad))
    if config is None or faults:
        raise UserError(*(f"{where}: {fault}" for fault in faults))
    return config


_UNION_TAGS = ("str", "TokenizerRecipe")
_LONGEST = 80  # characters of a wrong value that a message repeats


def _explain(fault: Any) -> tuple[str, tuple[Any, ...]]:
    """What is wrong, and the place of the key that was meant."""
    loc, kind = fault["loc"], fault["type"]
    key = ".".join(str(part) for part in loc)
    if kind == "missing":
        return f"{key} is missing.", loc
    if kind == "extra_forbidden":
        valid = sorted(_keys_beside(loc))
        near = difflib.get_close_matches(str(loc[-1]), valid, n=1, cutoff=0.5)
        elsewhere = [path for path in _all_keys(Config) if path.split(".")[-1] == loc[-1]]
        if near:
            return f"{key} is not a key; did you mean {near[0]!r}?", (*loc[:-1], near[0])
        if elsewhere:
            return f"{key} is not a key; did you mean {elsewhere[0]!r}?", tuple(elsewhere[0].split("."))
        return f"{key} is not a key; valid here are {', '.join(valid)}.", loc
    said = repr(fault["input"])
    said = said if len(said) <= _LONGEST else said[: _LONGEST - 3] + "..."
    if kind == "too_short":
        return f"{key} should have at least {fault['ctx']['min_length']} entry, not {said}.", loc
    should = fault["msg"].replace("Input should", "should").replace("String should", "should")
    return f"{key} {should}, not {said}.", loc


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class inside an annotation such as `list[Source]` or `Scratch | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((s for part in getattr(annotation, "__args__", ()) if (s := _section_of(part))), None)


def _keys_beside(loc: tuple[Any, ...]) -> set[str]:
    section: type[BaseModel] = Config
    for part in loc[:-1]:
        if part in section.model_fields:
            section = _section_of(section.model_fields[part].annotation) or section
    return set(section.model_fields)


def _all_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    paths = []
    for name, field in section.model_fields.items():
        paths.append(prefix + name)
        if inner := _section_of(field.annotation):
            paths += _all_keys(inner, f"{prefix}{name}.")
    return paths


class _FaultyValue(Exception):
    """A rule needs a value that is itself at fault."""


class _Readable:
    """A section of which some values may be at fault: reading one of those raises _FaultyValue."""

    def __init__(self, values: dict[str, Any], bad: set[str]):
        self.values, self.bad = values, bad

    def __getattr__(self, name: str) -> Any:
        if name in self.bad:
            raise _FaultyValue
        return self.values[name]


def _readable(section: type[BaseModel], tree: dict[str, Any], bad: set[tuple[Any, ...]]) -> _Readable:
    """A tree with the defaults of a section filled in; `bad` holds the places of faults."""

    def below(name: Any, places: set[tuple[Any, ...]]) -> set[tuple[Any, ...]]:
        return {place[1:] for place in places if place[:1] == (name,)}

    values: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        value = tree.get(name, field.get_default(call_default_factory=True))
        inner, places = _section_of(field.annotation), below(name, bad)
        if isinstance(value, BaseModel):
            value = value.model_dump()
        if inner and isinstance(value, dict):
            value = _readable(inner, value, places)
        elif inner and isinstance(value, list):
            value = [_readable(inner, v if isinstance(v, dict) else {}, below(i, places)) for i, v in enumerate(value)]
        values[name] = value
    return _Readable(values, set(values) if () in bad else {place[0] for place in bad if len(place) == 1})


def _contradictions(c: Any) -> list[str]:
    """Values that are right one by one but not together; rules about values at fault are left out."""
    faults: list[str] = []

    def check(rule: Callable[..., Iterable[str]], *of: Any) -> None:
        with contextlib.suppress(_FaultyValue):
            faults.extend(rule(*of))

    def check_sources() -> Iterable[str]:
        for i, source in enumerate(c.data.sources):
            check(source_faults, source, f"data.sources.{i}")
        return ()

    for rule in RULES:
        check(rule, c)
    check(check_sources)
    return faults


def dump(config: Config) -> str:
    """The whole config, defaults included, as YAML."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)
