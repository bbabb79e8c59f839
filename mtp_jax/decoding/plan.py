"""Block plans: the drafts a step verifies and the masks behind each of its rows (docs/how-it-works.md, section 7.2).

The real rows of a step are the newest verified token and the drafts behind it. Each may have a block of masks of its
own, whose outputs are the next drafts if that row is the last accepted one (quadratic decoding). Or one block floats:
it stands behind the last valid draft, and is of use only where every draft was accepted (linear decoding). Behind the
masks' drafts there may be some that prompt lookup finds (`decoding/lookup.py`), for a real row each.
"""

from dataclasses import dataclass

import numpy as np

from mtp_jax.errors import UserError

_FORMS = (
    "none, linear:M, quadratic:M, blocks:M0,M1,... (masks behind each real row), lookup:L, one of masks and "
    "behind it +lookup:L, or auto"
)


@dataclass(frozen=True)
class BlockPlan:
    """A static description of a decoding step. Hashable, so that it can be a static argument."""

    masks: tuple[int, ...]  # behind each real row; there is one real row more than there are drafts
    floating: int = 0  # masks of the block behind the last valid draft
    lookup: int = 0  # of the real rows, so many are there for what prompt lookup finds

    def __post_init__(self) -> None:
        if self.floating and any(self.masks):
            raise ValueError("a plan has blocks behind its real rows, or one that floats, not both")

    @property
    def drafts(self) -> int:
        """How many drafts a step verifies."""
        return len(self.masks) - 1

    @property
    def block(self) -> int:
        """Masks of the longest block."""
        return max(*self.masks, self.floating)

    @property
    def mask_rows(self) -> int:
        """Mask rows of a step."""
        return sum(self.masks) + self.floating

    @property
    def rows(self) -> int:
        """All rows of a step."""
        return len(self.masks) + self.mask_rows

    def with_lookup(self, d: int) -> "BlockPlan":
        """The plan with d drafts more, which prompt lookup finds; no masks stand behind them."""
        return BlockPlan((*self.masks, *(0,) * d), self.floating, self.lookup + d)

    def blocks(self) -> tuple[np.ndarray, np.ndarray]:
        """For each mask row, the real row it stands behind (-1: the last valid draft) and its number in the block."""
        anchors = [np.full(count, row) for row, count in enumerate(self.masks)] + [np.full(self.floating, -1)]
        offsets = [np.arange(1, count + 1) for count in (*self.masks, self.floating)]
        return np.concatenate(anchors).astype(np.int32), np.concatenate(offsets).astype(np.int32)

    def __str__(self) -> str:
        if self.lookup:
            of_masks = BlockPlan(self.masks[: -self.lookup], self.floating)
            return f"{of_masks}+lookup:{self.lookup}" if of_masks.drafts else f"lookup:{self.lookup}"
        M = self.drafts
        if self.rows == 1:
            return "none"
        if self.floating:
            return f"linear:{M}"
        if set(self.masks) == {M}:
            return f"quadratic:{M}"
        return f"blocks:{','.join(map(str, self.masks))}"


def plain() -> BlockPlan:
    """Autoregressive decoding: no drafts."""
    return BlockPlan((0,))


def linear(M: int) -> BlockPlan:
    """M drafts, and one floating block of M masks [paper]."""
    return BlockPlan((0,) * (M + 1), M)


def quadratic(M: int) -> BlockPlan:
    """M drafts, and M masks behind every real row: (M + 1)^2 rows [paper]."""
    return BlockPlan((M,) * (M + 1))


def unmasked(d: int) -> BlockPlan:
    """d drafts that no mask gives, but a drafter (`decoding/drafters.py`)."""
    return BlockPlan((0,) * (d + 1))


def parse_plan(text: str) -> BlockPlan:
    """A plan from its name; `auto` is none, it chooses one (`decoding/auto.py`).

    Raises:
        UserError: an unknown plan, or one that could never draft again after a rejection.
    """
    if text == "none":
        return plain()
    name, plus, behind = text.partition("+")
    kind, numbers = _parts(name)
    if plus or kind == "lookup":
        word, counts = _parts(behind) if plus else (kind, numbers)
        if word != "lookup" or len(counts) != 1 or (plus and kind in ("lookup", "none")):
            raise UserError(f"--plan {text}: unknown plan; give {_FORMS}.")
        if counts[0] < 1:
            raise UserError(f"--plan {text}: prompt lookup should give at least 1 draft.")
        return (parse_plan(name) if plus else plain()).with_lookup(counts[0])
    if kind in ("linear", "quadratic") and len(numbers) == 1:
        if numbers[0] < 1:
            raise UserError(f"--plan {text}: should have at least 1 mask; none is plain decoding.")
        return linear(numbers[0]) if kind == "linear" else quadratic(numbers[0])
    if kind != "blocks" or not numbers:
        raise UserError(f"--plan {text}: unknown plan; give {_FORMS}.")
    if min(numbers) < 0:
        raise UserError(f"--plan {text}: numbers of masks should be at least 0.")
    if len(numbers) == 1:
        raise UserError(f"--plan {text}: has no drafts to verify; give the masks behind each of two real rows or more.")
    if numbers[0] == 0:
        raise UserError(
            f"--plan {text}: could never draft again after a rejection, as no masks stand behind the first row."
        )
    if max(numbers) != len(numbers) - 1:
        raise UserError(
            f"--plan {text}: verifies {len(numbers) - 1} drafts, but its longest block gives {max(numbers)}; "
            "they should be equal."
        )
    return BlockPlan(tuple(numbers))


def _parts(name: str) -> tuple[str, list[int]]:
    """The word of a name such as blocks:2,1,0, and its numbers; none where one of them is no number."""
    kind, _, rest = name.partition(":")
    try:
        return kind, [int(part) for part in rest.split(",")]
    except ValueError:
        return kind, []
