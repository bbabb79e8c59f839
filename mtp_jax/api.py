"""`load`: from the name of a model to a generator."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mtp_jax import sharding
from mtp_jax.decoding.forward import Forward
from mtp_jax.decoding.generator import Generator
from mtp_jax.decoding.options import Options
from mtp_jax.decoding.plan import BlockPlan, plain
from mtp_jax.decoding.processors import NO_SETTINGS, read_settings
from mtp_jax.errors import UserError, warn
from mtp_jax.model.base import Base, open_base
from mtp_jax.model.decoder import Decoder
from mtp_jax.model.weights import Params, unstack_layers
from mtp_jax.mtp.adapter import AdapterShape
from mtp_jax.mtp.adapter_folder import open_adapter


def load(
    model: str,
    *,
    adapter: str | None = None,
    plan: BlockPlan | None = None,
    dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    shortlist: int | None = 256,
    generation_config: bool = True,
) -> Generator:
    """A generator for a Hugging Face folder, a hub name or bundled:NAME.

    Args:
        adapter: a run's folder, an adapter folder, bundled:NAME, or a hub name.
        plan: plain decoding by default; `decoding.auto.choose_plan` measures which one is fastest.
        dtype: of the computation, float32 on CPU and bfloat16 on accelerators by default.
        mesh: spreads weights over its fsdp and tensor axes (`sharding.make_mesh`); by default all is on one device.
        shortlist: candidates of each mask row that the sampler head scores; None for all tokens.
        generation_config: compute the processors that the base's `generation_config.json` asks for (`Processors`), as
            transformers does; how it samples is then in `generator.settings.sampling`.
    Raises:
        UserError: an unusable model or adapter, an adapter without gate, which changes the base's output, or a plan
            that the adapter has too few masks for.
    """
    base = open_base(model)
    found = None if adapter is None else open_adapter(adapter, base)
    if found is not None and not found.shape.gated:
        raise UserError(f"{adapter}: was trained without gate (lora.gated: false) and cannot decode losslessly.")
    parts = None if found is None else (found.shape, found.arrays)
    identity = base.fingerprint + ("" if found is None else found.digest)
    options, kept = Options(plan or plain(), shortlist), jnp.dtype(dtype or default_dtype())
    return generator(base, options, kept, parts, mesh, identity=identity, generation_config=generation_config)


def generator(
    base: Base,
    options: Options,
    dtype: DTypeLike,
    adapter: tuple[AdapterShape, Params] | None = None,
    mesh: jax.sharding.Mesh | None = None,
    forward: Forward | None = None,
    identity: str = "",
    generation_config: bool = True,
) -> Generator:
    """A generator from what is open already; `forward` is by default the fastest here, the rest as in `load`."""
    from mtp_jax.cpu import fastest_forward  # the only place that knows of more than one

    tokenizer = base.tokenizer  # refused before weights are read
    settings = read_settings(base.generation, base.g.V, str(base.folder)) if generation_config else NO_SETTINGS
    if settings.ignored:
        warn(
            f"{base.folder}: {', '.join(settings.ignored)} of its generation config changes the output and is ignored."
        )
    shape, arrays = adapter or (None, None)
    if forward is None:
        forward = fastest_forward(Decoder(base.g, dtype, scanned=False), shape, whole=mesh is None)
    if arrays is not None and mesh is not None:  # small beside the base
        arrays = jax.device_put(arrays, sharding.replicated(mesh))
    params = base.load(dtype, None if mesh is None else lambda weight: sharding.weight_sharding(mesh, weight))
    variables = forward.prepare(unstack_layers(params), arrays)
    return Generator(forward, variables, tokenizer, base.stops, options, mesh, identity, settings)


def default_dtype() -> str:
    """What is computed in unless the user says otherwise."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"
