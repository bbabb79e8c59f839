"""How an engine decodes with a LoRA for noise rows, in plain PyTorch, from the exported folder and the base alone.

A cycle has two passes. The first runs [seed, noise ...] behind the cache, the LoRA on the noise rows alone: its first
row gives the base's next token, the others drafts. The second runs [that token, drafts ...] without LoRA and accepts
the drafts that are its own choices. Nothing of this package is used.
"""

import inspect
import json
from dataclasses import dataclass, field

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache


@dataclass
class Cycle:
    """One cycle: where it began, what it drafted and emitted, and the seed's keys and values, by layer."""

    position: int  # of the seed
    noise: list[int]
    drafts: list[int]
    emitted: list[int]
    kept: list = field(repr=False, default_factory=list)


class Engine:
    """A base model with the LoRA of a folder."""

    def __init__(self, base, folder):
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
        config, tensors = json.loads((folder / "adapter_config.json").read_text()), None
        tensors = load_file(folder / "adapter_model.safetensors")
        self.gate = None  # [rows, 1]: 1 where a row meets the LoRA
        # transformers has renamed it.
        self.cache = "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"
        scale = config["lora_alpha"] / config["r"]
        for name, module in self.model.named_modules():
            if name.split(".")[-1] in config["target_modules"] and isinstance(module, torch.nn.Linear):
                a, b = (tensors[f"base_model.model.{name}.lora_{kind}.weight"].float() for kind in "AB")
                module.register_forward_hook(self._adapted(a, b, scale))

    def _adapted(self, a, b, scale):
        def hook(module, inputs, output):
            if self.gate is None:
                return output
            extra = scale * ((inputs[0] @ a.T) @ b.T)
            return torch.where(self.gate > 0, output + extra, output)  # not one bit of other rows

        return hook

    def run(self, ids, cache, gate=None):
        """Logits [rows, V]; the cache grows by all rows."""
        self.gate = gate
        with torch.no_grad():
            return self.model(torch.tensor([ids]), **{self.cache: cache}, use_cache=True).logits[0]

    def decode(self, prompt, new, F, noise):
        """`new` tokens, greedily, and the cycles; `noise` gives the ids of the F - 1 rows behind a position."""
        cache, cycles = DynamicCache(config=self.model.config), []
        tokens = [*prompt, int(self.run(prompt, cache)[-1].argmax())]
        while len(tokens) - len(prompt) < new:
            at = len(tokens) - 1
            ids = list(noise(at))[: F - 1]
            gate = torch.tensor([[0.0]] + [[1.0]] * len(ids))
            logits = self.run([tokens[-1], *ids], cache, gate)
            known, *drafts = logits.argmax(-1).tolist()
            forget(cache, len(ids))  # the seed's keys and values stay, those of the noise go
            kept = [(layer.keys[0, :, at].clone(), layer.values[0, :, at].clone()) for layer in cache.layers]
            choice = self.run([known, *drafts], cache).argmax(-1).tolist()
            accepted = 0
            while accepted < len(drafts) and drafts[accepted] == choice[accepted]:
                accepted += 1
            emitted = [known, *drafts[:accepted], choice[accepted]]
            forget(cache, len(drafts) - accepted)
            tokens += emitted
            cycles.append(Cycle(at, ids, drafts, emitted, kept))
        return tokens[len(prompt) :][:new], cycles


def forget(cache, rows):
    """Take the last rows out of the cache."""
    if rows:
        cache.crop(-rows)
