"""What may be chosen about decoding: the options a generator holds, and how tokens are sampled."""

from dataclasses import dataclass, field, replace
from typing import Any

from mtp_jax.decoding.drafters import Drafter
from mtp_jax.decoding.plan import BlockPlan, plain, unmasked
from mtp_jax.decoding.sampling import SamplingKind
from mtp_jax.errors import UserError


@dataclass(frozen=True)
class Options:
    """How a generator drafts and verifies; none of it changes the output. Hashable: programs are compiled for it."""

    plan: BlockPlan = field(default_factory=plain)
    shortlist: int | None = 256  # candidates of each mask row that the sampler head scores; None for all tokens
    # Base head over all rows in one product, instead of real rows and then one block; drafts are the same.
    one_head: bool = False
    drafter: Drafter | None = None  # finds drafts in place of the masks; the plan is then `unmasked`

    def __post_init__(self) -> None:
        if self.drafter is not None and self.plan != unmasked(self.drafter.drafts):
            raise ValueError(f"a drafter of {self.drafter.drafts} drafts takes a plan of as many and without masks")

    def using(self, **changes: Any) -> "Options":
        """Other options: a drafter brings its plan, and a plan takes the place of a drafter."""
        drafter = changes.get("drafter", None if "plan" in changes else self.drafter)
        kept = plain() if self.drafter is not None else self.plan
        plan = changes.get("plan", kept if drafter is None else unmasked(drafter.drafts))
        return replace(self, **{**changes, "drafter": drafter, "plan": plan})


@dataclass(frozen=True)
class Sampling:
    """Draw tokens instead of taking the likeliest. Draws depend on the seed and a prompt's number, not on its batch."""

    temperature: float = 1.0
    top_k: int | None = None  # of the likeliest tokens; None for all
    top_p: float = 1.0  # the smallest set of likeliest tokens with so much probability
    seed: int = 0
    sampled_drafts: bool = True  # drafts are drawn from the sampler head too, and not its likeliest tokens

    def __post_init__(self) -> None:
        faults = []
        if not self.temperature > 0:
            faults.append(f"temperature {self.temperature}: should be above 0; leave it out for greedy decoding.")
        if self.top_k is not None and self.top_k < 1:
            faults.append(f"top-k {self.top_k}: should be at least 1.")
        if not 0 < self.top_p <= 1:
            faults.append(f"top-p {self.top_p}: should be above 0 and at most 1.")
        if not 0 <= self.seed < 2**31:
            faults.append(f"seed {self.seed}: should be from 0 to 2^31 - 1.")
        if faults:
            raise UserError(*faults)

    @property
    def kind(self) -> SamplingKind:
        """What of it is compiled in."""
        return SamplingKind(self.top_k is not None or self.top_p < 1, self.sampled_drafts)
