"""The schema of a run: every section and key with its default, and what values must be beside one another.

`mtp_jax.config_file` reads YAML into it and words the faults; docs/configuration.md describes every key.
"""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Projection = Literal["q", "k", "v", "o", "gate", "up", "down"]
# What a record of a dataset may be, best first, and our names of the columns that it takes.
FORMS = {"conversation": ("messages",), "completion": ("prompt", "completion"), "text": ("text",)}
FORMS |= {"sharegpt": ("conversations",)}
TOOLS = "tools"  # our name of the column that a conversation may have beside
# How data files end, and what the `datasets` library calls their format.
FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}


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
    weights: Literal["stored", "int8"] = "stored"  # int8: projections and head of a frozen base
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
    streaming: bool = False  # dataset: records are read in order while training runs, and not stored
    columns: dict[str, str] = {}  # dataset: from our names (FORMS, TOOLS) to the dataset's own


class Continuations(_Section):
    """The base model's own continuations of training documents, which `mtp_jax.regenerate` writes."""

    path: str  # a .jsonl file
    count: int = Field(default=1000, ge=1)  # prompts
    prompt_tokens: int = Field(default=64, ge=1)  # of a text; other documents have prompts of their own
    new_tokens: int = Field(default=192, ge=2)  # at most
    temperature: float | None = Field(default=None, gt=0)  # of sampling; null for greedy
    top_k: int | None = Field(default=None, ge=1)  # sampled from so many of the likeliest tokens; null for all
    top_p: float = Field(default=1.0, gt=0, le=1)  # from the smallest set of likeliest ones with so much probability


class Data(_Section):
    sources: list[Source] = Field(min_length=1)
    continuations: Continuations | None = None  # trained on in place of the sources' own training documents
    held_out: float = Field(default=0.05, ge=0, lt=1)  # share of documents, chosen by a hash of their name
    too_long: Literal["split", "cut", "drop"] = "split"  # what becomes of documents longer than a sequence
    bad_records: Literal["refuse", "skip"] = "refuse"  # those that cannot be trained on
    bad_records_limit: int = Field(default=100, ge=1)  # so many are skipped, and no more


class Lora(_Section):
    """The matrices beside the frozen projections."""

    rank: int = Field(default=32, ge=1)  # R
    alpha: float | None = Field(default=None, gt=0)  # null for 2R; the product is scaled by alpha/R
    # Null for all that the model has: those of attention and MLP, or with a mixture of experts those of attention.
    targets: list[Projection] | None = Field(default=None, min_length=1)
    gated: bool = True  # false: standard LoRA, which real rows meet too; cannot decode losslessly


class TermWeights(_Section):
    """Weights of the loss terms; with `lcm: 0` that term is not computed."""

    base: float = Field(default=1.0, ge=0)
    sampler: float = Field(default=1.0, ge=0)
    lcm: float = Field(default=1.0, ge=0)


class NoiseIds(_Section):
    """Token ids that mask rows are drawn from: low, ..., high - 1."""

    low: int = Field(default=0, ge=0)
    high: int | None = Field(default=None, ge=1)  # null for the model's vocab_size


class Mtp(_Section):
    """Multi-token prediction: masks, sampler head and losses."""

    masks: int = Field(default=8, ge=1)  # M
    rows: Literal["learned", "noise"] = "learned"  # what mask rows hold: trained embeddings, or those of random tokens
    noise: NoiseIds | None = None  # with rows: noise; null for all tokens
    sampler: Literal["paper", "residual", "none"] = "residual"
    target: Literal["data", "base_hard", "base_soft", "total_variation"] = "base_soft"
    weights: TermWeights = TermWeights()
    sampler_on_real: bool = False  # the paper's sampler loss covers real rows too
    offset_weights: Literal["flat", "decay", "expected_length"] = "flat"
    decay: float = Field(default=0.8, gt=0, le=1)  # with offset_weights: decay
    kl_warmup_steps: int = Field(default=0, ge=0)  # with target: total_variation
    grow_steps: int = Field(default=0, ge=0)  # over which blocks grow to all masks
    vocabulary: int | None = Field(default=None, ge=1)  # so many of the most frequent tokens are drafted; null for all


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
    # multi_token: held-out prompts to estimate tokens per step on, their tokens, and the tokens they are continued by
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


# ---- what must hold between keys


def chosen_forms(columns: dict[str, str]) -> list[str]:
    """The forms whose columns a source names."""
    return [form for form, names in FORMS.items() if set(names) & set(columns)]


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


def _noise_rows_stand_alone(c: Any) -> Iterator[str]:
    if c.mtp is None:
        return
    if c.mtp.rows == "learned":
        if c.mtp.noise is not None:
            yield "mtp.noise belongs to mtp.rows: noise, and the rows are learned."
        return
    if c.mtp.sampler != "none":
        yield f"mtp.rows: noise is for engines, which have no sampler head: set mtp.sampler={c.mtp.sampler} to none."
    if c.mtp.vocabulary is not None:
        yield "mtp.rows: noise is for engines, which draft from all tokens: unset mtp.vocabulary."
    if c.lora is not None and not c.lora.gated:
        yield "mtp.rows: noise trains the LoRA alone, behind its gate: set lora.gated to true."
    if c.mtp.noise is not None and c.mtp.noise.high is not None and c.mtp.noise.low >= c.mtp.noise.high:
        yield f"mtp.noise: low={c.mtp.noise.low} should be below high={c.mtp.noise.high}; high itself is not drawn."


def _quantised_is_frozen(c: Any) -> Iterator[str]:
    if c.model.weights == "int8" and c.objective == "next_token":
        yield "model.weights: int8 is for a frozen base, and next_token trains it: set it to stored."


def _sampling_has_temperature(c: Any) -> Iterator[str]:
    wanted = c.data.continuations
    if wanted is None or wanted.temperature is not None:
        return
    for key in (key for key, default in (("top_k", None), ("top_p", 1.0)) if getattr(wanted, key) != default):
        yield f"data.continuations.{key} belongs to sampling: set data.continuations.temperature too."


def _parts_divide(c: Any) -> Iterator[str]:
    batch, parts = c.train.batch_size, c.train.accumulation
    if batch % parts:
        yield f"train.batch_size={batch} does not divide into train.accumulation={parts} parts."


def _steps_after_warmup(c: Any) -> Iterator[str]:
    warmup, steps = c.train.warmup_steps, c.train.steps
    if warmup >= steps and warmup > 0:
        yield f"train.warmup_steps={warmup} leaves none of train.steps={steps} after the warm-up."


def _steps_after_growth(c: Any) -> Iterator[str]:
    grow, steps = 0 if c.mtp is None else c.mtp.grow_steps, c.train.steps
    if grow >= steps and grow > 0:
        yield f"mtp.grow_steps={grow} leaves none of train.steps={steps} in which the loss covers all masks."


def _something_held_out(c: Any) -> Iterator[str]:
    if c.evaluation.every is not None and c.data.held_out == 0:
        yield "evaluation.every asks for held-out evaluation, but data.held_out is 0."


def _mesh_sizes(c: Any) -> Iterator[str]:
    sizes = [c.mesh.data, c.mesh.fsdp, c.mesh.tensor]
    if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
        yield f"mesh sizes {sizes} must be at least 1, and at most one of them -1 (what is left)."


# Each yields what is wrong with a whole config; `source_faults` does so for one of its sources.
RULES = (
    _one_model,
    _objective_fits,
    _noise_rows_stand_alone,
    _quantised_is_frozen,
    _sampling_has_temperature,
    _parts_divide,
    _steps_after_warmup,
    _steps_after_growth,
    _something_held_out,
    _mesh_sizes,
)


def source_faults(source: Any, key: str) -> list[str]:
    """Contradictions within a source of the config; `key` is its place there."""
    faults = []
    if source.kind == "text" and source.path is None:
        faults.append(f"{key}.path is missing; a text source reads a file, a folder or a glob.")
    if source.kind == "python-stdlib" and (source.path is not None or source.separator is not None):
        faults.append(f"{key}: python-stdlib is the library of the running Python and takes no path or separator.")
    if source.kind == "dataset":
        return faults + _dataset_faults(source, key)
    for name in (name for name in ("name", "split") if getattr(source, name) is not None):
        faults.append(f"{key}.{name} belongs to a dataset source, and this one is {source.kind}.")
    if source.streaming:
        faults.append(f"{key}.streaming belongs to a dataset source; a {source.kind} source is read piece by piece.")
    if source.columns:
        faults.append(f"{key}.columns: a {source.kind} source has no columns.")
    if source.separator == "":
        faults.append(f"{key}.separator is empty; leave it out where a file is one document.")
    return faults


def _dataset_faults(source: Any, key: str) -> list[str]:
    faults, known = [], [name for names in FORMS.values() for name in names] + [TOOLS]
    if (source.name is None) == (source.path is None):
        faults.append(
            f"{key}: a dataset source takes exactly one of name (of the Hugging Face hub) and path (files that end in "
            f"{', '.join(FORMATS)}, a glob of them, or a folder)."
        )
    if source.separator is not None:
        faults.append(f"{key}.separator: the records of a dataset are its documents; nothing splits them.")
    if source.streaming and "[" in (source.split or ""):
        faults.append(f"{key}.split: a part of a split cannot be streamed; name a whole split.")
    for ours in sorted(set(source.columns) - set(known)):
        faults.append(f"{key}.columns.{ours} is not one of our columns, which are {', '.join(known)}.")
    if len(forms := chosen_forms(source.columns)) > 1:
        faults.append(f"{key}.columns: a record is one of {' or '.join(forms)}; name the columns of one alone.")
    return faults
