"""Arithmetic that a training step needs by its definition: what a share of a chip's peak is measured by.

Rows that are computed twice to save memory count once, and norms, softmax and other work that is no product not at all.
"""

import re
from math import prod
from typing import Any

from mtp_jax.model.geometry import Geometry
from mtp_jax.mtp.adapter import adapter_table
from mtp_jax.mtp.losses import MultiTokenLoss
from mtp_jax.training.objectives import NextToken

# Peak bfloat16 arithmetic without sparsity in a second, by the vendors' data sheets, by words of the device's name; of
# several that are in a name, the first counts.
PEAK = {"TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5p": 459e12, "TPU v5": 459e12, "TPU v6 lite": 918e12}
PEAK |= {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "A10G": 70e12, "L4": 121e12}


def peak_flops(device: Any) -> float | None:
    """Peak bfloat16 arithmetic of a device in a second; None where it is not known."""
    return next((flops for name, flops in PEAK.items() if re.search(rf"\b{name}\b", device.device_kind)), None)


def model_flops(
    objective: NextToken | MultiTokenLoss, sequences: int, length: int, anchors: int | None = None
) -> float:
    """Floating-point operations of one step, forward and backward; a multiplication with an addition counts as two.

    Args:
        sequences: B of a batch.
        length: T of a sequence.
        anchors: G blocks of a sequence; None where the objective is the next token.
    """
    g = objective.model.g
    rows = sequences * length
    layers, scores = 2 * _layer_weights(g) * g.L, 2 * g.N * g.H * length * g.L  # forward; half of all keys are seen
    if isinstance(objective, NextToken):
        return 3.0 * rows * (layers + scores + 2 * g.D * g.V)
    assert anchors is not None
    shape, terms = objective.shape, objective.terms
    masks = sequences * anchors * objective.masks_now
    trained = adapter_table(g, shape)
    lora = sum(prod(weight.shape) for weight in trained if weight.path[0] == "lora")
    sampler = 6 * sum(prod(weight.shape) for weight in trained if "sampler" in weight.path)
    sampler -= 2 * g.D * g.D if sampler else 0  # what it reads of the token before is frozen too
    # The base is frozen: its products have a gradient in the rows alone, and real rows need none under the gate.
    real = rows * (layers + scores + 2 * g.D * g.V)
    if not shape.gated:
        real += rows * (layers + 6 * lora + scores)
    heads = bool(terms.base_weight or shape.sampler == "none") + (shape.sampler != "none")
    U = g.V if shape.vocabulary is None else shape.vocabulary
    head = 2 * g.D * U * (2 * heads + (terms.target in ("base_soft", "total_variation")))
    return float(real + masks * (2 * layers + 6 * lora + 2 * scores + sampler + head))


def _layer_weights(g: Geometry) -> int:
    """Weights of a layer's matrices that a row meets."""
    attention = g.D * (g.N + 2 * g.K) * g.H + g.N * g.H * g.D
    if g.experts:
        return attention + g.D * g.experts.total + 3 * g.D * g.F * g.experts.chosen
    return attention + 3 * g.D * g.F
