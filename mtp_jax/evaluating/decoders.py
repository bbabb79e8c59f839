"""What is compared: our loop with a block plan or another way to draft, and transformers beside it."""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mtp_jax.api import with_draft_model
from mtp_jax.decoding.auto import choose_plan
from mtp_jax.decoding.drafters import DraftModel, parse_drafter
from mtp_jax.decoding.generator import Completion, Generator
from mtp_jax.decoding.plan import BlockPlan, parse_plan, plain
from mtp_jax.errors import UserError
from mtp_jax.model.base import Base

Run = Callable[[list[list[int]]], list[Completion]]
TRANSFORMERS = {"transformers": {}, "transformers lookup": {"prompt_lookup_num_tokens": 10}}
AUTO = "auto"
AUTO_PROMPTS = 8  # that it is calibrated on


@dataclass(frozen=True)
class Decoder:
    """One way to decode at one batch size."""

    name: str
    run: Run
    plan: BlockPlan | None  # of our loop; with a drafter a plan without masks
    ours: bool = True


def parse_names(text: str) -> list[str]:
    """Names of decoders, as `none,linear:4,quadratic:1..8,blocks:2,1,0,lookup:8,auto` gives them; none is first.

    Raises:
        UserError: an unknown name.
    """
    joined = re.sub(r",(?=\d)", ";", text)  # commas within a plan of blocks
    names = [name.strip().replace(";", ",") for name in joined.split(",") if name.strip()]
    found = ["none", *(single for name in names for single in _each(name))]
    for name in found:
        kind = name.partition(":")[0]
        if name in (AUTO, *TRANSFORMERS):
            continue
        try:
            if kind in ("jacobi", "draft"):
                parse_drafter(name.replace("draft:", "jacobi:"))
            else:
                parse_plan(name)
        except UserError as error:
            masks = "linear:M, quadratic:M, blocks:M0,M1,..., each perhaps with +lookup:K"
            known = (f"none, auto, {masks}, lookup:K, jacobi:K, draft:K", *TRANSFORMERS)
            raise UserError(f"--plans {name}: {_why(error)} There are {', '.join(known)}.") from error
    return list(dict.fromkeys(found))


def _why(error: UserError) -> str:
    """What a fault says behind its place."""
    return error.faults[0].split(": ", 1)[-1]


def _each(name: str) -> Iterator[str]:
    """quadratic:1..3 as quadratic:1, quadratic:2 and quadratic:3."""
    found = re.fullmatch(r"(.*\w:)(\d+)\.\.(\d+)(.*)", name)
    if found and int(found[2]) <= int(found[3]):  # refused as it is otherwise
        for count in range(int(found[2]), int(found[3]) + 1):
            yield from _each(f"{found[1]}{count}{found[4]}")
    else:
        yield name


class Decoders:
    """All that are asked for, with weights that they share."""

    def __init__(self, names: list[str], generator: Generator, base: Base, draft: Base | None, new_tokens: int):
        """
        Args:
            draft: the smaller model of draft:K.
            new_tokens: of a completion, at most.
        Raises:
            UserError: a plan that the adapter has too few masks for, or a decoder whose model is not given.
        """
        self.names, self.generator, self.base, self.new = names, generator, base, new_tokens
        self.drafting: Generator | None = None
        for name in names:
            if name == AUTO and generator.shape is None:
                raise UserError("--plans auto chooses how to use an adapter: give --adapter too.")
            if name.startswith("draft:") and draft is None:
                raise UserError(f"--plans {name}: verifies drafts of a smaller model: give --draft-model too.")
            if name in TRANSFORMERS and base.g.int8:
                raise UserError(
                    f"--plans {name}: would run the stored weights, another model; leave it out, or --weights int8."
                )
            if name not in (AUTO, *TRANSFORMERS) and name.split(":")[0] not in ("jacobi", "draft"):
                generator.using(plan=parse_plan(name))  # refused where the adapter has too few masks
        if draft is not None and any(name.startswith("draft:") for name in names):
            self.drafting = with_draft_model(generator, draft, 1)
        self.theirs: dict[str, Any] = {}

    def at(self, batch_size: int, calibration: list[list[int]]) -> list[Decoder]:
        """Those for a batch size; `auto` chooses on `calibration`. Transformers has batches of one here."""
        names = [name for name in self.names if name not in TRANSFORMERS or batch_size == 1]
        return [self.named(name, batch_size, calibration) for name in names]

    def named(self, name: str, size: int, calibration: list[list[int]]) -> Decoder:
        """One of them."""
        if name in TRANSFORMERS:
            return Decoder(name, self._transformers(name), None, ours=False)
        if name == AUTO:
            choice = choose_plan(self.generator, calibration, size, cache=None)
            generator = self.generator.using(plan=choice.plan, one_head=choice.one_head)
        elif name.startswith("draft:"):
            assert self.drafting is not None and isinstance(self.drafting.options.drafter, DraftModel)
            drafter = replace(self.drafting.options.drafter, drafts=int(name.partition(":")[2]))
            generator = self.drafting.using(drafter=drafter)
        elif name.startswith("jacobi:"):
            generator = self.generator.using(drafter=parse_drafter(name))
        else:
            plan, shape = parse_plan(name), self.generator.shape
            # A draft vocabulary is worth a product of its own where there are many mask rows.
            few = shape is None or shape.vocabulary is None or plan.mask_rows <= plan.drafts + 1
            generator = self.generator.using(plan=plan, one_head=size == 1 and few)
        plan = generator.options.plan
        return Decoder(name, lambda prompts: generator.complete(prompts, self.new, size), plan)

    def _transformers(self, name: str) -> Run:
        if "model" not in self.theirs:
            self.theirs["model"] = _Transformers(self.base.folder, self.generator, self.new)
        return lambda prompts: self.theirs["model"](prompts, **TRANSFORMERS[name])


class _Transformers:
    """Decoding by transformers, one prompt at a time, in the same dtype; its seconds include prefill."""

    def __init__(self, folder: Path, generator: Generator, new: int):
        try:
            import torch
        except ImportError as error:
            raise UserError("--plans transformers needs PyTorch: pip install torch.") from error
        from transformers import AutoModelForCausalLM

        self.torch, self.new, self.context = torch, new, generator.g.max_positions
        self.stops = list(generator.stops)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, str(generator.dtype)))

    def __call__(self, prompts: list[list[int]], **options: Any) -> list[Completion]:
        done = []
        for ids in prompts:
            begin = time.perf_counter()
            with self.torch.no_grad():
                out = self.model.generate(
                    self.torch.tensor([ids]),
                    attention_mask=self.torch.ones(1, len(ids), dtype=self.torch.long),
                    max_new_tokens=min(self.new, self.context - len(ids)),
                    do_sample=False,
                    eos_token_id=self.stops,
                    pad_token_id=0,
                    **options,
                )
            seconds = time.perf_counter() - begin
            done.append(Completion(out[0, len(ids) :].tolist(), [], 0, [], 0.0, seconds, ids))
        return done


PLAIN = str(plain())
