"""Topologies are named rightly or refused in one line."""

import importlib.util

import pytest

from mtp_jax.errors import UserError
from mtp_jax.fitting.chips import parse_topology, topology_devices

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v9:2x2", "unknown chip 'v9'; known are v4, v5e, v5p, v6e"),
        ("v5e", "v5e has 2 axes; the form is v5e:2x2"),
        ("v5e:2x2x2", "v5e has 2 axes"),
        ("v5p:4x4", "v5p has 3 axes; the form is v5p:2x2x2"),
        ("v5e:0x4", "v5e has 2 axes"),
    ],
)
def test_a_wrong_topology_is_refused(name, says):
    with pytest.raises(UserError, match="--topology") as error:
        parse_topology(name)
    assert says in error.value.faults[0]


def test_without_the_compiler_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'mtp_jax\[preflight\]'"):
        topology_devices("v5e:2x2")
