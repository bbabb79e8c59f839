"""Settings of a generation config with drafts: is every greedy output that of transformers' `generate`?

    python benchmarks/processors.py --model MODEL --adapter ADAPTER --prompts FILE.jsonl ... --out processors.json

For every setting and plan it counts the prompts whose new tokens equal transformers'. Where they differ, it prints how
much better transformers' token was: below 1e-4 it is a tie between two tokens, which rounding decides.
"""

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

import mtp_jax
from mtp_jax.data.prompts import read_prompts
from mtp_jax.decoding.plan import parse_plan
from mtp_jax.decoding.processors import read_settings
from mtp_jax.errors import run_command
from mtp_jax.locate import find_folder

SETTINGS = {
    "repetition_penalty": 1.1,
    "no_repeat_ngram_size": 3,
    "min_new_tokens": "--new-tokens",
    "suppress_tokens": "the 3 commonest new tokens of plain decoding",
}


def main() -> None:
    """Parse, decode, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--prompts", nargs="+", required=True, metavar="FILE.jsonl")
    parser.add_argument("--count", type=int, default=50, help="prompts, spread evenly over the files (50)")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--plans", nargs="+", default=["none", "linear:1", "linear:4", "quadratic:1", "quadratic:4"])
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    a = parser.parse_args()

    generator = mtp_jax.load(a.model, adapter=a.adapter, dtype="float32", generation_config=False)
    model = AutoModelForCausalLM.from_pretrained(find_folder(a.model), dtype=torch.float32)
    texts = [text for file in a.prompts for text in read_prompts(file)]
    prompts = [generator.encode(text) for text in texts[:: max(1, len(texts) // a.count)][: a.count]]
    plain = [done.token_ids for done in generator.complete(prompts, a.new_tokens, 1)]
    counts = torch.tensor([token for tokens in plain for token in tokens if token not in generator.stops]).bincount()
    settings = {**SETTINGS, "min_new_tokens": a.new_tokens, "suppress_tokens": counts.topk(3).indices.tolist()}
    cases = {name: {name: value} for name, value in settings.items()} | {"all of them": settings}

    table, results = Table("setting", "outputs it changes", *a.plans), []
    for name, setting in cases.items():
        wanted = [_transformers(model, ids, a.new_tokens, generator.stops, setting) for ids in prompts]
        generator.settings = read_settings(setting, generator.g.V, name)
        cells = []
        for plan in a.plans:
            done = generator.using(plan=parse_plan(plan)).complete(prompts, a.new_tokens, 1)
            ties = [_gap(ours.token_ids, *theirs) for ours, theirs in zip(done, wanted, strict=True)]
            differing = [gap for gap in ties if gap is not None]
            per_step = sum(len(d.token_ids) - 1 for d in done) / max(sum(d.steps for d in done), 1)
            same = len(done) - len(differing)
            results.append({"setting": name, "plan": plan, "identical": same, "of": len(done), "gaps": differing})
            cells.append(f"{same}/{len(done)} ({per_step:.2f})" + (f" gaps {differing}" if differing else ""))
        changed = sum(tokens != theirs[0] for tokens, theirs in zip(plain, wanted, strict=True))
        table.add_row(name, f"{changed}/{len(prompts)}", *cells)
    Console().print("Identical to transformers (tokens per step):", table)
    if a.out is not None:
        a.out.write_text(json.dumps(results, indent=2) + "\n")


def _transformers(model, ids, new_tokens, stops, setting):  # type: ignore[no-untyped-def]
    """Greedy new tokens by transformers, and the processed logits of each."""
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=list(stops),
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **{"repetition_penalty": 1.0, **setting},
    )
    return out.sequences[0, len(ids) :].tolist(), torch.cat(out.scores)


def _gap(ours: list[int], theirs: list[int], scores: torch.Tensor) -> float | None:
    """None where the tokens are the same; otherwise how much better transformers' first other token was."""
    if ours == theirs:
        return None
    at = next((i for i, (x, y) in enumerate(zip(ours, theirs, strict=False)) if x != y), None)
    return float("inf") if at is None else float(scores[at, theirs[at]] - scores[at, ours[at]])


if __name__ == "__main__":
    run_command(main)
