"""Multi-token prediction for pretrained language models, in JAX (arXiv 2507.11851).

>>> import mtp_jax
>>> generator = mtp_jax.load("bundled:stdlib-5m", adapter="bundled:stdlib-5m", plan=mtp_jax.quadratic(2))
>>> print(generator.text(generator(["def main():"], max_new_tokens=64)[0]))
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtp_jax.api import load as load
    from mtp_jax.decoding.drafters import parse_drafter as parse_drafter
    from mtp_jax.decoding.generator import Completion as Completion
    from mtp_jax.decoding.generator import Generator as Generator
    from mtp_jax.decoding.options import Options as Options
    from mtp_jax.decoding.options import Sampling as Sampling
    from mtp_jax.decoding.plan import BlockPlan as BlockPlan
    from mtp_jax.decoding.plan import linear as linear
    from mtp_jax.decoding.plan import parse_plan as parse_plan
    from mtp_jax.decoding.plan import plain as plain
    from mtp_jax.decoding.plan import quadratic as quadratic

try:
    __version__ = version("mtp_jax")
except PackageNotFoundError:  # used from a checkout that was never installed
    __version__ = "unknown"

# The public API, imported when it is first asked for: commands answer --help without waiting for JAX.
_HOMES = {
    "load": "api",
    "parse_drafter": "decoding.drafters",
    "Completion": "decoding.generator",
    "Generator": "decoding.generator",
    "Options": "decoding.options",
    "Sampling": "decoding.options",
    "BlockPlan": "decoding.plan",
    "linear": "decoding.plan",
    "parse_plan": "decoding.plan",
    "plain": "decoding.plan",
    "quadratic": "decoding.plan",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
