"""The paper's Table 1 (arXiv 2507.11851): tokens per step of quadratic decoding, Tulu3-8B with eight masks."""

from typing import NamedTuple

LABEL = "paper, 8B"


class Benchmark(NamedTuple):
    """A row of the table."""

    title: str
    skill: str
    tokens_per_step: tuple[float, ...]  # with 1 to 8 masks


# By the names of our suites.
TABLE_1 = {
    "mmlu": Benchmark("MMLU", "knowledge", (1.54, 1.87, 2.06, 2.18, 2.26, 2.32, 2.36, 2.38)),
    "popqa": Benchmark("PopQA", "knowledge", (1.48, 1.69, 1.80, 1.85, 1.88, 1.90, 1.91, 1.91)),
    "truthfulqa": Benchmark("TruthfulQA", "knowledge", (1.55, 1.84, 2.00, 2.08, 2.13, 2.16, 2.18, 2.19)),
    "gsm8k": Benchmark("GSM8K", "math", (1.84, 2.58, 3.21, 3.75, 4.20, 4.60, 4.95, 5.22)),
    "humaneval": Benchmark("HumanEval", "code", (1.86, 2.63, 3.30, 3.87, 4.40, 4.79, 5.14, 5.35)),
    "alpaca_eval": Benchmark("AlpacaEval", "chat", (1.61, 1.97, 2.18, 2.31, 2.40, 2.45, 2.49, 2.52)),
    "ifeval": Benchmark("IFEval", "chat", (1.55, 1.86, 2.05, 2.16, 2.24, 2.30, 2.36, 2.39)),
    "xstest": Benchmark("XSTest", "safety", (1.70, 2.11, 2.38, 2.52, 2.67, 2.73, 2.76, 2.79)),
    "harmbench": Benchmark("HarmBench", "safety", (1.78, 2.35, 2.76, 2.99, 3.28, 3.39, 3.45, 3.51)),
    "do_anything_now": Benchmark("Do-Anything-Now", "safety", (1.69, 2.29, 2.85, 3.04, 3.21, 3.23, 3.64, 3.72)),
    "jailbreak_trigger": Benchmark("JailbreakTrigger", "safety", (1.77, 2.31, 2.76, 3.02, 3.31, 3.41, 3.48, 3.54)),
    "wildjailbreak": Benchmark("WildJailbreakTest", "safety", (1.71, 2.18, 2.47, 2.64, 2.79, 2.84, 2.88, 2.91)),
    "wildguard": Benchmark("WildGuardTest", "safety", (1.69, 2.12, 2.39, 2.54, 2.67, 2.72, 2.76, 2.79)),
}

# The benchmark that stands for a domain beside a suite that the paper does not have.
_OF_DOMAIN = {"knowledge": "mmlu", "math": "gsm8k", "code": "humaneval", "chat": "alpaca_eval"}


def nearest(suite: str, domain: str) -> str | None:
    """The benchmark of the table to compare a suite with: its own, or its domain's; None where there is none."""
    return suite if suite in TABLE_1 else _OF_DOMAIN.get(domain)
