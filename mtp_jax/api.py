"""`load`: from the name of a model to a generator; `with_draft_model`: and from a second one to its drafts."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mtp_jax import sharding
from mtp_jax.decoding.drafters import DraftModel
from mtp_jax.decoding.forward import Forward, Variables
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
    weights: str = "stored",
    activations: str = "float",
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
        weights: "int8" quantises projections and head of the base while they are loaded. The output is then that of the
            quantised model.
        activations: "int8" rounds what meets an int8 base's matrices too, block by block, which is faster on CPUs with
            AVX-512 VNNI. Drafts are verified by the same arithmetic.
    Raises:
        UserError: an unusable model or adapter, an adapter without gate, which changes the base's output, a plan that
            the adapter has too few masks for, or activations that cannot be had here.
    """
    base = open_base(model, weights=weights)
    found = None if adapter is None else open_adapter(adapter, base)
    if found is not None and not found.shape.gated:
        raise UserError(f"{adapter}: was trained without gate (lora.gated: false) and cannot decode losslessly.")
    parts = None if found is None else (found.shape, found.arrays)
    identity = base.fingerprint + ("" if found is None else found.digest)
    options, kept = Options(plan or plain(), shortlist), jnp.dtype(dtype or default_dtype())
    return generator(
        base,
        options,
        kept,
        parts,
        mesh,
        identity=identity,
        generation_config=generation_config,
        activations=activations,
    )


def generator(
    base: Base,
    options: Options,
    dtype: DTypeLike,
    adapter: tuple[AdapterShape, Params] | None = None,
    mesh: jax.sharding.Mesh | None = None,
    forward: Forward | None = None,
    identity: str = "",
    generation_config: bool = True,
    activations: str = "float",
) -> Generator:
    """A generator from what is open already; `forward` is by default the fastest here, the rest as in `load`."""
    tokenizer = base.tokenizer  # refused before weights are read
    settings = read_settings(base.generation, base.g.V, str(base.folder)) if generation_config else NO_SETTINGS
    if settings.ignored:
        warn(
            f"{base.folder}: {', '.join(settings.ignored)} of its generation config changes the output and is ignored."
        )
    forward, variables = _weights(base, dtype, adapter, mesh, forward, activations)
    return Generator(forward, variables, tokenizer, base.stops, options, mesh, identity, settings)


def with_draft_model(generator: Generator, draft: Base, drafts: int) -> Generator:
    """A generator of the same weights that verifies `drafts` tokens of a smaller model in each step.

    Raises:
        UserError: less than one draft, or a model whose tokenizer has other tokens or ids.
    """
    if drafts < 1:
        raise UserError(f"{draft.name}: should draft at least 1 token in each step, not {drafts}.")
    ours, theirs = (
        {id_: token for token, id_ in of.get_vocab().items()} for of in (generator.tokenizer, draft.tokenizer)
    )
    others = sorted(id_ for id_ in ours.keys() | theirs.keys() if ours.get(id_) != theirs.get(id_))
    if others:
        first, second = (repr(of[others[0]]) if others[0] in of else "none" for of in (theirs, ours))
        raise UserError(
            f"{draft.name}: cannot draft for {generator.tokenizer.name_or_path}, whose tokenizer has other tokens: "
            f"id {others[0]} is {first} here and {second} there; give a model of the same tokenizer."
        )
    forward, variables = _weights(draft, generator.dtype, None, generator.mesh, None)
    options = generator.options.using(drafter=DraftModel(drafts, forward))
    together = {**generator.variables, "draft": variables}
    of_base = generator.tokenizer, generator.stops
    return Generator(
        generator.forward, together, *of_base, options, generator.mesh, generator.identity, generator.settings
    )


def _weights(
    base: Base,
    dtype: DTypeLike,
    adapter: tuple[AdapterShape, Params] | None,
    mesh: jax.sharding.Mesh | None,
    forward: Forward | None,
    activations: str = "float",
) -> tuple[Forward, Variables]:
    """The forward pass, by default the fastest here, and weights as it reads them."""
    from mtp_jax.cpu import fastest_forward  # the only place that knows of more than one

    shape, arrays = adapter or (None, None)
    if forward is None:
        forward = fastest_forward(Decoder(base.g, dtype, scanned=False), shape, mesh is None, activations)
    if arrays is not None and mesh is not None:  # small beside the base
        arrays = jax.device_put(arrays, sharding.replicated(mesh))
    params = base.load(dtype, None if mesh is None else lambda weight: sharding.weight_sharding(mesh, weight))
    return forward, forward.prepare(unstack_layers(params), arrays)


def default_dtype() -> str:
    """What is computed in unless the user says otherwise."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"
