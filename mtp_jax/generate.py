"""`python -m mtp_jax.generate --model M [--adapter A] (--prompt TEXT | --prompts FILE.jsonl | --chat)`: continue texts.

Output is the model's own, whatever the plan: greedy, or sampled from its distribution with --temperature above 0.
"""

import argparse
import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mtp_jax.errors import UserError, run_command, warn

if TYPE_CHECKING:
    from mtp_jax.decoding.generator import Completion, Generator
    from mtp_jax.decoding.options import Sampling


def main() -> None:
    """Parse, decode, print."""
    parser = argparse.ArgumentParser(
        prog="python -m mtp_jax.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a Hugging Face folder, a hub name, or bundled:NAME")
    parser.add_argument("--adapter", help="a run's folder, an adapter folder, bundled:NAME, or a hub name")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--prompts", metavar="FILE.jsonl", help="lines with 'prompt' or 'messages'")
    prompt.add_argument("--chat", action="store_true", help="a conversation on the terminal; an empty line ends it")
    parser.add_argument(
        "--plan",
        metavar="P",
        help="none, linear:M, quadratic:M, blocks:M0,M1,... (masks behind each real row), one of these and +lookup:L "
        "(prompt lookup), lookup:L, or auto, which measures; auto with an adapter and none without by default",
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--temperature", type=float, help="0, the default, takes the likeliest token")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="and from the likeliest that reach P")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--generation-config",
        choices=["processors", "base", "none"],
        default="processors",
        help="what to take from the model's generation_config.json: its processors (repetition_penalty, ...), also "
        "how it samples (base), or nothing",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="float32 on CPU and bfloat16 elsewhere")
    parser.add_argument("--weights", choices=["stored", "int8"], default="stored", help="int8: the quantised base")
    parser.add_argument(
        "--activations", choices=["float", "int8"], default="float", help="int8: of an int8 base, on a CPU"
    )
    parser.add_argument("--batch-size", type=int, default=1, metavar="B")
    parser.add_argument(
        "--shortlist", type=int, default=256, metavar="C", help="candidates of a draft; 0 for all tokens"
    )
    parser.add_argument("--stream", action="store_true", help="show tokens as they come, each pass in a colour")
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt")
    parser.add_argument("--compare", action="store_true", help="decode also without drafts, and compare")
    a = parser.parse_args()
    prompts = _check(a)

    from mtp_jax.api import load
    from mtp_jax.decoding.options import Sampling
    from mtp_jax.decoding.plan import parse_plan

    named = a.plan or ("auto" if a.adapter else "none")
    plan = None if named == "auto" else parse_plan(named)
    chosen = {name: value for name in ("temperature", "top_k", "top_p") if (value := getattr(a, name)) is not None}
    sampling = Sampling(**chosen, seed=a.seed) if a.temperature else None
    asked, shortlist = a.generation_config != "none", a.shortlist or None
    generator = load(
        a.model, adapter=a.adapter, plan=plan, dtype=a.dtype, shortlist=shortlist, generation_config=asked,
        weights=a.weights, activations=a.activations,
    )  # fmt: skip
    if a.generation_config == "base":
        sampling = _as_the_base_samples(generator, chosen, a.seed)
    if a.chat:
        _chat(generator, a, sampling, named)
        return
    names = ["--prompt"] if a.prompts is None else [f"prompt {i + 1}" for i in range(len(prompts))]
    encoded = [generator.encode(prompt, name) for prompt, name in zip(prompts, names, strict=True)]
    if named == "auto":
        generator = _chosen(generator, encoded, a)
    _print_all(generator, encoded, a, sampling)


def _check(a: argparse.Namespace) -> list[Any]:
    """The prompts; raises UserError for what cannot be."""
    counts = {"max-new-tokens": a.max_new_tokens, "batch-size": a.batch_size}
    faults = [f"--{name} {value}: should be at least 1." for name, value in counts.items() if value < 1]
    if a.shortlist < 0:
        faults.append(f"--shortlist {a.shortlist}: should be at least 1, or 0 for the whole vocabulary.")
    if a.temperature is not None and not a.temperature >= 0:
        faults.append(f"--temperature {a.temperature}: should be at least 0; 0 takes the likeliest token.")
    if not a.temperature and a.generation_config != "base" and not (a.top_k is None and a.top_p in (None, 1.0)):
        faults.append("--top-k and --top-p say what to sample from: give --temperature too.")
    if a.plan == "auto" and a.adapter is None:
        faults.append("--plan auto chooses how to use an adapter: give --adapter too.")
    if a.stream and (a.json or a.batch_size > 1 or a.compare):
        faults.append("--stream shows one text on the terminal: leave out --json, --compare and --batch-size.")
    if a.chat and (a.json or a.compare or a.batch_size > 1):
        faults.append("--chat is a conversation on the terminal: leave out --json, --compare and --batch-size.")
    if faults:
        raise UserError(*faults)
    if a.prompts is not None:
        from mtp_jax.data.prompts import read_prompts

        return read_prompts(a.prompts)
    return [] if a.chat else [a.prompt]


def _as_the_base_samples(generator: "Generator", chosen: dict[str, Any], seed: int) -> "Sampling | None":
    """The settings of the base's generation config, and in their place what was chosen on the command line."""
    from mtp_jax.decoding.options import Sampling

    settings = generator.settings
    if chosen.get("temperature") == 0 or (settings.sampling is None and "temperature" not in chosen):
        return None
    if settings.ignored_sampling:
        warn(f"{', '.join(settings.ignored_sampling)} of the model's generation config is ignored.")
    return replace(settings.sampling or Sampling(), **chosen, seed=seed)


def _chosen(generator: "Generator", prompts: list[list[int]], a: argparse.Namespace) -> "Generator":
    from mtp_jax.decoding.auto import choose_plan

    print("auto: measuring which plan is fastest here, unless that is known already", file=sys.stderr)
    choice = choose_plan(generator, prompts, a.batch_size)
    print(choice, file=sys.stderr)
    if choice.plan.drafts == 0:
        print("auto: plain decoding is fastest here with this adapter", file=sys.stderr)
    return generator.using(plan=choice.plan, one_head=choice.one_head)


def _print_all(
    generator: "Generator", prompts: list[list[int]], a: argparse.Namespace, sampling: "Sampling | None"
) -> None:
    from rich.console import Console
    from rich.text import Text

    from mtp_jax.decoding.plan import plain
    from mtp_jax.decoding.show import PassWriter, comparison, speed_line

    console = Console(highlight=False, soft_wrap=True)
    plan, size = generator.options.plan, a.batch_size
    both = _timed(generator.using(plan=plain()), prompts, a, sampling) if a.compare else []
    done: list[Completion] = []
    for at in range(0, len(prompts), size):
        batch = prompts[at : at + size]
        writer = None if a.json or size > 1 else PassWriter(generator.tokenizer, console, batch[0])
        if a.compare:  # compiles
            generator.complete(batch, a.max_new_tokens, size, sampling, at)
        done += generator.complete(batch, a.max_new_tokens, size, sampling, at, writer if a.stream else None)
        for completion in done[at:]:
            if a.json:
                print(json.dumps(_record(generator, completion), ensure_ascii=False), flush=True)
                continue
            writer = writer or PassWriter(generator.tokenizer, console, completion.prompt_ids)
            if not a.stream:
                writer(completion.token_ids, completion.emitted_by)
            writer.finish()
            writer = None
        if not a.json:
            console.print(Text(speed_line(done[at:], str(plan)) + "\n", "green"))
    if a.compare:
        for line in comparison(done, both, size, plan, sampling is not None):
            print(line, file=sys.stderr if a.json else sys.stdout)


def _timed(
    generator: "Generator", prompts: list[list[int]], a: argparse.Namespace, sampling: "Sampling | None"
) -> "list[Completion]":
    done: list[Completion] = []
    for at in range(0, len(prompts), a.batch_size):
        batch = prompts[at : at + a.batch_size]
        # Compiles.
        generator.complete(batch, a.max_new_tokens, a.batch_size, sampling, at)
        done += generator.complete(batch, a.max_new_tokens, a.batch_size, sampling, at)
    return done


def _record(generator: "Generator", done: "Completion") -> dict[str, Any]:
    return {
        "text": generator.text(done),
        "token_ids": done.token_ids,
        "new_tokens": len(done.token_ids),
        "finish_reason": done.finish_reason,
        "steps": done.steps,
        "seconds": round(done.prefill_seconds + done.seconds, 6),
        "accepted": done.accepted,
    }


def _chat(generator: "Generator", a: argparse.Namespace, sampling: "Sampling | None", named: str) -> None:
    from rich.console import Console
    from rich.text import Text

    from mtp_jax.decoding.show import PassWriter, speed_line

    console = Console(highlight=False, soft_wrap=True)
    messages: list[dict[str, str]] = []
    generator.encode([{"role": "user", "content": "hello"}])  # refuses a model without chat template
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not line.strip():
            return
        messages.append({"role": "user", "content": line})
        ids = generator.encode(messages, "the conversation")
        if named == "auto" and len(messages) == 1:
            generator = _chosen(generator, [ids], a)
        writer = PassWriter(generator.tokenizer, console, ids, shown=False)
        done = generator.complete([ids], a.max_new_tokens, 1, sampling, len(messages), writer)
        writer.finish()
        console.print(Text(speed_line(done, str(generator.options.plan)) + "\n", "green"))
        messages.append({"role": "assistant", "content": generator.text(done[0])})


if __name__ == "__main__":
    run_command(main)
