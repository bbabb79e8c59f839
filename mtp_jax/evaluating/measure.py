"""Every decoder decodes a suite in turns; what is counted: tokens per step, seconds, identical outputs, scores."""

import statistics
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.decoding.auto import survival
from mtp_jax.decoding.generator import Completion, Generator, tokens_per_step
from mtp_jax.evaluating.decoders import AUTO, PLAIN, Decoder
from mtp_jax.evaluating.results import Identical, Interval, Row, Sample, Spread
from mtp_jax.evaluating.suites import Asked
from mtp_jax.evaluating.ties import TIE, departure
from mtp_jax.model.base import Base
from mtp_jax.model.decoder import Decoder as Model
from mtp_jax.model.weights import Params
from mtp_jax.mtp.adapter_folder import Adapter
from mtp_jax.mtp.estimate import Continuations, Estimator, walk, walk_twice
from mtp_jax.mtp.estimate import tokens_per_step as estimate_of
from mtp_jax.text import TextStream

_RESAMPLES = 2000
_ESTIMATED_TOGETHER = 2  # texts
_LENGTHS = 128  # prompts whose lengths round up alike are decoded together

Gap = Callable[[Sequence[int]], float]  # between the two best logits behind a text
Rounds = dict[str, list[list[Completion]]]  # for each decoder and round the completions of all prompts


class Estimates(NamedTuple):
    """Tokens per step of quadratic decoding by number of masks; of noise rows also per pass of an engine's two."""

    steps: dict[int, float]
    passes: dict[int, float]


def decode_in_turns(
    decoders: Sequence[Decoder],
    prompts: list[list[int]],
    batch_size: int,
    rounds: int,
    advance: Callable[[], None] = lambda: None,
) -> Rounds:
    """Every decoder decodes all prompts once a round, one decoder after another: machines change their pace.

    Prompts of like length are put into one batch. `advance` is called whenever a decoder has had its turn.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]) // _LENGTHS, i)) if batch_size > 1 else None
    found: Rounds = {decoder.name: [] for decoder in decoders}
    for _ in range(rounds):
        for decoder in decoders:
            if order is None:
                done = decoder.run(prompts)
            else:
                by_number = zip(order, decoder.run([prompts[i] for i in order]), strict=True)
                done = [completion for _, completion in sorted(by_number, key=lambda pair: pair[0])]
            found[decoder.name].append(done)
            advance()
    return found


def rows_of(
    asked: Asked,
    decoders: Sequence[Decoder],
    found: Rounds,
    batch_size: int,
    generator: Generator,
    reference: list[list[int]],
    gap: Gap,
    estimates: Estimates,
    run_code: bool,
    calibrated_apart: bool,
) -> list[Row]:
    """One row for each decoder.

    Args:
        reference: what plain decoding gives with batch 1.
        run_code: execute programs that the model wrote, for suites that are scored by unit tests.
        calibrated_apart: `auto` was calibrated on questions that are not measured.
    """
    rates = {name: [_rate(done, batch_size) for done in rounds] for name, rounds in found.items()}
    scores: dict[tuple[tuple[int, ...], ...], float | None] = {}
    rows: list[Row] = []
    for decoder in decoders:
        name, plan, done = decoder.name, decoder.plan, found[decoder.name][0]
        texts = tuple(tuple(c.token_ids) for c in done)
        if texts not in scores:
            scores[texts] = score(asked, done, generator, run_code)
        quadratic = plan is not None and str(plan) == f"quadratic:{plan.drafts}"
        steps = [_step_seconds(completions, batch_size) for completions in found[name]]
        rows.append(
            Row(
                suite=asked.name,
                decoder=name,
                plan=str(plan) if name == AUTO else None,
                calibrated_apart=calibrated_apart if name == AUTO else None,
                batch_size=batch_size,
                masks=plan.block if plan is not None and plan.mask_rows else None,
                rows=plan.rows if plan is not None else None,
                steps=sum(c.steps for c in done) if decoder.ours else None,
                tokens=sum(len(c.token_ids) for c in done),
                tokens_per_step=interval(done) if decoder.ours else None,
                acceptance=survival(done).tolist() if plan is not None and plan.drafts else None,
                tokens_per_second=spread(rates[name]),
                speedup=None
                if name == PLAIN
                else spread([a / b for a, b in zip(rates[name], rates[PLAIN], strict=True)]),
                step_seconds=statistics.median(steps) if decoder.ours else None,
                identical=compared(done, reference, gap, generator.dtype == jnp.float32),
                score=scores[texts],
                estimate=estimates.steps.get(plan.drafts) if plan is not None and quadratic else None,
                estimate_two_passes=estimates.passes.get(plan.drafts) if plan is not None and quadratic else None,
            )
        )
    return rows


def _batches(done: list[Completion], batch_size: int) -> list[list[Completion]]:
    """Completions that were decoded together have the same seconds."""
    if batch_size == 1:
        return [[completion] for completion in done]
    ordered = sorted(done, key=lambda c: (c.seconds, c.prefill_seconds))
    return [list(batch) for _, batch in groupby(ordered, key=lambda c: (c.seconds, c.prefill_seconds))]


def _rate(done: list[Completion], batch_size: int) -> float:
    """Tokens per second, prefill included, over all sequences."""
    batches = _batches(done, batch_size)
    return sum(len(c.token_ids) for c in done) / sum(b[0].seconds + b[0].prefill_seconds for b in batches)


def _step_seconds(done: list[Completion], batch_size: int) -> float:
    """Seconds of a decoding step; a batch goes on until its last sequence ends."""
    batches = _batches(done, batch_size)
    return sum(b[0].seconds for b in batches) / max(sum(max(c.steps for c in b) for b in batches), 1)


# ---- statistics


def interval(done: list[Completion], seed: int = 0) -> Interval:
    """Tokens per step and its 95% interval, from prompts drawn anew with replacement (percentile bootstrap)."""
    counts = np.array([(len(c.token_ids) - 1, c.steps) for c in done], float)
    drawn = counts[np.random.default_rng(seed).integers(len(counts), size=(_RESAMPLES, len(counts)))].sum(axis=1)
    low, high = np.percentile(drawn[:, 0] / np.maximum(drawn[:, 1], 1), [2.5, 97.5])
    return Interval(mean=tokens_per_step(done), low=float(low), high=float(high))


def spread(values: list[float]) -> Spread:
    """Median, lowest and highest."""
    return Spread(median=statistics.median(values), low=min(values), high=max(values))


def compared(done: list[Completion], reference: list[list[int]], gap: Gap, exact: bool) -> Identical:
    """Outputs beside those of plain decoding; with `exact`, differences are ties only below a gap of `TIE`."""
    ties, faults = [], []
    for number, (completion, plain) in enumerate(zip(done, reference, strict=True)):
        at = departure(completion.token_ids, plain)
        if at is None:
            continue
        between = gap([*completion.prompt_ids, *plain[:at]])
        line = f"prompt {number + 1}, new token {at + 1}: gap {between:.1e}"
        (ties if between < TIE or not exact else faults).append(line)
    return Identical(same=len(done) - len(ties) - len(faults), of=len(done), ties=ties, faults=faults)


def score(asked: Asked, done: list[Completion], generator: Generator, run_code: bool) -> float | None:
    """The share of right answers; None for a suite without a score, or one that needs `run_code`."""
    rule = asked.suite.score
    if rule is None or (rule.runs_code and not run_code):
        return None
    pairs = zip(done, asked.questions, strict=True)
    return statistics.mean(rule.right(generator.text(completion), question.record) for completion, question in pairs)


# ---- beside decoding


def estimated(base: Base, adapter: Adapter, prompts: list[list[int]], texts: list[list[int]]) -> Estimates:
    """What training would estimate on these completions.

    Args:
        texts: what plain decoding added to the prompts.
    """
    frozen: Params = {"params": base.load(jnp.dtype("float32"))}
    if adapter.shape.vocabulary is not None:
        frozen["vocabulary"] = adapter.arrays["vocabulary"]
    run = jax.jit(Estimator(Model(base.g), adapter.shape).accepted)
    width = -(-max(len(a) + len(b) for a, b in zip(prompts, texts, strict=True)) // _LENGTHS) * _LENGTHS
    accepted: list[Any] = []
    size = min(_ESTIMATED_TOGETHER, len(prompts))
    ids, start, length = [], [], []
    for a, b in zip(prompts, texts, strict=True):
        ids.append([*a, *b] + [0] * (width - len(a) - len(b)))
        start.append(len(a))
        length.append(len(a) + len(b))
    of: Any = Continuations(*map(np.asarray, (ids, start, length)))  # type: ignore[arg-type]
    with jax.default_matmul_precision("highest"):
        for at in range(0, len(ids), size):
            numbers = np.minimum(np.arange(at, at + size), len(ids) - 1)
            part = jax.tree.map(lambda x, numbers=numbers: x[numbers], of)
            accepted += list(np.asarray(run(adapter.arrays, frozen, part)))[: len(ids) - at]

    def along(path: Any) -> dict[int, float]:
        return {m: estimate_of(np.stack(accepted), of, m, path) for m in range(1, adapter.shape.masks + 1)}

    return Estimates(along(walk), along(walk_twice) if adapter.shape.noise else {})


def sample(asked: Asked, number: int, row: Row, found: Rounds, generator: Generator) -> Sample:
    """A completion of a decoder by the passes that wrote it."""
    done = [rounds[number] for rounds in found[row["decoder"]]]
    completion = done[0]
    stream = TextStream(generator.tokenizer, completion.prompt_ids, skip_special_tokens=True)
    pieces, step = [], 0
    pairs = zip(completion.token_ids, completion.emitted_by, strict=True)
    for step, run in groupby(pairs, key=lambda pair: pair[1]):
        pieces.append((stream([token for token, _ in run])[1], step))
    pieces.append((stream.finish()[1], step))
    plain = found[PLAIN][0][number]
    seconds = statistics.median(c.seconds + c.prefill_seconds for c in done)
    before = statistics.median(c[number].seconds + c[number].prefill_seconds for c in found[PLAIN])
    prompt = asked.questions[number].prompt
    return Sample(
        suite=asked.name,
        decoder=row["decoder"],
        prompt=prompt if isinstance(prompt, str) else _last_message(prompt),
        pieces=[(text, step) for text, step in pieces if text],
        tokens=len(completion.token_ids),
        steps=completion.steps,
        identical=completion.token_ids == plain.token_ids,
        speedup=before / seconds,
    )


def _last_message(prompt: Any) -> str:
    messages = prompt["messages"] if isinstance(prompt, dict) else prompt
    return str(messages[-1].get("content") or "")
