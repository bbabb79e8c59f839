"""The training step as `mtp_jax.train` runs it, with random weights and tokens."""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from train_step import TRIO_17M, LiteralPacking, Step, distance, make_batch

from mtp_jax import sharding
from mtp_jax.config import Config
from mtp_jax.config_file import validate
from mtp_jax.model.geometry import Geometry
from mtp_jax.model.weights import init_params
from mtp_jax.mtp.adapter import init_adapter
from mtp_jax.mtp.losses import MultiTokenLoss
from mtp_jax.training.flops import model_flops, peak_flops
from mtp_jax.training.program import build_program
from mtp_jax.training.step import TrainState
from on_device import Cases, Setting
from on_device.geometries import TINY, file_of, geometry

_STEPS = 4


def cases(setting: Setting) -> Cases:
    """Geometries, masks and anchors; attention kernels; two streams against the literal packing."""
    length, anchors = (64, 8) if setting.tiny else (2048, 256)
    for name, masks, blocks, attention in _order(setting.training, anchors):
        title = f"{name}, {masks} masks, {blocks} anchors, attention {attention}"
        arguments = (setting, name, masks, blocks, length, attention)
        yield title, lambda arguments=arguments: measure(*arguments)
    yield "against the literal packing", lambda: against_packing(*((TINY, 64) if setting.tiny else (TRIO_17M, 512)))


def _order(geometries: tuple[str, ...], anchors: int) -> list[tuple[str, int, int | str, str]]:
    found: list[tuple[str, int, int | str, str]] = [(name, 8, anchors, "auto") for name in geometries]
    for name in geometries:
        found += [(name, 8, anchors, "xla"), (name, 4, anchors, "auto"), (name, 8, "all", "auto")]
    return found


def config_of(setting: Setting, name: str, masks: int, anchors: int | str, length: int, attention: str) -> Config:
    """The config whose step is measured: one sequence for each device, soft targets and the residual sampler."""
    tree = {
        "objective": "multi_token",
        "output_dir": str(setting.out / "never written"),
        "model": {
            "path": "never loaded",
            "geometry": str(file_of(name, setting.out)),
            "compute_dtype": setting.dtype,
            "remat": "full",
            "attention": attention,
        },
        "data": {"sources": [{"kind": "text", "path": "never read"}]},
        "lora": {"rank": setting.rank},
        "mtp": {"masks": masks},
        "train": {
            "steps": 100,
            "batch_size": jax.device_count(),
            "sequence_length": length,
            "anchors": anchors,
            "learning_rate": 1e-4,
        },
        "mesh": {"data": 1, "fsdp": -1},
    }
    return validate(tree, "benchmarks/accelerator.py")


def measure(setting: Setting, name: str, masks: int, anchors: int | str, length: int, attention: str) -> dict[str, Any]:
    """Seconds of a step, and what that is in tokens, mask rows, share of peak arithmetic, and memory."""
    config, g = config_of(setting, name, masks, anchors, length, attention), geometry(name)
    mesh = sharding.make_mesh(config.mesh)
    with sharding.on(mesh):
        program = build_program(config, g, mesh)
        objective = program.objective
        assert isinstance(objective, MultiTokenLoss) and program.frozen is not None
        dtype = jnp.dtype(config.model.compute_dtype)
        placed = jax.tree.map(lambda leaf: leaf.sharding, program.frozen["params"])
        params = jax.jit(lambda key: init_params(g, key, dtype), out_shardings=placed)(jax.random.key(0))
        draw = jax.jit(
            lambda table, key: init_adapter(g, objective.shape, table, key), out_shardings=program.placed.trained
        )
        trained = draw(params["embed"]["embedding"], jax.random.key(1))
        optimizer = jax.jit(program.tx.init, out_shardings=program.placed.optimizer)(trained)
        state = TrainState(sharding.put(jnp.int32(0), program.placed.step), trained, optimizer)
        blocks = length if anchors == "all" else int(anchors)
        batch = program.place(make_batch(config.train.batch_size, length, blocks, g.V))  # type: ignore[arg-type]
        begin = time.perf_counter()
        compiled = program.step.lower(state, {"params": params}, batch).compile()
        compiling = time.perf_counter() - begin
        memory, seconds = compiled.memory_analysis(), []
        for _ in range(_STEPS + 1):
            begin = time.perf_counter()
            state, values = compiled(state, {"params": params}, batch)
            jax.block_until_ready(values)
            seconds.append(time.perf_counter() - begin)
        place = "train", f"{Path(name).stem}_{masks}_masks_{anchors}_anchors_{attention}"
        setting.trace(lambda: jax.block_until_ready(compiled(state, {"params": params}, batch)), *place)
    middle = statistics.median(seconds[1:])
    needed = model_flops(objective, config.train.batch_size, length, blocks)
    peak = peak_flops(jax.devices()[0])
    tokens, rows = config.train.batch_size * length, int(values["mask_rows"])
    return {
        "seconds": middle,
        "range": [min(seconds[1:]), max(seconds[1:])],
        "tokens_per_second": tokens / middle,
        "mask_rows_per_second": rows / middle,
        "model_tflop": needed / 1e12,
        "of_peak": None if peak is None else needed / middle / peak / jax.device_count(),
        "kernel": objective.model.attention,
        "temporaries_bytes": memory.temp_size_in_bytes,
        "peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
        "compile_seconds": compiling,
        "loss": float(values["loss"]),
    }


def against_packing(config: dict[str, Any], length: int) -> dict[str, Any]:
    """Two streams and the literal packing of all rows, in turns, in float32."""
    g = Geometry.from_config(config)
    wanted = argparse.Namespace(masks=8, rank=32, batch=1, target="data", remat="full", loss_chunk=1024)
    sides = [Step(kind, g, wanted, length, length) for kind in (MultiTokenLoss, LiteralPacking)]
    times = [[side.seconds() for side in sides] for _ in range(3)]
    ours, theirs = (statistics.median(of) for of in zip(*times, strict=True))
    return {
        "length": length,
        "seconds": ours,
        "seconds_of_packing": theirs,
        "faster": theirs / ours,
        "gradients_differ_by": distance(sides[0].gradient, sides[1].gradient),
    }
