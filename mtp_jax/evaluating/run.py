"""A whole evaluation on suites: open, check, decode in turns, write the report after each suite."""

import functools
import importlib.metadata
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import Progress

from mtp_jax.api import generator as generator_of
from mtp_jax.decoding.generator import Generator
from mtp_jax.decoding.options import Options
from mtp_jax.errors import UserError
from mtp_jax.evaluating.decoders import AUTO, AUTO_PROMPTS, PLAIN, Decoders, parse_names
from mtp_jax.evaluating.measure import Estimates, decode_in_turns, estimated, rows_of, sample
from mtp_jax.evaluating.report import write_report
from mtp_jax.evaluating.results import Results, Row
from mtp_jax.evaluating.results import Suite as SuiteResult
from mtp_jax.evaluating.suites import Asked, Question, find_suites
from mtp_jax.evaluating.ties import Gaps
from mtp_jax.files import expanded
from mtp_jax.model.base import open_base
from mtp_jax.mtp.adapter_folder import open_adapter

_SAMPLES = 2  # completions of each suite that the report shows


@dataclass(frozen=True)
class Wanted:
    """What an evaluation is asked for."""

    model: str
    adapter: str | None
    draft_model: str | None
    suites: Sequence[str]  # NAME, NAME=FILE or FILE
    plans: str
    out: str
    count: int | None  # questions of each suite; None for all
    new_tokens: int
    batch_sizes: Sequence[int]
    rounds: int
    seed: int
    dtype: str
    weights: str
    activations: str
    shortlist: int | None
    run_code: bool
    estimate: bool


def evaluate(wanted: Wanted) -> Results:
    """Decode the suites, write the report into `wanted.out`, and return what it holds.

    Raises:
        UserError: anything of `wanted` that cannot be, before the first weight is read.
    """
    names, out = parse_names(wanted.plans), expanded(wanted.out)
    _check_folder(out)
    base = open_base(wanted.model, weights=wanted.weights)
    adapter = None if wanted.adapter is None else open_adapter(wanted.adapter, base)
    if adapter is not None and not adapter.shape.gated:
        raise UserError(f"{wanted.adapter}: was trained without gate (lora.gated: false) and cannot decode losslessly.")
    draft = None if wanted.draft_model is None else open_base(wanted.draft_model)
    asked = find_suites(wanted.suites, wanted.count, wanted.seed)
    parts = None if adapter is None else (adapter.shape, adapter.arrays)
    options, dtype = Options(shortlist=wanted.shortlist), jnp.dtype(wanted.dtype)
    generator = generator_of(base, options, dtype, parts, activations=wanted.activations)
    decoders = Decoders(names, generator, base, draft, wanted.new_tokens)
    prompts = {suite.name: _encoded(suite.questions, suite.name, generator) for suite in asked}
    calibrating = AUTO_PROMPTS if AUTO in names else 0
    apart = {s.name: _encoded(s.others[:calibrating], f"{s.name}, calibration", generator) for s in asked}
    results = Results(
        format=1,
        model=wanted.model,
        adapter=wanted.adapter,
        draft_model=wanted.draft_model,
        weights=base.weights + (", activations int8" if wanted.activations == "int8" else ""),
        dtype=wanted.dtype,
        device=jax.devices()[0].device_kind,
        masks=None if adapter is None else adapter.shape.masks,
        versions={name: importlib.metadata.version(name) for name in ("mtp_jax", "jax", "transformers")},
        command=" ".join(["python -m mtp_jax.evaluate", *sys.argv[1:]]),
        settings={
            "new_tokens": wanted.new_tokens,
            "rounds": wanted.rounds,
            "prompts": wanted.count,
            "seed": wanted.seed,
            "batch_sizes": list(wanted.batch_sizes),
            "shortlist": wanted.shortlist,
            "sampling": None,
        },
        suites=[],
        rows=[],
        samples=[],
    )
    gap = Gaps(base)
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        for suite in asked:
            results["suites"].append(_described(suite))
            encoded, reference, estimates = prompts[suite.name], None, Estimates({}, {})
            calibration = apart[suite.name] or encoded[:AUTO_PROMPTS]
            for size in wanted.batch_sizes:
                chosen = decoders.at(size, calibration)
                bar = progress.add_task(f"{suite.name} x{size}", total=len(chosen) * wanted.rounds)
                advance = functools.partial(progress.advance, bar)
                found = decode_in_turns(chosen, encoded, size, wanted.rounds, advance)
                if reference is None:
                    single = found[PLAIN][0] if size == 1 else decoders.named(PLAIN, 1, []).run(encoded)
                    reference = [completion.token_ids for completion in single]
                    if wanted.estimate and adapter is not None:
                        estimates = estimated(base, adapter, encoded, reference)
                rows = rows_of(
                    suite,
                    chosen,
                    found,
                    size,
                    generator,
                    reference,
                    gap,
                    estimates,
                    run_code=wanted.run_code,
                    calibrated_apart=bool(apart[suite.name]),
                )
                results["rows"] += rows
                if shown := _most_tokens(rows):
                    numbers = range(min(_SAMPLES, len(encoded))) if size == wanted.batch_sizes[0] else ()
                    results["samples"] += [sample(suite, number, shown, found, generator) for number in numbers]
                progress.remove_task(bar)
            write_report(results, out)
    return results


def _check_folder(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: is there already and not empty; name a new folder.")


def _encoded(questions: list[Question], where: str, generator: Generator) -> list[list[int]]:
    return [generator.encode(q.prompt, f"{where}, question {i + 1}") for i, q in enumerate(questions)]


def _described(asked: Asked) -> SuiteResult:
    suite = asked.suite
    return SuiteResult(
        name=asked.name,
        title=suite.title,
        domain=suite.domain,
        prompts=len(asked.questions),
        source=asked.source,
        metric=suite.metric,
    )


def _most_tokens(rows: list[Row]) -> Row | None:
    """The decoder with drafts of the most tokens per step."""
    counted = [
        (of["mean"], i) for i, row in enumerate(rows) if (of := row["tokens_per_step"]) and row["decoder"] != PLAIN
    ]
    return rows[max(counted)[1]] if counted else None
