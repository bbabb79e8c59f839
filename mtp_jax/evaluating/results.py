"""The results of an evaluation: what results.json holds, and what every table, plot and page is made from."""

from typing import Any, TypedDict


class Interval(TypedDict):
    """A mean over prompts and its 95% bootstrap interval."""

    mean: float
    low: float
    high: float


class Spread(TypedDict):
    """The median, the lowest and the highest of the rounds."""

    median: float
    low: float
    high: float


class Identical(TypedDict):
    """How many outputs are those of plain decoding, and where the others differ."""

    same: int
    of: int
    ties: list[str]  # from a token on whose logit equals another's but for rounding
    faults: list[str]  # from any other token on


class Suite(TypedDict):
    """Prompts of one benchmark."""

    name: str
    title: str
    domain: str
    prompts: int
    source: str  # a file's name or a hub name
    metric: str | None  # what `score` is


class Row(TypedDict):
    """One decoder on one suite at one batch size."""

    suite: str
    decoder: str  # a plan, auto, lookup:K, jacobi:K, draft:K, transformers or transformers lookup
    plan: str | None  # what auto chose, for auto
    calibrated_apart: bool | None  # auto was calibrated on questions that are not measured, for auto
    batch_size: int
    masks: int | None  # of the longest block
    rows: int | None  # of a step
    steps: int | None
    tokens: int
    tokens_per_step: Interval | None
    acceptance: list[float] | None  # the probability that the first j drafts of a step are all accepted, j = 1, ...
    tokens_per_second: Spread | None
    speedup: Spread | None  # over plain decoding, within each round
    step_seconds: float | None  # median of a decoding step
    identical: Identical | None
    score: float | None
    estimate: float | None  # tokens per step as training estimates them
    estimate_two_passes: float | None  # tokens per pass of an engine that drafts and verifies in turns; of noise rows


class Sample(TypedDict):
    """A completion by the passes that wrote it."""

    suite: str
    decoder: str
    prompt: str
    pieces: list[tuple[str, int]]  # text and step, 0 for prefill
    tokens: int
    steps: int
    identical: bool | None
    speedup: float | None


class Results(TypedDict):
    """An evaluation of a model, perhaps with an adapter and a draft model."""

    format: int
    model: str
    adapter: str | None
    draft_model: str | None
    weights: str
    dtype: str
    device: str
    masks: int | None
    versions: dict[str, str]
    command: str
    settings: dict[str, Any]
    suites: list[Suite]
    rows: list[Row]
    samples: list[Sample]
