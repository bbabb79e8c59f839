"""The block plan with the most expected tokens per second on this machine, from a short calibration.

It measures the cost of a step by its number of rows, and acceptance by depth; from both follows what any plan gives.
The most promising ones are run, then the best of them with prompt lookup behind its masks, and lookup alone; the
fastest of all is taken. Costs are timed in turns with plain decoding, on as few prompts at a time as can be timed well;
plans that are run for the choice take one part of the prompts after the other, until each was decoded.
The choice is kept on disk per model, adapter, batch, device and build of the forward pass.
"""

import contextlib
import hashlib
import json
import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from mtp_jax.decoding.generator import Completion, Generator, tokens_per_step
from mtp_jax.decoding.plan import BlockPlan, linear, parse_plan, plain, quadratic
from mtp_jax.errors import UserError
from mtp_jax.files import cache_folder, read_json

CACHE = "~/.cache/mtp_jax/plans"
_DRAFTS = (1, 2, 3, 4, 6, 8)
_ROUNDS, _FINAL_TURNS = 3, 7
_ENOUGH = 0.5  # seconds of plain decoding that are timed at a time, at least
_COUNTED = 4  # masks of the quadratic plan that acceptance is first counted with
_HOPELESS = 0.8  # of the best plan's tokens per second: deeper quadratic plans are then left out
_FINALISTS = 3  # plans judged only by the cost model that are run before the choice
_LOOKUPS = (2, 4)  # drafts by prompt lookup that are tried behind the best plan


class Choice(NamedTuple):
    """A plan, and what was measured."""

    plan: BlockPlan
    one_head: bool  # base head over all rows in one product
    expected: dict[str, float]  # tokens per second and sequence of the plans that were run

    def __str__(self) -> str:
        shown = sorted(self.expected.items(), key=lambda item: -item[1])[:5]
        head = ", one product for the base head" if self.one_head else ""
        return f"auto: {self.plan}{head} (expected tokens/s: {', '.join(f'{name} {rate:.0f}' for name, rate in shown)})"


def survival(completions: list[Completion]) -> np.ndarray:
    """Probability that the drafts up to depth 1, 2, ... are all accepted; full limits and stop ids cut some short."""
    histogram = np.sum([completion.accepted for completion in completions], axis=0)
    return np.cumsum(histogram[::-1])[::-1][1:] / max(histogram.sum(), 1)


def expected_tokens(plan: BlockPlan, survives: np.ndarray) -> float:
    """Tokens per step in the long run: the stationary mean of the chain over the number of valid drafts.

    Args:
        survives: probability that the drafts up to depth 1, 2, ... are all accepted, at least as deep as the plan.
    """
    d = plan.drafts
    reach = np.concatenate([[1.0], survives[:d], [0.0]])
    move, gain = np.zeros((d + 1, d + 1)), np.zeros(d + 1)
    for valid in range(d + 1):
        for accepted in range(valid + 1):
            chance = reach[accepted] - (reach[accepted + 1] if accepted < valid else 0.0)
            unused = plan.floating and accepted < valid  # the floating block stood behind a draft that fell
            move[valid, 0 if unused else plan.floating or plan.masks[accepted]] += chance
            gain[valid] += chance * (accepted + 1)
    share = np.full(d + 1, 1 / (d + 1))
    for _ in range(200):  # averaged over two steps, as the linear plan's chain may be periodic
        share = 0.5 * (share + share @ move)
    return float(share @ gain)


def candidates(masks: int) -> list[BlockPlan]:
    """Plans beside the quadratic ones that may be best: a floating block, and fewer masks behind later rows."""
    plans = [linear(d) for d in _DRAFTS if d <= masks]
    for d in (d for d in _DRAFTS if d <= masks):
        plans += [BlockPlan((d,) * (d + 1 - k) + (0,) * k) for k in range(1, d + 1)]
        for least in range(1, d):
            plans.append(BlockPlan((d, *(max(least, d - g) for g in range(1, d + 1)))))
            plans.append(BlockPlan((d, *([least] * d))))
    return list(dict.fromkeys(plans))


def choose_plan(
    generator: Generator, prompts: list[list[int]], batch_size: int, new_tokens: int = 64, cache: str | None = CACHE
) -> Choice:
    """Measure on `prompts` and choose.

    The base head runs over real rows and then over one block, or over all rows at once, whichever takes less time.

    Args:
        cache: folder of earlier choices; None to measure again and keep nothing.
    """
    assert generator.shape is not None
    folder = None if cache is None else cache_folder(cache)
    kept = None if folder is None else folder / f"{_identity(generator, batch_size)}.json"
    if kept is not None and kept.is_file():
        with contextlib.suppress(UserError, KeyError):  # measured again where it is damaged
            stored = read_json(kept)
            return Choice(parse_plan(stored["plan"]), stored["one_head"], stored["expected"])
    prompts = prompts[: max(8, batch_size)]
    prompts = (prompts * batch_size)[: -(-len(prompts) // batch_size) * batch_size]  # whole batches
    parts, head = [prompts[:batch_size]], False

    def run(plan: BlockPlan, one_head: bool | None = None, on: list[list[int]] | None = None) -> list[Completion]:
        options = {"plan": plan, "one_head": head if one_head is None else one_head}
        return generator.using(**options).complete(parts[0] if on is None else on, new_tokens, batch_size)

    def cost(done: list[Completion]) -> float:
        """Seconds of a step: a batch goes on until its last sequence ends."""
        batches = [done[at : at + batch_size] for at in range(0, len(done), batch_size)]
        return sum(batch[0].seconds for batch in batches) / max(sum(max(c.steps for c in b) for b in batches), 1)

    seconds: dict[BlockPlan, float] = {}

    def measure(plans: list[BlockPlan], turns: list[list[list[int]]]) -> list[dict[BlockPlan, list[Completion]]]:
        """As multiples of what plain decoding took in the same turn: machines slow down and speed up by the minute."""
        together = [plain(), *(plan for plan in plans if plan != plain())]
        for plan in together:
            if plan not in seconds:
                run(plan)  # compiles
        done = [{plan: run(plan, on=turn) for plan in together} for turn in turns]
        taken = [{plan: cost(completions) for plan, completions in turn.items()} for turn in done]
        seconds.setdefault(plain(), statistics.median(turn[plain()] for turn in taken))
        for plan in together[1:]:
            seconds[plan] = statistics.median(turn[plan] / turn[plain()] for turn in taken) * seconds[plain()]
        return done

    def rate(plan: BlockPlan, step: float) -> float:
        return expected_tokens(plan, survives) / step

    run(plain())  # compiles
    size = batch_size * math.ceil(_ENOUGH / max(run(plain())[0].seconds, 1e-6))
    parts = [prompts[at : at + size] for at in range(0, len(prompts), size)]
    head = _one_head_is_faster(lambda one_head: cost(run(quadratic(1), one_head)))
    survives = survival(run(quadratic(min(_COUNTED, generator.shape.masks)), on=prompts))
    for d in (d for d in _DRAFTS if d <= generator.shape.masks):
        if d > len(survives):
            survives = survival(run(quadratic(d), on=prompts))
        measure([quadratic(d)], parts[:1] * _ROUNDS)
        best = max(rate(plan, step) for plan, step in seconds.items())
        if rate(quadratic(d), seconds[quadratic(d)]) < _HOPELESS * best:
            break
    rows, steps = zip(*sorted((plan.rows, step) for plan, step in seconds.items()), strict=True)
    predicted = {
        plan: rate(plan, float(np.interp(plan.rows, np.asarray(rows), np.asarray(steps))))
        for plan in candidates(generator.shape.masks)
        if plan.drafts <= len(survives)
    }
    ranked = sorted(predicted, key=lambda plan: -predicted[plan])[:_FINALISTS]
    leaders = sorted(seconds, key=lambda plan: -rate(plan, seconds[plan]))[:2]
    finalists = list(dict.fromkeys([*ranked, *leaders]))
    rates: dict[BlockPlan, float] = {plan: rate(plan, step) for plan, step in seconds.items()}

    def judge(plans: list[BlockPlan]) -> None:
        done = measure(plans, parts * math.ceil(_FINAL_TURNS / len(parts)))[: len(parts)]
        for plan in plans:
            rates[plan] = tokens_per_step([completion for turn in done for completion in turn[plan]]) / seconds[plan]

    def best_of(plans: list[BlockPlan]) -> BlockPlan:
        return max(plans, key=lambda plan: rates[plan])

    judge(finalists)
    blocks = best_of([plan for plan in rates if plan.block and not plan.floating])  # drafts whatever is accepted
    judge([*(blocks.with_lookup(d) for d in _LOOKUPS), plain().with_lookup(_LOOKUPS[0])])
    chosen = best_of(list(rates))
    expected = {str(plan): of for plan, of in rates.items()}
    if chosen.mask_rows:
        head = _one_head_is_faster(lambda one_head: cost(run(chosen, one_head)))
    if kept is not None:
        part = kept.with_suffix(".part")
        part.write_text(json.dumps({"plan": str(chosen), "one_head": head, "expected": expected}))
        part.rename(kept)
    return Choice(chosen, head, expected)


def _one_head_is_faster(seconds: Callable[[bool], float]) -> bool:
    shares = []
    for turn in range(_ROUNDS + 1):
        step = {one_head: seconds(one_head) for one_head in (False, True)}
        if turn:  # the first one compiles
            shares.append(step[True] / step[False])
    return statistics.median(shares) < 1


def _identity(generator: Generator, batch_size: int) -> str:
    device = jax.devices()[0]
    of: list[Any] = [generator.identity, batch_size, device.device_kind, jax.device_count(), str(generator.dtype)]
    of += [generator.options.shortlist, jax.__version__, generator.forward.build, _LOOKUPS]
    of += [str(processors)] if (processors := generator.settings.processors) else []
    return hashlib.sha256(json.dumps(of).encode()).hexdigest()[:24]
