"""Block plans: what their names mean, their rows, and which are refused."""

import numpy as np
import pytest

from mtp_jax.decoding.plan import BlockPlan, linear, parse_plan, plain, quadratic
from mtp_jax.errors import UserError

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("name", "plan", "drafts", "block", "rows"),
    [
        ("none", plain(), 0, 0, 1),
        ("linear:3", linear(3), 3, 3, 7),
        ("quadratic:3", quadratic(3), 3, 3, 16),
        ("blocks:3,2,1,1", BlockPlan((3, 2, 1, 1)), 3, 3, 11),
        ("blocks:1,0", BlockPlan((1, 0)), 1, 1, 3),
        ("lookup:3", BlockPlan((0, 0, 0, 0), lookup=3), 3, 0, 4),
        ("linear:2+lookup:1", BlockPlan((0, 0, 0, 0), 2, 1), 3, 2, 6),
        ("quadratic:1+lookup:3", BlockPlan((1, 1, 0, 0, 0), lookup=3), 4, 1, 7),
        ("blocks:2,1,0+lookup:1", BlockPlan((2, 1, 0, 0), lookup=1), 3, 2, 7),
    ],
)
def test_names_and_rows(name, plan, drafts, block, rows):
    assert parse_plan(name) == plan and str(plan) == name
    assert (plan.drafts, plan.block, plan.rows) == (drafts, block, rows)


def test_mask_rows_stand_behind_their_real_row():
    behind, offsets = parse_plan("blocks:2,0,1").blocks()
    assert behind.tolist() == [0, 0, 2] and offsets.tolist() == [1, 2, 1]
    behind, offsets = linear(2).blocks()
    assert behind.tolist() == [-1, -1] and offsets.tolist() == [1, 2]
    behind, offsets = quadratic(8).blocks()
    assert np.bincount(behind).tolist() == [8] * 9 and offsets.max() == 8


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cubic:3", "unknown plan; give none, linear:M"),
        ("", "unknown plan"),
        ("linear", "unknown plan"),
        ("linear:x", "unknown plan"),
        ("quadratic:2,2", "unknown plan"),
        ("quadratic:0", "at least 1 mask"),
        ("blocks:", "unknown plan"),
        ("blocks:3", "no drafts"),
        ("blocks:0,2,2", "never draft again after a rejection"),
        ("blocks:2,-1,1", "at least 0"),
        ("blocks:1,1,1", "verifies 2 drafts, but its longest block gives 1"),
        ("lookup", "unknown plan"),
        ("lookup:x", "unknown plan"),
        ("lookup:1,2", "unknown plan"),
        ("lookup:0", "prompt lookup should give at least 1 draft"),
        ("quadratic:1+", "unknown plan"),
        ("quadratic:1+lookup", "unknown plan"),
        ("quadratic:1+linear:1", "unknown plan"),
        ("quadratic:1+lookup:1+lookup:1", "unknown plan"),
        ("none+lookup:1", "unknown plan"),
        ("lookup:1+lookup:1", "unknown plan"),
        ("cubic:1+lookup:2", "unknown plan"),
        ("quadratic:1+lookup:0", "prompt lookup should give at least 1 draft"),
        ("blocks:3,1", "verifies 1 drafts, but its longest block gives 3"),
    ],
)
def test_plans_that_do_not_do_are_refused(name, says):
    with pytest.raises(UserError, match=says):
        parse_plan(name)


def test_blocks_stand_behind_rows_or_float():
    with pytest.raises(ValueError, match="not both"):
        BlockPlan((1, 1), floating=1)
