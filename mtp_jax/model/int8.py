"""Matrices as whole numbers of 8 bits: symmetric, with a scale for each output channel."""

import numpy as np
from jaxtyping import Float, Int8


def quantise(matrix: Float[np.ndarray, "in out"]) -> tuple[Int8[np.ndarray, "in out"], Float[np.ndarray, " out"]]:
    """Whole numbers from -127 to 127, and what each column of them is to be multiplied by.

    A column's largest number in size is taken for 127.5, so that the last step is as wide as the others, as in qwix. A
    column of zeros has the scale 1.
    """
    scale = np.abs(matrix).max(axis=0) / np.float32(127.5)
    scale = np.where(scale > 0, scale, 1).astype(np.float32)
    return np.clip(np.rint(matrix / scale), -127, 127).astype(np.int8), scale
