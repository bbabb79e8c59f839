"""The automatic plan: expected tokens against a simulated chain, and the choice from given costs."""

import random
from types import SimpleNamespace

import numpy as np
import pytest

from mtp_jax.decoding import auto
from mtp_jax.decoding.auto import candidates, choose_plan, expected_tokens, survival
from mtp_jax.decoding.generator import Completion, Generator
from mtp_jax.decoding.options import Options
from mtp_jax.decoding.plan import BlockPlan, linear, parse_plan, plain, quadratic
from mtp_jax.decoding.processors import NO_SETTINGS

pytestmark = pytest.mark.quick

SURVIVES = np.array([0.7, 0.45, 0.3, 0.2])


def simulated(plan, survives, steps=200_000):
    """Mean tokens per step of decoding whose drafts up to depth i are right with probability survives[i - 1]."""
    draw, valid, tokens = random.Random(1), plan.floating or plan.masks[0], 0
    for _ in range(steps):
        luck = draw.random()
        accepted = sum(luck < chance for chance in survives[:valid])
        tokens += accepted + 1
        floated = plan.floating if accepted == valid else 0
        valid = floated if plan.floating else plan.masks[accepted]
    return tokens / steps


@pytest.mark.parametrize("name", ["none", "quadratic:1", "quadratic:4", "linear:1", "linear:3", "blocks:3,1,0,2"])
def test_expected_tokens_are_those_of_a_simulated_chain(name):
    plan = parse_plan(name)
    assert abs(expected_tokens(plan, SURVIVES) - simulated(plan, SURVIVES)) < 0.01


def test_survival_counts_prefixes():
    done = [Completion([], [], 4, [1, 1, 2], 0.0, 0.0), Completion([], [], 4, [3, 1, 0], 0.0, 0.0)]
    assert survival(done).tolist() == [0.5, 0.25]


def test_candidates_fit_the_adapter():
    for masks in (1, 3, 8):
        plans = candidates(masks)
        assert len(set(plans)) == len(plans) and linear(1) in plans
        for plan in plans:
            assert plan.block <= masks and parse_plan(str(plan)) == plan


class Machine(Generator):
    """Stands in for a generator: a step of r rows takes `cost(r)` seconds, drafts of masks are right as SURVIVES says.

    Each draft by prompt lookup adds `found` tokens to a step.
    """

    dtype, identity, options, settings = "float32", "machine", Options(), NO_SETTINGS

    def __init__(self, cost, masks=4, one_head_is_faster=True, found=0.0):
        self.cost, self.runs, self.one_head_is_faster, self.found = cost, 0, one_head_is_faster, found
        self.shape = SimpleNamespace(masks=masks)
        self.forward = SimpleNamespace(build="one")
        self.decoded = {}

    def using(self, plan, one_head):
        def complete(prompts, new_tokens, batch_size):
            self.runs += 1
            self.one_head = one_head
            self.decoded.setdefault(plan, []).extend(map(tuple, prompts))
            return self.complete(plan, prompts)

        return SimpleNamespace(complete=complete)

    def complete(self, plan, prompts):
        of_masks = BlockPlan(plan.masks[: len(plan.masks) - plan.lookup], plan.floating)
        reach = np.concatenate([[1.0], SURVIVES[: of_masks.drafts], [0.0]])
        histogram = np.round(100_000 * (reach[:-1] - reach[1:])).astype(int).tolist()
        tokens = [0] * (1 + round(100 * (expected_tokens(of_masks, SURVIVES) + self.found * plan.lookup)))
        seconds = self.cost(plan.rows) * (100 - (self.one_head == self.one_head_is_faster))
        return [Completion(tokens, [], 100, histogram, 0.0, seconds) for _ in prompts]


@pytest.mark.parametrize(
    ("cost", "best"),
    [
        (lambda rows: 1.0, quadratic(4)),  # bound by reading weights
        (lambda rows: float(rows), plain()),  # every row is paid for
        (lambda rows: 1.0 if rows <= 4 else rows / 2, quadratic(1)),
    ],
)
def test_the_plan_with_the_most_tokens_per_second_is_taken(cost, best, tmp_path):
    machine = Machine(cost)
    choice = choose_plan(machine, [[1]] * 4, 1, cache=None)
    assert choice.plan == best
    assert choice.expected[str(best)] == max(choice.expected.values())
    rate = expected_tokens(best, SURVIVES) / cost(best.rows)
    assert abs(choice.expected[str(best)] / rate - 1) < 0.02
    assert "auto: " in str(choice)


@pytest.mark.parametrize(
    ("cost", "best"),
    [
        (lambda rows: 1.0, "quadratic:4+lookup:4"),
        (lambda rows: 1.0 + rows / 8, "quadratic:1+lookup:4"),
        (lambda rows: 1.0 if rows <= 3 else float(rows), "lookup:2"),
        (lambda rows: float(rows), "none"),
    ],
)
def test_prompt_lookup_is_taken_where_it_pays(cost, best):
    choice = choose_plan(Machine(cost, found=0.3), [[1]] * 4, 1, cache=None)
    assert str(choice.plan) == best and parse_plan(best) == choice.plan


@pytest.mark.parametrize("seconds", [1e-3, 1.0])  # of a step: all prompts are timed at a time, or one
def test_plans_that_are_compared_decode_every_prompt(seconds):
    machine, prompts = Machine(lambda rows: seconds, found=0.3), [[n] for n in range(8)]
    choice = choose_plan(machine, prompts, 1, cache=None)
    compared = {parse_plan(name) for name in choice.expected} - set(map(quadratic, range(1, 4)))  # some were only timed
    assert choice.plan in compared and len(compared) > 3
    for plan in compared:
        assert set(machine.decoded[plan]) == set(map(tuple, prompts))


@pytest.mark.parametrize("faster", [False, True])
def test_one_product_for_the_base_head_is_taken_where_it_is_faster(faster):
    machine = Machine(lambda rows: 1.0, one_head_is_faster=faster)
    assert choose_plan(machine, [[1]] * 4, 1, cache=None).one_head == faster


def test_a_choice_is_kept_per_machine_and_batch(tmp_path):
    machine = Machine(lambda rows: 1.0)
    first = choose_plan(machine, [[1]] * 4, 1, cache=str(tmp_path))
    runs = machine.runs
    assert choose_plan(machine, [[1]] * 4, 1, cache=str(tmp_path)) == first and machine.runs == runs
    choose_plan(machine, [[1]] * 4, 2, cache=str(tmp_path))
    assert machine.runs > runs
    machine.identity = "another"
    runs = machine.runs
    choose_plan(machine, [[1]] * 4, 1, cache=str(tmp_path))
    assert machine.runs > runs and len(list(tmp_path.glob("*.json"))) == 3
    machine.forward.build = "another"
    runs = machine.runs
    choose_plan(machine, [[1]] * 4, 1, cache=str(tmp_path))
    assert machine.runs > runs
    assert auto.CACHE.startswith("~")
