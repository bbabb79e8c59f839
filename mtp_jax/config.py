"""The typed config tree of a run: strict, every fault named with its key, all faults at once."""

import contextlib
import difflib
import re
from collections.abc import Iterator
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mtp_jax.data.source_rules import source_faults
from mtp_jax.errors import UserError
from mtp_jax.model.weights import PROJECTIONS
from mtp_jax.storage import local


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TokenizerRecipe(_Section):
    """A byte-level BPE tokenizer trained on the training data before the model is."""

    vocabulary: int = Field(ge=258)


class Scratch(_Section):
    """A base model trained from scratch."""

    config: dict[str, Any]  # a Hugging Face config.json, as a mapping
    tokenizer: str | TokenizerRecipe  # a folder, or how to train one


class Model(_Section):
    """Which base model, and how it is computed."""

    path: str | None = None  # a Hugging Face folder, bundled:NAME, or a hub name
    scratch: Scratch | None = None
    geometry: str | None = None  # preflight: a config.json to read in place of the one of `path`
    adapter: str | None = None  # multi_token: an adapter to start from, in place of a fresh one
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # losses, norms and softmax are float32 always
    save_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"  # of the folder a finished run writes
    remat: Literal["none", "dots", "full"] = "none"  # what the backward pass recomputes
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"  # of real rows in training; auto by platform


class Source(_Section):
    """One source of documents."""

    kind: Literal["text", "python-stdlib", "dataset"]
    path: str | None = None  # a file, a folder or a glob
    name: str | None = None  # dataset: its name on the Hugging Face hub, instead of a path
    split: str | None = None  # dataset: which part, "train" where it is null
    separator: str | None = None  # text: what parts a file into documents; without it a file is one document
    weight: float = Field(default=1.0, gt=0)  # share of the mixture, by documents
    streaming: bool = False  # dataset: rows are read in order while training runs, and not stored
    columns: dict[str, str] = {}  # dataset: from messages, prompt, completion or text to the dataset's own names


class Continuations(_Section):
    """The base model's own continuations of training documents, which `mtp_jax.regenerate` writes."""

    path: str  # a .jsonl file
    count: int = Field(default=1000, ge=1)  # prompts
    prompt_tokens: int = Field(default=64, ge=1)  # of a text; other documents have prompts of their own
    new_tokens: int = Field(default=192, ge=2)  # at most


class Data(_Section):
    sources: list[Source] = Field(min_length=1)
    continuations: Continuations | None = None  # trained on in place of the sources' own training documents
    held_out: float = Field(default=0.05, ge=0, lt=1)  # share of documents, chosen by a hash of their name
    too_long: Literal["split", "cut", "drop"] = "split"  # what becomes of documents longer than a sequence


class Lora(_Section):
    """The matrices beside the frozen projections."""

    rank: int = Field(default=32, ge=1)  # R
    alpha: float | None = Field(default=None, gt=0)  # null for 2R; the product is scaled by alpha/R
    targets: list[Literal["q", "k", "v", "o", "gate", "up", "down"]] = Field(default=list(PROJECTIONS), min_length=1)
    gated: bool = True  # false: standard LoRA, which real rows meet too; cannot decode losslessly


class TermWeights(_Section):
    """Weights of the loss terms; 0 removes one."""

    base: float = Field(default=1.0, ge=0)
    sampler: float = Field(default=1.0, ge=0)
    lcm: float = Field(default=1.0, ge=0)


class Mtp(_Section):
    """Multi-token prediction: masks, sampler head and losses."""

    masks: int = Field(default=8, ge=1)  # M
    sampler: Literal["paper", "residual", "none"] = "residual"
    target: Literal["data", "base_hard", "base_soft", "total_variation"] = "base_soft"
    weights: TermWeights = TermWeights()
    sampler_on_real: bool = False  # the paper's sampler loss covers real rows too
    offset_weights: Literal["flat", "decay", "expected_length"] = "flat"
    decay: float = Field(default=0.8, gt=0, le=1)  # with offset_weights: decay
    kl_warmup_steps: int = Field(default=0, ge=0)  # with target: total_variation


class Train(_Section):
    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)  # sequences per step, over all devices
    sequence_length: int = Field(ge=2)  # tokens
    anchors: int | Literal["all"] | None = None  # multi_token: blocks per sequence, 64 by default
    learning_rate: float = Field(gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    schedule: Literal["flat", "cosine"] = "flat"  # after the warm-up; cosine falls to a tenth
    weight_decay: float = Field(default=0.0, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    clip_norm: float | None = Field(default=1.0, gt=0)
    accumulation: int = Field(default=1, ge=1)  # the batch is computed in this many parts
    anchor_chunk: int | None = Field(default=None, ge=1)  # multi_token: blocks of a sequence computed at a time
    loss_chunk: int = Field(default=2048, ge=1)  # rows, on each device, whose logits exist at a time


class Evaluation(_Section):
    every: int | None = Field(default=None, ge=1)  # steps; null for never
    batches: int | None = Field(default=None, ge=1)  # held-out batches per evaluation; null for all
    # multi_token: tokens per step are estimated on so many held-out prompts of so many tokens, continued by so many
    prompts: int = Field(default=16, ge=1)
    prompt_tokens: int = Field(default=64, ge=1)
    new_tokens: int = Field(default=128, ge=2)


class Checkpoints(_Section):
    every: int = Field(default=100, ge=1)  # steps
    keep: int = Field(default=2, ge=1)
    keep_best: bool = True  # by the held-out estimate, where evaluation.every is set


class Logging(_Section):
    every: int = Field(default=1, ge=1)  # steps between lines of metrics.jsonl
    tensorboard: bool = False
    wandb: str | None = None  # project name


class Mesh(_Section):
    """Devices along each axis; -1 takes what is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


class Config(_Section):
    objective: Literal["next_token", "multi_token"]
    output_dir: str = Field(min_length=1)
    seed: int = Field(default=0, ge=0, lt=2**31)
    model: Model
    data: Data
    lora: Lora | None = None  # multi_token only, as mtp
    mtp: Mtp | None = None
    train: Train
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()
    logging: Logging = Logging()
    mesh: Mesh = Mesh()
    compilation_cache: str | None = "~/.cache/mtp_jax/compiled"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's idea of a number (2e-4 is one), and no key twice."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
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
            if fault["loc"][-1] == ("str" if isinstance(fault["input"], dict) else "TokenizerRecipe"):
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
    for rule in (
        _one_model,
        _objective_fits,
        _sources_agree,
        _parts_divide,
        _steps_after_warmup,
        _something_held_out,
        _mesh_sizes,
    ):
        try:
            faults += rule(c)
        except _FaultyValue:
            continue
    return faults


def _one_model(c: Any) -> Iterator[str]:
    if (c.model.path is None) == (c.model.scratch is None):
        yield "exactly one of model.path (a checkpoint) and model.scratch (a new model) must be given."


def _objective_fits(c: Any) -> Iterator[str]:
    if c.objective == "next_token":
        given = {"lora": c.lora, "mtp": c.mtp, "train.anchors": c.train.anchors, "model.adapter": c.model.adapter}
        given |= {"data.continuations": c.data.continuations, "train.anchor_chunk": c.train.anchor_chunk}
        for key in (key for key, value in given.items() if value is not None):
            yield f"{key} belongs to objective: multi_token, and the objective is next_token."
        return
    if c.model.path is None:
        yield "objective: multi_token trains beside a frozen checkpoint: model.path is missing."
    if c.train.anchor_chunk is not None and c.lora is not None and not c.lora.gated:
        yield (
            "train.anchor_chunk takes blocks one chunk after another, which needs real rows that do not change: unset "
            "it, or set lora.gated to true."
        )
    masks = 8 if c.mtp is None else c.mtp.masks
    if c.train.sequence_length <= masks:
        yield (
            f"train.sequence_length={c.train.sequence_length} is shorter than a block: one real token and "
            f"mtp.masks={masks} masks."
        )
    if isinstance(c.train.anchors, int) and not 1 <= c.train.anchors <= c.train.sequence_length:
        yield f"train.anchors={c.train.anchors} should be from 1 to train.sequence_length, or 'all'."


def _sources_agree(c: Any) -> Iterator[str]:
    for i, source in enumerate(c.data.sources):
        with contextlib.suppress(_FaultyValue):
            yield from source_faults(source, f"data.sources.{i}")


def _parts_divide(c: Any) -> Iterator[str]:
    batch, parts = c.train.batch_size, c.train.accumulation
    if batch % parts:
        yield f"train.batch_size={batch} does not divide into train.accumulation={parts} parts."


def _steps_after_warmup(c: Any) -> Iterator[str]:
    warmup, steps = c.train.warmup_steps, c.train.steps
    if warmup >= steps and warmup > 0:
        yield f"train.warmup_steps={warmup} leaves none of train.steps={steps} after the warm-up."


def _something_held_out(c: Any) -> Iterator[str]:
    if c.evaluation.every is not None and c.data.held_out == 0:
        yield "evaluation.every asks for held-out evaluation, but data.held_out is 0."


def _mesh_sizes(c: Any) -> Iterator[str]:
    sizes = [c.mesh.data, c.mesh.fsdp, c.mesh.tensor]
    if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
        yield f"mesh sizes {sizes} must be at least 1, and at most one of them -1 (what is left)."


def dump(config: Config) -> str:
    """The whole config, defaults included, as YAML."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)
