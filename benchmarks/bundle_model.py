"""Turn a finished run of configs/bundled_stdlib.yaml into the bundled model: its folder, card and training digests.

python -m mtp_jax.train --config configs/bundled_stdlib.yaml
python benchmarks/bundle_model.py --run runs/bundled_stdlib --out mtp_jax/bundled/stdlib-5m
"""

import argparse
import hashlib
import json
import math
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from mtp_jax.api import load
from mtp_jax.config_file import load_config
from mtp_jax.data.sources import read_sources
from mtp_jax.model.base import open_base
from mtp_jax.training.evaluation import held_out_prompts
from mtp_jax.training.report import TRAINING_FILES

COMPLETIONS, PROMPT_TOKENS, NEW_TOKENS = 20, 48, 48

CARD = """\
---
license: apache-2.0
language: code
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A small Llama that writes Python-like code: {parameters:,} parameters (D={D}, {L} layers, N={N}, K={K}, H={H}, F={F},
vocabulary {V}, tied embeddings), bfloat16, context {context}. It exists so that mtp_jax can be tried, tested and
measured without a download. Expect code of the right shape, not right code.

## Training

- Data: the source of the Python {python} standard library without its test packages, {files} files, {tokens_text}.
  Names and sha256 digests of all training files are in `{training_files}`. The library is under the PSF licence.
- Held out: files whose relative path has a sha256 below {held_out:.0%} of its range; {held_files} files.
- Tokenizer: byte-level BPE of {V} tokens, digits split, trained on the same training files.
- Recipe: `configs/bundled_stdlib.yaml`: {steps} steps of {batch_size} sequences of {sequence_length} tokens, AdamW,
  peak learning rate {learning_rate}, {schedule}, weight decay {weight_decay}, seed {seed}.

## Held-out figures

| loss, nats per token | next-token accuracy | tokens |
|---|---|---|
| {loss:.4f} | {accuracy:.4f} | {tokens} |

    python -m mtp_jax.evaluate --model bundled:{name}

The largest held-out file, `{largest}`, holds {largest_share:.0%} of the held-out characters. The command
prints the figures of the table with Python {python}. Another Python has other library files: there the command takes
only files that are held out and that the model was not trained on under any name, and its figures differ a little.

## {count} completions, unpicked

One for each of the {count} held-out files whose hash comes first, greedy, {new_tokens} new tokens behind the mark `⟫`,
cut at a place that the same hash decides.

{completions}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    config = load_config(str(arguments.run / "config.yaml"), [])
    training, held_out = read_sources(config.data)

    part = arguments.out.with_name(f".{arguments.out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(arguments.run / "model", part)
    digests = {d.name: hashlib.sha256(d.text().encode()).hexdigest() for source in training for d in source}
    (part / TRAINING_FILES).write_text(json.dumps(digests, indent=0, sort_keys=True) + "\n")

    evaluate = [sys.executable, "-m", "mtp_jax.evaluate", "--model", str(part), "--json"]
    figures = json.loads(subprocess.run(evaluate, check=True, capture_output=True, text=True).stdout)
    base, generator = open_base(str(part)), load(str(part), dtype="float32")
    prompts = held_out_prompts(held_out, base.tokenizer, COMPLETIONS, PROMPT_TOKENS)
    shown = []
    for prompt, completion in zip(prompts, generator.complete(prompts, NEW_TOKENS, COMPLETIONS), strict=True):
        text = base.tokenizer.decode(prompt, skip_special_tokens=True) + "⟫" + generator.text(completion)
        shown.append("    " + text.replace("\n", "\n    ").rstrip() + "\n")
    g, largest = base.g, max(held_out, key=lambda document: len(document.text()))
    card = CARD.format(
        name=arguments.out.name,
        parameters=sum(math.prod(tensor.shape) for tensor in base.tensors.stored.values()),
        D=g.D, L=g.L, N=g.N, K=g.K, H=g.H, F=g.F, V=g.V, context=g.max_positions,
        python=platform.python_version(),
        files=len(digests),
        tokens_text=f"{sum(len(d.text()) for source in training for d in source) / 1e6:.1f} million characters",
        training_files=TRAINING_FILES,
        held_out=config.data.held_out,
        held_files=len(held_out),
        largest=largest.name,
        largest_share=len(largest.text()) / sum(len(d.text()) for d in held_out),
        count=COMPLETIONS,
        new_tokens=NEW_TOKENS,
        completions="\n---\n\n".join(shown),
        **config.train.model_dump(),
        seed=config.seed,
        **{name: figures[name] for name in ("loss", "accuracy", "tokens")},
    )  # fmt: skip
    (part / "README.md").write_text(card, encoding="utf-8")
    for path in part.iterdir():
        path.chmod(0o644)
    shutil.rmtree(arguments.out, ignore_errors=True)
    part.rename(arguments.out)
    print(f"{arguments.out}: held-out loss {figures['loss']:.4f}, accuracy {figures['accuracy']:.4f}")


if __name__ == "__main__":
    main()
