"""A training run from config to finished model, resuming wherever an earlier attempt was cut off."""

import os
import shutil
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mtp_jax import sharding, storage
from mtp_jax.config import Config
from mtp_jax.data.batches import training_batches
from mtp_jax.data.held_out import held_out_batches
from mtp_jax.data.sources import check_supervision, read_sources
from mtp_jax.errors import Interrupted, UserError, warn
from mtp_jax.files import cache_folder, whole_or_absent
from mtp_jax.model.folder_writer import parameter_count
from mtp_jax.runs import processes
from mtp_jax.runs.checkpoints import Checkpoints
from mtp_jax.runs.claim import claim
from mtp_jax.runs.folder import RunFolder
from mtp_jax.runs.interruption import Interruption
from mtp_jax.runs.profile import Trace, check_profiler
from mtp_jax.runs.progress import ProgressBar
from mtp_jax.runs.records import Best, Journal, Trackers, check_trackers
from mtp_jax.training.flops import peak_flops
from mtp_jax.training.program import build_program, check_divides
from mtp_jax.training.recorder import Recorder
from mtp_jax.training.start import draft_vocabulary, starting_adapter, starting_base, with_tokenizer
from mtp_jax.training.step import TrainState
from mtp_jax.training.tasks import make_task


def train(config: Config, profile: str | None = None) -> str:
    """Run `config`, continuing from the newest checkpoint in its output folder; returns the finished model's folder.

    Args:
        profile: a folder for a trace of a few steps, once all is compiled; it does not change the run.
    Raises:
        UserError: input that cannot be trained on, an output folder of another run, a loss that is not finite, a
            profile that JAX cannot write here.
        Interrupted: by SIGTERM or Ctrl-C; the last step is saved.
    """
    if profile is not None:
        check_profiler()
    # ---- mesh
    mesh = sharding.make_mesh(config.mesh)
    check_divides(config, mesh)
    batch_size, length = config.train.batch_size, config.train.sequence_length
    here = sharding.sequences_here(sharding.batch_sharding(mesh), batch_size)  # of each batch, fed by this process

    # ---- data, base model and adapter: all is checked before anything is written
    run = RunFolder(config.output_dir)
    training, held_out = read_sources(config.data)
    if config.evaluation.every is not None and not held_out:
        raise UserError(
            "evaluation.every is set, but no document fell to the held-out part: add documents, set "
            "data.sources.N.separator to split a file into documents, raise data.held_out, or unset evaluation.every."
        )
    base = starting_base(config)
    supervision = check_supervision(training, base.tokenizer, length, config.data.too_long, held_out)
    adapter = starting_adapter(config, base)
    check_trackers(config)
    enable_compilation_cache(config.compilation_cache)

    with (
        claim(run, config) if processes.is_first() else nullcontext(),
        run,
        sharding.on(mesh),
        Checkpoints(run, config.checkpoints, here[0]) as checkpoints,
    ):
        processes.from_first(lambda: None)  # the folder is ours
        _bring_records(run)
        processes.log_to(run.path / "logs")

        # ---- program, and batches for it
        base = with_tokenizer(base, config, training, run)
        program = build_program(config, base.g, mesh)
        weights = [1.0] if config.data.continuations else [source.weight for source in config.data.sources]
        vocabulary = draft_vocabulary(config, base, adapter, training, weights, run)
        task = make_task(config, base, adapter, vocabulary, program, held_out)
        batches, documents = training_batches(
            *(training, weights, base.tokenizer, batch_size, length, config.seed, program.anchors),
            too_long=config.data.too_long,
            sequences=here,
        )

        def evaluate(trained: Any) -> dict[str, Any]:
            limit = config.evaluation.batches
            held = held_out_batches(
                held_out, base.tokenizer, batch_size, length, limit, program.anchors, sequences=here
            )
            return {f"held_out_{name}": value for name, value in task.evaluate(trained, held).items()}

        # ---- state: of the newest checkpoint, or fresh
        start = checkpoints.latest()
        if start is not None:
            state = checkpoints.restore(start, program.state, batches)
        else:
            params = task.start()
            optimizer = jax.jit(program.tx.init, out_shardings=program.placed.optimizer)(params)
            state = TrainState(sharding.put(np.int32(0), sharding.replicated(mesh)), params, optimizer)
        start = start or 0

        # ---- records, cut back to where the state is
        metrics, timing = Journal(run.path / "metrics.jsonl"), Journal(run.path / "timing.jsonl")
        metrics.cut(start)
        timing.cut(start)
        trackers = Trackers(config, run.path, start)
        best = Best(processes.from_first(metrics.lines) if config.checkpoints.keep_best else [])

        # ---- loop
        with (
            ProgressBar(config.train.steps, start, quiet=not processes.is_first()) as progress,
            Interruption(mesh, progress.say) as interruption,
            Trace(profile, start) as trace,
        ):
            if start:
                progress.say(f"resuming {run.name()} from step {start}")
            for line in supervision:
                progress.say(line)
            frozen = 0 if task.frozen is None else parameter_count(task.frozen["params"])
            progress.say(f"training {parameter_count(state.trained):,} parameters, {frozen:,} frozen")
            mask_rows = timing.at(start, "mask_rows") if start else 0
            peak = peak_flops(mesh.devices.flat[0])
            peak = None if peak is None else peak * mesh.size
            record = Recorder(
                *(config, metrics, timing, trackers, progress, documents, mask_rows),
                flops_at=program.flops_at,
                peak=peak,
            )
            for step in range(start + 1, config.train.steps + 1):
                trace.before(step)
                waited = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - waited
                placed = program.place(batch)
                if step == 1:
                    _check_trainable(placed, sharding.replicated(mesh))
                state, values = program.step_at(step - 1)(state, task.frozen, placed)
                trace.after(step, values)
                record.step(step, values, batch, waited)  # reads the step before, while this one runs
                stop = interruption.requested()
                last = step == config.train.steps
                better = False
                if config.evaluation.every and (last or step % config.evaluation.every == 0):
                    record.finish()
                    figures = evaluate(state.trained)
                    record.line(step, figures)
                    better = config.checkpoints.keep_best and best.offer(step, figures)
                if last or stop or better or step % config.checkpoints.every == 0:
                    record.finish()  # nothing after a non-finite loss is ever saved
                    metrics.sync()  # nor a state whose records could still be lost
                    timing.sync()
                    checkpoints.save(state, batches, best.step)
                if stop and not last:
                    checkpoints.finish()
                    raise Interrupted(
                        f"{signal.Signals(stop).name}: stopped after step {step} of {config.train.steps}, which is "
                        "saved; rerun the command to continue from there.",
                        stop,
                    )
            record.finish()
            progress.say(batches.summary())

            # ---- result, and beside it that of the best step
            checkpoints.finish()
            out = task.write(run.path, state.trained, metrics.last_figures(), record.mask_rows)
            best_folder = run.path / "best"
            if best.step == config.train.steps:
                if processes.is_first():
                    _link(out, best_folder / out.name)
            elif best.step is not None and checkpoints.is_whole(best.step):
                jax.tree.map(lambda leaf: leaf.delete(), state)  # never two states at a time
                state = checkpoints.restore(best.step, program.state)
                task.write(best_folder, state.trained, best.figures, timing.at(best.step, "mask_rows"))
            elif best.step is not None and processes.is_first():
                where = run.name(best_folder)
                warn(f"step {best.step} was the best, but its checkpoint is lost: {where} is not written.")
            if best.step is not None and processes.is_first():
                best.write(run.path / "best.json")
            for journal in (metrics, timing, trackers):
                journal.close()
            if processes.is_first():
                for result in (best_folder / out.name, out):
                    if result.is_dir():
                        run.push_result(result, task.last)
                run.push(run.path / "best.json")
    return run.name(out)


def _link(folder: Path, to: Path) -> None:
    """A second name for a folder's files, which takes no space."""
    with whole_or_absent(to) as part:
        shutil.copytree(folder, part, copy_function=os.link, dirs_exist_ok=True)


def _bring_records(run: RunFolder) -> None:
    """Fetch what an earlier start of a run in a bucket recorded; each process works on its own part."""
    if not processes.is_first():
        run.begin()
        run.pull(run.path / "logs" / f"process-{jax.process_index()}.log")
        return
    for name in ("metrics.jsonl", "timing.jsonl"):
        run.pull(run.path / name)


def _check_trainable(placed: dict[str, Any], everywhere: jax.sharding.Sharding | None) -> None:
    some = jax.jit(lambda anchors: (anchors >= 0).any(), out_shardings=everywhere)
    if "anchors" in placed and not some(placed["anchors"]):
        raise UserError(
            "the first batch has no supervised token behind which a block of masks could stand: the documents are "
            "shorter than three tokens, or none of their tokens is supervised."
        )


def enable_compilation_cache(folder: str | None) -> None:
    """Keep compiled programs between runs, also in a bucket."""
    if folder is None:
        return
    if storage.is_bucket(folder):
        storage.listing(f"{folder}/.any")  # a fault is reported now and in one line, not at each program
        kept: Any = folder
    else:
        kept = cache_folder(folder)
    if kept is not None:
        jax.config.update("jax_compilation_cache_dir", str(kept))
