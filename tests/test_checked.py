"""The import hook of conftest.py checks annotations of arrays at every call, so these calls fail."""

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from mtp_jax.model.rope import Rope, angles, rotate
from mtp_jax.mtp.blocks import blocks_of

ROPE = Rope((1.0, 0.1))
ROWS = jnp.zeros((1, 4), jnp.int32)


def test_what_annotations_say_is_accepted():
    assert blocks_of(ROWS[:, :2], ROWS, ROWS).segments.shape == (1, 2)
    assert angles(ROPE, ROWS)[0].shape == (1, 4, 1, 2)


@pytest.mark.parametrize(
    "call",
    [
        lambda: blocks_of(ROWS[0], ROWS, ROWS),
        lambda: blocks_of(ROWS, ROWS, ROWS[:, :3]),
        lambda: blocks_of(ROWS, ROWS, np.zeros((1, 4), np.int32)),
        lambda: angles(ROPE, ROWS.astype(jnp.float32)),
        lambda: rotate(jnp.ones((1, 4, 2, 4)), *angles(ROPE, ROWS[:, :3])),
        lambda: Rope((1.0, "0.1")),
    ],
    ids=["rank", "unequal axes", "numpy", "dtype", "unequal leading axes", "a field of a dataclass"],
)
def test_what_they_do_not_say_is_refused(call):
    with pytest.raises(TypeCheckError):
        call()
