"""Programs compiled quickly, for tests that compare what a program says with a definition of it."""

from collections.abc import Callable
from typing import Any

import jax

# Code as XLA emits it at once: a third of the time, most of which goes into making programs fast.
QUICKLY = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_parallel_codegen_split_count": 1,
    "xla_cpu_use_fusion_emitters": False,
}


def quickly(f: Callable, *arguments: Any) -> Any:
    """The value of `f`, compiled without optimisation: of use where a test is of what is computed, not of how."""
    return jax.jit(f).lower(*arguments).compile(compiler_options=QUICKLY)(*arguments)
