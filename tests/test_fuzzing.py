"""A few damaged inputs of every kind; `python tests/fuzzing.py` runs hundreds."""

import os
from pathlib import Path

import pytest
from fuzzing import KINDS, Ground, fuzz

# Of a library that draws random numbers for itself while a case is made.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    before = Path.cwd()
    yield Ground(tmp_path_factory.mktemp("ground"))
    os.chdir(before)


@pytest.mark.parametrize("kind", KINDS)
def test_commands_end_in_good_order(ground, kind):
    counts = fuzz(kind, 8, 1, ground)
    assert sum(counts.values()) == 8 and counts[2]
