"""What an adapter foresees on held-out text: figures, a table and a plot."""

from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from mtp_jax import sharding
from mtp_jax.config_file import validate
from mtp_jax.data.documents import Document
from mtp_jax.data.held_out import held_out_batches
from mtp_jax.mtp.adapter_folder import find_adapter, read_shape
from mtp_jax.runs.folder import RunFolder
from mtp_jax.training.base import find_base
from mtp_jax.training.program import build_program
from mtp_jax.training.tasks import MultiTokenTask


def adapter_figures(
    model: str,
    adapter: str,
    documents: list[Document],
    sequence_length: int,
    batch_size: int,
    batches: int | None,
    prompts: int,
    dtype: str,
) -> dict[str, Any]:
    """Loss terms, teacher-forced agreement by offset, and estimated tokens per step, as training reports them."""
    shape = read_shape(find_adapter(adapter))
    config = validate(
        {
            "objective": "multi_token",
            "output_dir": "unused",
            "model": {"path": model, "adapter": adapter, "compute_dtype": dtype},
            "data": {"sources": [{"kind": "python-stdlib"}]},
            "lora": {
                "rank": shape.rank,
                "alpha": shape.alpha,
                "targets": list(shape.targets),
                "gated": shape.gated,
            },
            "mtp": {"masks": shape.masks, "sampler": shape.sampler},
            "train": {
                "steps": 1,
                "batch_size": batch_size,
                "sequence_length": sequence_length,
                "learning_rate": 1.0,
            },
            "evaluation": {"prompts": prompts},
        },
        "evaluate",
    )
    mesh = sharding.make_mesh(config.mesh)
    with sharding.on(mesh):
        base = find_base(config, [], RunFolder(config.output_dir))
        program = build_program(config, base.g, mesh)
        task = MultiTokenTask(config, base, program, lambda batch: jax.device_put(dict(batch)))
        trained = task.start()
        task.choose_prompts(documents)
        held = held_out_batches(documents, base.tokenizer, batch_size, sequence_length, batches, program.anchors)
        return task.evaluate(trained, held)


def print_table(figures: dict[str, Any], console: Console) -> None:
    """Agreement by offset, and estimated tokens per step by number of masks."""
    agreement = figures.get("agreement", figures["agreement_base"])
    offsets = Table("offset", *(str(j + 1) for j in range(len(agreement))), title="agreement with the base model")
    if "agreement" in figures:
        offsets.add_row("sampler head", *(f"{a:.3f}" for a in figures["agreement"]))
    offsets.add_row("base head", *(f"{a:.3f}" for a in figures["agreement_base"]))
    console.print(offsets)
    estimate = figures.get("tokens_per_step", {})
    steps = Table("masks", *estimate, title="estimated tokens per step (1 without drafts)")
    steps.add_row("quadratic decoding", *(f"{value:.2f}" for value in estimate.values()))
    console.print(steps)


def plot(figures: dict[str, Any], file: Path) -> None:
    """Both as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    picture, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, label in (("agreement", "sampler head"), ("agreement_base", "base head")):
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
