"""A made-up but likely results tree: six suites, twelve decoders, two batch sizes, samples that hold HTML."""

import random

SUITES = {  # title, domain, metric, how well its drafts are accepted
    "gsm8k": ("GSM8K", "math", "exact match", 0.82),
    "humaneval": ("HumanEval", "code", None, 0.84),
    "mt_bench": ("MT-Bench", "chat", None, 0.62),
    "alpaca_eval": ("AlpacaEval", "chat", None, 0.64),
    "mmlu": ("MMLU", "knowledge", "accuracy", 0.58),
    "popqa": ("PopQA", "knowledge", "contains the answer", 0.52),
}
DECODERS = (
    "none",
    "linear:1",
    "linear:4",
    "quadratic:1",
    "quadratic:2",
    "quadratic:4",
    "quadratic:8",
    "auto",
    "lookup:8",
    "jacobi:4",
    "draft:4",
    "transformers",
    "transformers lookup",
)
BATCH_SIZES = (1, 8)
PROMPT = 'Is <script>alert("1 < 2 && 3 > 2")</script> safe?\n\n  <b>Answer</b> with &amp; or "&quot;".'
WORDS = ("To", "find", "the", "total", "we", "add", "apples", "in", "each", "basket,", "so", "3 * 4 = 12", "and", "17.")
HTML_PIECES = [
    ["Sure", 0],
    [": <script>", 1],
    ["alert('a'", 1],
    [");</script>\n\n", 2],
    ["    indented   text\twith\ttabs\n", 3],
    ["</div></details><img src=x onerror=alert(1)> &", 4],
    ["lt; and ünïcödé 漢字 🙂\n", 5],
    ["a_very_long_word_" * 12, 6],
]


def _rows_of(decoder):
    kind, _, number = decoder.partition(":")
    K = int(number or 0)
    return {
        "none": 1,
        "linear": 2 * K + 1,
        "quadratic": (K + 1) ** 2,
        "lookup": K + 1,
        "jacobi": K + 1,
        "draft": K + 1,
    }[kind]


def _interval(mean):
    wide = 0 if mean == 1 else 1
    return {"mean": mean, "low": round(mean - 0.05 * wide * mean, 4), "high": round(mean + 0.06 * wide * mean, 4)}


def _row(suite, decoder, batch_size, rng):
    _, _, metric, share = SUITES[suite]
    row = {
        "suite": suite,
        "decoder": decoder,
        "plan": None,
        "calibrated_apart": True if decoder == "auto" else None,
        "batch_size": batch_size,
        "masks": None,
        "rows": None,
        "steps": None,
        "tokens": 40 * 128,
        "tokens_per_step": None,
        "acceptance": None,
        "tokens_per_second": None,
        "speedup": None,
        "step_seconds": None,
        "identical": {"same": 40, "of": 40, "ties": [], "faults": []},
        "score": None if metric is None else 0.31,
        "estimate": None,
        "estimate_two_passes": None,
    }
    plain = 50.0 * batch_size**0.7
    if decoder.startswith("transformers"):
        speed = 0.5 if decoder == "transformers" else 0.62
    else:
        plan = "quadratic:1" if decoder == "auto" else decoder
        kind, _, number = plan.partition(":")
        share = {"lookup": 0.35, "jacobi": 0.12, "draft": 0.7, "linear": share - 0.05}.get(kind, share)
        K = int(number or 0)
        acceptance = [round(share**j * 0.97 ** (j * j / 4), 4) for j in range(1, K + 1)]
        mean = round(1 + sum(acceptance) * (1 if batch_size == 1 else 0.9), 4)  # nearly the same, in truth
        rows = _rows_of(plan)
        cost = 1 + 0.09 * (rows - 1) * batch_size**0.35 + (1.2 if kind == "draft" else 0)
        speed = mean / cost
        row |= {
            "plan": plan if decoder == "auto" else None,
            "masks": K if kind in ("linear", "quadratic") else None,
            "rows": rows,
            "steps": round(40 * 127 / mean),
            "tokens_per_step": _interval(mean),
            "acceptance": acceptance or None,
            "step_seconds": cost / plain * batch_size * rng.uniform(0.97, 1.03),
            "estimate": round(mean * 0.98, 4) if kind == "quadratic" else None,
        }
    speed *= 1 if decoder == "none" else rng.uniform(0.97, 1.03)
    row["tokens_per_second"] = {"median": plain * speed, "low": plain * speed * 0.97, "high": plain * speed * 1.02}
    row["speedup"] = {"median": speed, "low": speed * 0.97, "high": speed * 1.02}
    if decoder == "none":
        row["identical"] = None
    return row


def _pieces(rng):
    pieces, step = [], 0
    for i in range(90):
        text = rng.choice(WORDS) + ("\n" if i % 23 == 22 else " ")
        pieces.append([text, step])
        step += rng.random() < 0.4 or i == 0
    return pieces


def results(suites=tuple(SUITES), decoders=DECODERS, batch_sizes=BATCH_SIZES):
    """A fresh tree."""
    rng = random.Random(0)
    rows = [_row(suite, decoder, size, rng) for suite in suites for size in batch_sizes for decoder in decoders]
    for row in rows:
        if (row["suite"], row["decoder"], row["batch_size"]) == ("gsm8k", "quadratic:8", 1):
            row["identical"] = {"same": 39, "of": 40, "ties": ["prompt 3, new token 17: gap 2e-06"], "faults": []}
        if (row["suite"], row["decoder"], row["batch_size"]) == ("popqa", "transformers lookup", 1):
            row["identical"] = {"same": 38, "of": 40, "ties": [], "faults": ["prompt 7: `<a|b>`", "prompt 9, too"]}
    samples = []
    for suite in suites[:3]:
        pieces = _pieces(rng)
        samples.append(
            {
                "suite": suite,
                "decoder": "quadratic:8",
                "prompt": "Sam has three baskets of four apples and five more. How many apples?",
                "pieces": pieces,
                "tokens": len(pieces),
                "steps": pieces[-1][1],
                "identical": True,
                "speedup": 1.31,
            }
        )
    samples.append(
        {
            "suite": suites[0],
            "decoder": "quadratic:8",
            "prompt": PROMPT,
            "pieces": [list(piece) for piece in HTML_PIECES],
            "tokens": 60,
            "steps": 6,
            "identical": False,
            "speedup": None,
        }
    )
    return {
        "format": 1,
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "adapter": "runs/smollm2",
        "draft_model": "org/smaller-model",
        "weights": "int8",
        "dtype": "float32",
        "device": "cpu, 2 cores",
        "masks": 8,
        "versions": {"mtp_jax": "0.1.0", "jax": "0.10.0", "numpy": "2.3.1"},
        "command": "python -m mtp_jax.evaluate --model HuggingFaceTB/SmolLM2-135M-Instruct --adapter runs/smollm2 "
        "--suite gsm8k humaneval mt_bench --out runs/evaluation",
        "settings": {
            "new_tokens": 128,
            "rounds": 3,
            "prompts": 40,
            "seed": 0,
            "batch_sizes": list(batch_sizes),
            "shortlist": 256,
            "sampling": None,
        },
        "suites": [
            {
                "name": name,
                "title": SUITES[name][0],
                "domain": SUITES[name][1],
                "prompts": 40,
                "source": f"{name}.jsonl",
                "metric": SUITES[name][2],
            }
            for name in suites
        ],
        "rows": rows,
        "samples": samples,
    }
