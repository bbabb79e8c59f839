"""An exported folder in transformers: its `generate` against transformers' own greedy decoding, in one run.

    python -m mtp_jax.export --adapter ADAPTER --model MODEL --out exported
    python benchmarks/export_speed.py exported --prompts math.jsonl code.jsonl
    python benchmarks/export_speed.py exported --prompts *.jsonl --check

Both decode the same prompts with the same weights and take turns, prompt by prompt. Speeds are tokens per second of
wall time, prefill included; the ratio is the median over rounds. --check instead takes 80 prompts of all files and
compares tokens with those of transformers (a tie is where its two best logits are closer than 1e-4) and steps with
those of our decoder and the same plan. The exit code is 1 if tokens differ without a tie, or steps by more than 0.1%.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from mtp_jax.data.prompts import read_prompts
from mtp_jax.errors import run_command

_TIE = 1e-4
_STEPS_APART = 1e-3


def encode(tokenizer: Any, prompt: Any) -> torch.Tensor:
    """Token ids of a text or of a chat's messages, which a tokenizer without template gets as text."""
    if isinstance(prompt, str):
        return tokenizer(prompt, return_tensors="pt").input_ids
    if tokenizer.chat_template is None:
        return tokenizer("\n".join(message["content"] for message in prompt), return_tensors="pt").input_ids
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt")[
        "input_ids"
    ]


def speeds(a: argparse.Namespace, plain: Any, fast: Any, domains: dict[str, list[torch.Tensor]]) -> None:
    """A table of both speeds by domain and plan."""
    table = Table("domain", "plan", "tokens per step", "tokens/s", "transformers", "faster", "CPU time", "identical")
    greedy = {"do_sample": False, "max_new_tokens": a.new_tokens}
    for domain, prompts in domains.items():
        for plan in a.plans:
            ratios, cpu, rates, same, steps, new = [], [], [], 0, 0, 0
            for turn in range(a.rounds + 1):
                seconds, busy, tokens = [0.0, 0.0], [0.0, 0.0], 0
                for ids in prompts[: 2 if turn == 0 else None]:
                    options = {**greedy, "attention_mask": torch.ones_like(ids)}
                    runs = [
                        lambda ids=ids, o=options: plain.generate(ids, **o),
                        lambda ids=ids, o=options, p=plan: fast.generate(
                            ids, plan=p, return_dict_in_generate=True, **o
                        ),
                    ]
                    out = []
                    for i, run in enumerate(runs):
                        begin, began = time.perf_counter(), time.process_time()
                        out.append(run())
                        seconds[i] += time.perf_counter() - begin
                        busy[i] += time.process_time() - began
                    tokens += out[0].shape[1] - ids.shape[1]
                    if turn == 1:
                        same += torch.equal(out[0], out[1].sequences)
                        steps, new = steps + out[1].steps.item(), new + out[1].new_tokens.item() - 1
                if turn:  # the first only warms up
                    ratios.append(seconds[0] / seconds[1])
                    cpu.append(busy[0] / busy[1])
                    rates.append((tokens / seconds[1], tokens / seconds[0]))
            own, theirs = (statistics.median(rate[i] for rate in rates) for i in (0, 1))
            figures = (f"{new / steps:.2f}", f"{own:.0f}", f"{theirs:.0f}", f"{statistics.median(ratios):.2f}x")
            identical = f"{same} of {len(prompts)}"
            table.add_row(domain, plan or "default", *figures, f"{statistics.median(cpu):.2f}x", identical)
    Console(width=120).print(table)


def gap(plain: Any, ids: list[int]) -> float:
    """How far apart the two best logits behind a text are."""
    with torch.no_grad():
        best = plain(torch.tensor([ids])).logits[0, -1].float().topk(2).values
    return float(best[0] - best[1])


def check(a: argparse.Namespace, plain: Any, fast: Any, domains: dict[str, list[torch.Tensor]]) -> bool:
    """Compare tokens and steps; True where all is as it should be."""
    from mtp_jax.api import load
    from mtp_jax.decoding.plan import parse_plan

    loaded, right = load(a.folder, adapter=a.folder, dtype="float32"), True
    context = plain.config.max_position_embeddings - a.new_tokens
    prompts = [ids[:, -context:] for turn in zip(*domains.values(), strict=False) for ids in turn][: a.count]
    for plan in (plan or "quadratic:1" for plan in a.plans):
        generator = loaded.using(plan=parse_plan(plan))
        same, ties, steps, ours, apart = 0, 0, 0, 0, []
        for i, ids in enumerate(prompts):
            options = {"max_new_tokens": a.new_tokens, "do_sample": False, "attention_mask": torch.ones_like(ids)}
            want = plain.generate(ids, **options)[0].tolist()
            out = fast.generate(ids, plan=plan, return_dict_in_generate=True, **options)
            got = out.sequences[0].tolist()
            jax = generator.complete([ids[0].tolist()], a.new_tokens, 1)[0]
            steps, ours = steps + out.steps.item(), ours + jax.steps
            if out.steps.item() != jax.steps:
                apart.append(f"prompt {i}: {out.steps.item()} steps, ours {jax.steps}")
            if got == want:
                same += 1
                continue
            first = next(n for n, pair in enumerate(zip(got, want, strict=False)) if pair[0] != pair[1])
            distance = gap(plain, want[:first])
            ties += distance < _TIE
            print(f"{plan}, prompt {i}, token {first}: gap {distance:.1e}")
        right &= same + ties == len(prompts) and abs(steps - ours) <= _STEPS_APART * ours
        print(f"{plan}: {same} of {len(prompts)} identical to transformers, {ties} ties; {steps} steps, ours {ours}")
        for line in apart:
            print(f"  {line}")
    return right


def main() -> None:
    """Parse, load, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="an exported folder that holds its base")
    parser.add_argument("--prompts", required=True, nargs="+", metavar="FILE.jsonl", help="one file per domain")
    parser.add_argument("--count", type=int, help="prompts of each file (10); with --check of all (80)")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plans", nargs="+", default=[None], help="the default plan by default")
    parser.add_argument("--check", action="store_true")
    a = parser.parse_args()
    a.count = a.count or (80 if a.check else 10)
    tokenizer = AutoTokenizer.from_pretrained(a.folder)
    plain = AutoModelForCausalLM.from_pretrained(a.folder, dtype=torch.float32)
    fast = AutoModelForCausalLM.from_pretrained(a.folder, dtype=torch.float32, trust_remote_code=True)
    domains = {
        Path(file).stem: [encode(tokenizer, prompt) for prompt in read_prompts(file)[: a.count]] for file in a.prompts
    }
    if a.check:
        sys.exit(0 if check(a, plain, fast, domains) else 1)
    print(f"{a.folder}, {torch.get_num_threads()} threads, {a.count} prompts a domain, {a.new_tokens} new tokens")
    speeds(a, plain, fast, domains)


if __name__ == "__main__":
    run_command(main)
