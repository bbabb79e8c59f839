"""A training run from config to finished model, and from wherever an earlier attempt was cut off."""

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import yaml

from mtp_jax.config import Config, dump
from mtp_jax.data.pipeline import Batch, held_out_batches, training_batches
from mtp_jax.data.sources import read_sources
from mtp_jax.data.supervision import check_supervision
from mtp_jax.errors import FULL_DISK, UserError
from mtp_jax.model.folder_writer import parameter_count
from mtp_jax.training import sharding
from mtp_jax.training.base import check_base, find_base
from mtp_jax.training.checkpoints import Checkpoints
from mtp_jax.training.journal import Journal, Trackers, check_trackers
from mtp_jax.training.program import build_program, check_divides
from mtp_jax.training.progress import ProgressBar
from mtp_jax.training.recorder import Recorder
from mtp_jax.training.step import TrainState
from mtp_jax.training.tasks import MultiTokenTask, check_adapter, make_task

# A run may continue with other values of these; anything else would change what it computes.
_FREE = ("output_dir", "checkpoints", "logging", "compilation_cache", "mesh")


def train(config: Config) -> Path:
    """Run `config`, continuing from the newest checkpoint in its output folder; returns the finished model's folder.

    Raises:
        UserError: input that cannot be trained on, an output folder of another run, a loss that is not finite.
    """
    # ---- where everything lies, checked before anything is written
    mesh = sharding.make_mesh(config.mesh)
    check_divides(config, mesh)
    run_dir = Path(config.output_dir).expanduser()
    training, held_out = read_sources(config.data)
    if config.evaluation.every is not None and not held_out:
        raise UserError(
            "evaluation.every is set, but no document fell to the held-out part: add documents, set "
            "data.sources.N.separator to part a file into documents, raise data.held_out, or unset evaluation.every."
        )
    length, too_long = config.train.sequence_length, config.data.too_long
    supervision = check_supervision(training, check_base(config), length, too_long)
    check_adapter(config)
    check_trackers(config)
    enable_compilation_cache(config.compilation_cache)

    with (
        _claim(run_dir, config),
        sharding.on(mesh),
        Checkpoints(run_dir / "checkpoints", config.checkpoints) as checkpoints,
    ):
        # ---- model, data, objective
        base = find_base(config, training, run_dir)
        spread = sharding.batch_sharding(mesh)

        def place(batch: Batch) -> dict[str, jax.Array]:
            return {name: jax.device_put(value, spread) for name, value in batch.items() if name != "documents"}

        program = build_program(config, base.g, mesh)
        task = make_task(config, base, program, place)
        batches, documents = training_batches(
            training,
            [1.0] if config.data.continuations else [source.weight for source in config.data.sources],
            base.tokenizer,
            config.train.batch_size,
            config.train.sequence_length,
            config.seed,
            program.anchors,
            too_long=too_long,
        )

        # ---- state
        start = checkpoints.latest()
        if start is not None:
            state = checkpoints.restore(start, program.state, batches)
        else:
            params = task.start()
            optimizer = jax.jit(program.tx.init, out_shardings=program.placed.optimizer)(params)
            state = TrainState(jax.device_put(jnp.int32(0), program.placed.step), params, optimizer)
        start = start or 0
        if config.evaluation.every is not None and isinstance(task, MultiTokenTask):
            task.choose_prompts(held_out)

        # ---- records, cut back to where the state is
        metrics, timing = Journal(run_dir / "metrics.jsonl"), Journal(run_dir / "timing.jsonl")
        metrics.cut(start)
        timing.cut(start)
        trackers = Trackers(config, run_dir, start)

        # ---- steps
        def held_out_figures() -> dict[str, Any]:
            held = held_out_batches(
                held_out,
                base.tokenizer,
                config.train.batch_size,
                config.train.sequence_length,
                config.evaluation.batches,
                program.anchors,
            )
            return {f"held_out_{name}": value for name, value in task.evaluate(state.trained, held).items()}

        with ProgressBar(config.train.steps, start) as progress:
            if start:
                progress.say(f"resuming {run_dir} from step {start}")
            for line in supervision:
                progress.say(line)
            progress.say(
                f"training {parameter_count(state.trained):,} parameters, {parameter_count(task.frozen):,} frozen"
            )
            record = Recorder(config, metrics, timing, trackers, progress, documents)
            for step in range(start + 1, config.train.steps + 1):
                waited = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - waited
                _check_trainable(batch, step)
                state, values = program.step(state, task.frozen, place(batch))
                record.step(step, values, batch, waited)  # reads the step before, while this one runs
                due = step == config.train.steps
                if config.evaluation.every and (due or step % config.evaluation.every == 0):
                    record.finish()
                    record.line(step, held_out_figures())
                if due or step % config.checkpoints.every == 0:
                    record.finish()  # nothing after a non-finite loss is ever saved
                    metrics.sync()  # nor a state whose records could still be lost
                    timing.sync()
                    checkpoints.save(state, batches)
            record.finish()
            progress.say(batches.summary())

        # ---- the finished model
        checkpoints.finish()
        out = task.write(run_dir, state.trained, metrics.last_figures())
        for journal in (metrics, timing, trackers):
            journal.close()
    return out


def _check_trainable(batch: Batch, step: int) -> None:
    if "anchors" in batch and step == 1 and (batch["anchors"] < 0).all():
        raise UserError(
            "the first batch has no supervised token behind which a block of masks could stand: the documents are "
            "shorter than three tokens, or none of their tokens is supervised."
        )


@contextlib.contextmanager
def _claim(run_dir: Path, config: Config) -> Iterator[None]:
    """Within: the output folder is this run's and no other process's. The system lifts the lock when a process ends."""
    written = run_dir / "config.yaml"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / ".lock").open("a")
    except OSError as error:
        if error.errno in FULL_DISK:
            raise
        raise UserError(f"output_dir: {run_dir} cannot be written ({error.strerror}).") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"output_dir: {run_dir} is in use by another run that has not ended.") from error
        if written.exists():
            _check_same_run(written, config)
        part = run_dir / ".config.yaml.part"
        part.write_text(dump(config), encoding="utf-8")
        part.replace(written)
        yield


def _check_same_run(written: Path, config: Config) -> None:
    try:
        before = yaml.safe_load(written.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        before = None
    if not isinstance(before, dict):
        raise UserError(
            f"output_dir: {written} is damaged; choose another output_dir, or delete this one to start afresh."
        )
    changed = [path for path in _changes(before, config.model_dump()) if path.split(".")[0] not in _FREE]
    if changed:
        raise UserError(
            f"output_dir: {written.parent} holds a run with other values of {', '.join(changed)}; "
            "choose another output_dir, or delete this one to start afresh."
        )


def _changes(a: Any, b: Any, path: str = "") -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            yield from _changes(a.get(key), b.get(key), f"{path}.{key}" if path else key)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _changes(x, y, f"{path}.{i}")
    elif a != b:
        yield path


def enable_compilation_cache(folder: str | None) -> None:
    """Keep compiled programs between runs."""
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
