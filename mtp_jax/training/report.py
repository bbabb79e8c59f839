"""What `mtp_jax.evaluate` reports: held-out figures of a base model or of an adapter, as numbers, tables and a plot."""

import hashlib
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from rich.console import Console
from rich.table import Table

from mtp_jax import sharding
from mtp_jax.config import Evaluation, Mesh, Source
from mtp_jax.data.documents import Document
from mtp_jax.data.held_out import held_out_batches
from mtp_jax.data.sources import source_documents, split
from mtp_jax.errors import UserError
from mtp_jax.files import read_json
from mtp_jax.model.base import Base
from mtp_jax.model.decoder import Decoder
from mtp_jax.model.weights import Params
from mtp_jax.mtp.adapter import adapter_table
from mtp_jax.mtp.adapter_folder import Adapter
from mtp_jax.mtp.blocks import Anchors
from mtp_jax.mtp.losses import LossTerms, MultiTokenLoss
from mtp_jax.training.evaluation import AdapterEvaluation, NextTokenEvaluation
from mtp_jax.training.objectives import NextToken, make_decoder

# What a model folder may hold: names and sha256 digests of the documents it was trained on.
TRAINING_FILES = "training_files.json"
_STDLIB_SHARE = 0.05  # held out of python-stdlib by default, as in training
_LONGEST = 512  # rows of a sequence by default
_LOSS_CHUNK = 2048
_HEADS = (("agreement", "sampler head"), ("agreement_base", "base head"))
_ANCHORS = 64  # blocks in a sequence, as in training by default


class Sequences(NamedTuple):
    """How documents are cut into batches."""

    length: int  # T
    batch_size: int
    batches: int | None  # at most so many; None for all


class HeldOut(NamedTuple):
    """Documents to evaluate on."""

    documents: list[Document]
    left_out: int  # that the model was trained on, under whatever name


def find_held_out(base: Base, text: str | None, separator: str | None, share: float | None) -> HeldOut:
    """The held-out documents of a text source, or of python-stdlib, without those the model was trained on.

    Args:
        share: held out by name; by default all of `text`, and a twentieth of python-stdlib.
    Raises:
        UserError: a source that cannot be read, or no document left.
    """
    if text is None:
        found, usual = source_documents(Source(kind="python-stdlib")), _STDLIB_SHARE
    else:
        found, usual = source_documents(Source(kind="text", path=text, separator=separator), "--text"), 1.0
    _, held = split(found, usual if share is None else share)
    listed = base.folder / TRAINING_FILES
    trained = set(read_json(listed).values()) if listed.is_file() else set()
    fresh = [document for document in held if hashlib.sha256(document.text().encode()).hexdigest() not in trained]
    if not fresh:
        raise UserError(f"no held-out document to evaluate on ({len(held)} held out).")
    return HeldOut(fresh, len(held) - len(fresh))


def sequence_length(base: Base, adapter: Adapter | None, asked: int | None) -> int:
    """The length asked for, or the model's context, at most 512.

    Raises:
        UserError: longer than the context, or without room for a block of the adapter's masks.
    """
    context = base.g.max_positions
    length = min(context, _LONGEST) if asked is None else asked
    if not 2 <= length <= context:
        raise UserError(f"--sequence-length {length}: should be from 2 to the model's context of {context}.")
    if adapter is not None and length <= adapter.shape.masks:
        raise UserError(
            f"--sequence-length {length}: is shorter than a block: one real token and the adapter's "
            f"{adapter.shape.masks} masks."
        )
    return length


def base_figures(base: Base, held: HeldOut, of: Sequences, dtype: DTypeLike) -> dict[str, Any]:
    """Numbers of documents, and what `NextTokenEvaluation` gives."""
    objective = NextToken(Decoder(base.g, dtype), _LOSS_CHUNK)
    batches = held_out_batches(held.documents, base.tokenizer, of.batch_size, of.length, of.batches)
    with jax.default_matmul_precision("highest" if dtype == jnp.float32 else None):
        figures = NextTokenEvaluation(objective, jax.device_put)(base.load(dtype), batches)
    return {"documents": len(held.documents), "left_out": held.left_out, **figures}


def adapter_figures(
    base: Base, adapter: Adapter, held: HeldOut, of: Sequences, prompts: int, dtype: DTypeLike
) -> dict[str, Any]:
    """What `AdapterEvaluation` gives, as training reports it; tokens per step are estimated on so many prompts."""
    mesh = sharding.make_mesh(Mesh())
    with sharding.on(mesh):
        decoder = make_decoder(base.g, dtype, of.length, mesh)
        objective = MultiTokenLoss(decoder, adapter.shape, LossTerms(), _LOSS_CHUNK)
        frozen: Params = {"params": base.load(dtype, partial(sharding.weight_sharding, mesh))}
        if adapter.shape.vocabulary is not None:
            frozen["vocabulary"] = sharding.put(adapter.arrays["vocabulary"], sharding.replicated(mesh))
        placed = sharding.table_sharding(mesh, adapter_table(base.g, adapter.shape))
        trained = jax.tree.map(sharding.put, {name: adapter.arrays[name] for name in placed}, placed)
        wanted = Evaluation(prompts=prompts)
        place, step = lambda batch: jax.device_put(dict(batch)), 1
        evaluate = AdapterEvaluation(base, frozen, objective, mesh, place, wanted, held.documents, step)
        anchors = Anchors(min(_ANCHORS, of.length), 0, adapter.shape.noise, adapter.shape.masks)
        batches = held_out_batches(held.documents, base.tokenizer, of.batch_size, of.length, of.batches, anchors)
        return evaluate(trained, batches)


# ---- in print


def print_base(figures: dict[str, Any], length: int) -> None:
    """Loss and accuracy, and what they are means over."""
    left_out = f"{figures['left_out']} more left out: the model was trained on them"
    print(f"{figures['documents']} held-out documents ({left_out})")
    print(f"held-out loss {figures['loss']:.4f} nats per token, next-token accuracy {figures['accuracy']:.4f}")
    print(f"over {figures['tokens']} tokens in sequences of {length}")


def print_table(figures: dict[str, Any], console: Console) -> None:
    """Agreement by offset, and estimated tokens per step by number of masks."""
    agreement = figures["agreement" if "agreement" in figures else "agreement_base"]
    offsets = Table("offset", *(str(j + 1) for j in range(len(agreement))), title="agreement with the base model")
    for name, label in _HEADS:
        if name in figures:
            offsets.add_row(label, *(f"{a:.3f}" for a in figures[name]))
    console.print(offsets)
    estimate = figures.get("tokens_per_step", {})
    steps = Table("masks", *estimate, title="estimated tokens per step (1 without drafts)")
    steps.add_row("quadratic decoding", *(f"{value:.2f}" for value in estimate.values()))
    if engine := figures.get("tokens_per_pass_of_two"):
        steps.add_row("an engine, per pass", *(f"{value:.2f}" for value in engine.values()))
    console.print(steps)


def plot(figures: dict[str, Any], file: Path) -> None:
    """Both tables as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    picture, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, label in _HEADS:
        if name in figures:
            left.plot(range(1, len(figures[name]) + 1), figures[name], marker="o", label=label)
    left.set(xlabel="offset j of the mask", ylabel="agreement with the base model", ylim=(0, 1))
    left.legend()
    estimate = figures.get("tokens_per_step", {})
    right.bar(list(estimate), list(estimate.values()))
    right.axhline(1, color="black", linewidth=0.8)
    right.set(xlabel="masks", ylabel="estimated tokens per step")
    picture.savefig(file, dpi=120)
    pyplot.close(picture)
