"""Noisy adapters, exported folders, and the exported code as a module."""

import importlib.util
import sys
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

import mtp_jax.exporting
from mtp_jax.model.base import open_base
from mtp_jax.model.weights import PROJECTIONS
from mtp_jax.mtp.adapter import AdapterShape, adapter_table
from mtp_jax.mtp.adapter_folder import write_adapter

CODE = Path(mtp_jax.exporting.__file__).parent / "custom_generate" / "generate.py"


def noisy_adapter(base, out, masks=3, sampler="residual", targets=PROJECTIONS, gated=True, vocabulary=None, rows=None):
    """An adapter folder full of noise, norms around 1, for the base model of a folder; `vocabulary` is drafted.

    With `rows` its mask rows hold random tokens.
    """
    opened = open_base(str(base))
    g = opened.g
    shape = AdapterShape(masks, 4, 8.0, targets, sampler, gated, None if vocabulary is None else len(vocabulary), rows)
    random, items = np.random.default_rng(5), []
    for weight in adapter_table(g, shape):
        noise = random.standard_normal(weight.shape).astype(np.float32)
        if weight.path[-1] == "scale":
            noise = 1 + 0.3 * noise
        elif weight.path[-1] != "masks":
            noise *= 1.1 / weight.shape[-2] ** 0.5 if len(weight.shape) > 1 else 0.2
        items.append((weight.path, noise))
    tree = unflatten_dict(dict(items))
    if vocabulary is not None:
        tree["vocabulary"] = np.asarray(vocabulary, np.int32)
    pointer = {"name": str(base), "fingerprint": opened.fingerprint}
    write_adapter(out, g, shape, tree, pointer, {"steps": 1, "held_out": {"tokens_per_step": {"1": 1.5}}})
    return shape, jax.tree.map(np.asarray, tree)


def exported_code(name="exported_code"):
    """The module custom_generate/generate.py, not from the modules cache."""
    spec = importlib.util.spec_from_file_location(name, CODE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def export(adapter, out, model=None, **options):
    """Export an adapter as the command does."""
    from mtp_jax.exporting.folder import write_export
    from mtp_jax.exporting.source import find_source

    write_export(find_source(None, str(adapter), None if model is None else str(model)), Path(out), **options)
    return Path(out)
