"""Hugging Face folders in: read the config, stream tensors into their final sharding."""

import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from mtp_jax.errors import UserError
from mtp_jax.files import read_json
from mtp_jax.model.geometry import Geometry
from mtp_jax.model.int8 import quantise
from mtp_jax.model.weights import EMBED_KEY, UNEMBED_KEY, Params, Weight, weight_table

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
_BUFFERS = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
# What stands in place of "model.", and the head's name: in a model saved without its head, and in the text part of
# one of several modalities, as transformers and its older versions save it. Other parts are not read.
_PREFIXES = (
    ("", UNEMBED_KEY),
    ("model.language_model.", UNEMBED_KEY),
    ("language_model.model.", f"language_model.{UNEMBED_KEY}"),
)
# Files are mapped for one read at a time: pages of a map stay in memory until it is closed.
_READ_BYTES = 4 << 20
_LISTED = 40  # tensors that a message names


@dataclass(frozen=True)
class Stored:
    """Where a tensor of a folder is stored."""

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype


def read_geometry(folder: Path) -> Geometry:
    """The geometry that a folder's `config.json` states."""
    return Geometry.from_config(read_json(folder / "config.json"), str(folder / "config.json"))


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder's safetensors files by name.

    Raises:
        UserError: no safetensors (pickle files are never read), a damaged file, a tensor stored twice or not at all.
    """
    faults: list[str] = []
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise UserError(f"{folder / INDEX}: holds no weight_map from tensor names to files.")
        files = [folder / Path(file).name for file in sorted(set(weight_map.values()))]
    else:
        weight_map = None
        files = [folder / SINGLE] if (folder / SINGLE).is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        instead = f"only pickle files ({', '.join(pickles[:3])}), which are never loaded" if pickles else "no weights"
        raise UserError(
            f"{folder}: holds {instead}; convert the model to safetensors: load it with transformers where you trust "
            "its source, and call save_pretrained."
        )
    found: dict[str, Stored] = {}
    for file in files:
        try:
            with safe_open(file, "numpy") as tensors:
                for key in tensors.keys():  # noqa: SIM118  (not a dict)
                    view = tensors.get_slice(key)
                    if key in found:
                        faults.append(f"{file}: {key} is also stored in {found[key].file.name}.")
                    elif weight_map is not None and weight_map.get(key) != file.name:
                        faults.append(f"{file}: {key} is stored, but {INDEX} says {weight_map.get(key, 'nothing')}.")
                    elif view.get_dtype() not in _DTYPES and not _BUFFERS.search(key):
                        faults.append(
                            f"{file}: {key} is {view.get_dtype()}, but weights must be float32, bfloat16 or float16; "
                            "a quantised checkpoint has to be dequantised first."
                        )
                    else:
                        dtype = _DTYPES.get(view.get_dtype(), np.dtype(np.float32))
                        found[key] = Stored(file, tuple(view.get_shape()), dtype)
        except FileNotFoundError:
            faults.append(f"{file}: is missing, though {INDEX} lists it; download it again.")
        except (SafetensorError, OSError) as error:
            faults.append(f"{file}: damaged or truncated ({error}); download it again.")
    if faults:
        raise UserError(*faults)
    for key in sorted(set(weight_map or ()) - set(found)):
        faults.append(f"{folder / INDEX}: lists {key}, which {weight_map[key]} does not hold.")  # type: ignore[index]
    if faults:
        raise UserError(*faults)
    return found


@dataclass(frozen=True)
class Tensors:
    """The tensors of a folder, checked against its geometry: each weight is there and each tensor has a use."""

    stored: Mapping[str, Stored]
    renamed: Mapping[str, str]  # stored names that replace the weight table's

    @property
    def dtype(self) -> np.dtype:
        """The dtype most of them are stored in."""
        return Counter(tensor.dtype for tensor in self.stored.values()).most_common(1)[0][0]


def open_tensors(folder: Path, g: Geometry) -> Tensors:
    """Find and check a folder's tensors.

    Raises:
        UserError: what `stored_tensors` refuses; one message that lists all missing, unexpected and misshapen tensors.
    """
    stored = stored_tensors(folder)
    return Tensors(stored, _match_table(weight_table(g), g, stored, folder))


def _match_table(table: tuple[Weight, ...], g: Geometry, stored: Mapping[str, Stored], folder: Path) -> dict[str, str]:
    renamed: dict[str, str] = {}
    unused = {key for key in stored if not _BUFFERS.search(key)}
    for prefix, unembed in () if EMBED_KEY in stored else _PREFIXES:
        if EMBED_KEY.replace("model.", prefix, 1) in stored:
            keys = [key for weight in table for key in weight.stored_keys()]
            renamed = {key: key.replace("model.", prefix, 1) for key in keys} | {UNEMBED_KEY: unembed}
            unused = {key for key in unused if key.startswith(prefix) or key == unembed}
            break
    embed, unembed = (renamed.get(key, key) for key in (EMBED_KEY, UNEMBED_KEY))
    if g.tied and unembed in unused:  # a tied table is stored under either name, or twice alike
        unused.remove(unembed)
        if embed not in stored:
            renamed[EMBED_KEY] = unembed
        elif not _same(stored[embed], embed, stored[unembed], unembed):
            raise UserError(
                f"{folder}: config.json ties the embeddings, but {embed} and {unembed} differ; "
                "set tie_word_embeddings to false if both are meant."
            )
    missing, misshapen = [], []
    for weight in table:
        for name in weight.stored_keys():
            key = renamed.get(name, name)
            unused.discard(key)
            if key not in stored:
                missing += [name] if name not in missing else []
            elif stored[key].shape != weight.stored_shape:
                fault = f"{key} is {stored[key].shape}, should be {weight.stored_shape}"
                misshapen += [fault] if fault not in misshapen else []
    problems = {"missing": missing, "unexpected": sorted(unused), "of the wrong shape": misshapen}
    if any(problems.values()):
        counts = "; ".join(f"{len(names)} {kind}: {_listed(names)}" for kind, names in problems.items() if names)
        headless = " A model without its head writes no text: save the whole model." if missing == [UNEMBED_KEY] else ""
        raise UserError(f"{folder}: the tensors do not fit config.json. {counts}.{headless}")
    return renamed


def _listed(names: list[str]) -> str:
    shown, rest = names[:_LISTED], len(names) - _LISTED
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")


def _same(a: Stored, a_key: str, b: Stored, b_key: str) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    rows = max(1, _READ_BYTES // max(1, math.prod(a.shape[1:]) * a.dtype.itemsize))
    spans = [slice(i, min(i + rows, a.shape[0])) for i in range(0, a.shape[0], rows)]
    return all(read_slice(a, a_key, (s,)).tobytes() == read_slice(b, b_key, (s,)).tobytes() for s in spans)


def read_slice(stored: Stored, key: str, index: tuple[slice, ...]) -> np.ndarray:
    """A slice of one stored tensor, copied out of the file."""
    try:
        with safe_open(stored.file, "numpy") as tensors:
            return tensors.get_slice(key)[index]
    except (SafetensorError, OSError) as error:
        raise UserError(f"{stored.file}: {key} cannot be read ({error}); download it again.") from error


def _read_into(target: np.ndarray, stored: Stored, key: str, index: tuple[slice, ...], transposed: bool) -> None:
    """Fill `target` with our slice `index` of a stored tensor, a bounded number of bytes at a time."""
    spans = [range(*s.indices(n)) for s, n in zip(index[::-1] if transposed else index, stored.shape, strict=True)]
    row_bytes = stored.dtype.itemsize * int(np.prod([len(span) for span in spans[1:]], dtype=np.int64))
    step = max(1, _READ_BYTES // max(1, row_bytes))
    rest = tuple(slice(span.start, span.stop) for span in spans[1:])
    view = target.T if transposed else target
    for at in range(0, len(spans[0]), step):
        first = spans[0].start + at
        view[at : at + step] = read_slice(stored, key, (slice(first, min(first + step, spans[0].stop)), *rest))


def load_params(
    tensors: Tensors,
    g: Geometry,
    dtype: DTypeLike | None = None,
    shardings: Callable[[Weight], jax.sharding.Sharding] | None = None,
) -> Params:
    """The weights of a Hugging Face folder as our tree, each streamed straight into its final sharding.

    One stacked weight is in flight at a time: beside the target itself the host holds the shards of that weight which
    belong to this process, and one bounded read.

    Args:
        g: the geometry that the tensors were checked against.
        dtype: of the loaded weights; as stored by default.
        shardings: the sharding of each weight; everything on the first device by default.
    Raises:
        UserError: tensors that cannot be read.
    """
    table, stored, renamed = weight_table(g), tensors.stored, tensors.renamed
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    items = []
    for weight in table:
        keys = [renamed.get(key, key) for key in weight.stored_keys()]
        kept = weight.dtype(dtype or jnp.result_type(*{stored[key].dtype for key in keys}))

        read = functools.partial(_part, weight, [(stored[key], key) for key in keys], kept, {})
        sharding = shardings(weight) if shardings else one_device
        leaf = jax.make_array_from_callback(weight.shape, sharding, read)
        items.append((weight.path, jax.block_until_ready(leaf)))
    return unflatten_dict(dict(items))


def _part(
    weight: Weight,
    sources: list[tuple[Stored, str]],
    dtype: np.dtype,
    read: dict[Any, np.ndarray],
    index: tuple[slice, ...] | None,
) -> np.ndarray:
    """The part of a weight that a device holds; `read` keeps parts, as devices that hold the same one share it."""
    assert index is not None
    spans = tuple(range(*s.indices(n)) for s, n in zip(index, weight.shape, strict=True))
    if spans not in read:
        block = read[spans] = np.empty([len(span) for span in spans], dtype)
        inner = [slice(span.start, span.stop) for span in spans[weight.stacked :]]
        if weight.part is not None:  # of the stored rows, which a transposed weight has last
            begin = weight.part[0]
            axis = -1 if weight.transposed else 0
            inner[axis] = slice(begin + inner[axis].start, begin + inner[axis].stop)
        counts = weight.shape[: weight.stacked]
        for slot in itertools.product(*map(range, block.shape[: weight.stacked])):
            at = [span.start + i for span, i in zip(spans, slot, strict=False)]
            stored, key = sources[int(np.ravel_multi_index(at, counts)) if at else 0]
            if weight.quantised:
                block[slot] = _quantised(stored, key, inner, weight, read)
            else:
                _read_into(block[slot], stored, key, tuple(inner), weight.transposed)
    return read[spans]


def _quantised(stored: Stored, key: str, index: list[slice], weight: Weight, read: dict[Any, np.ndarray]) -> np.ndarray:
    """A part of a matrix as whole numbers, or of its scales; either needs the whole of each output channel.

    Channels are the rows of the stored matrix, and of ours too where it is not transposed. Where a part has not the
    whole of them, they are kept in `read` for the parts that have the rest.
    """
    channels = index[-1] if weight.transposed else index[0]
    rest = index[0] if weight.transposed else index[-1]
    width, name = stored.shape[1], (key, channels.start, channels.stop)
    if (whole := read.get(name)) is None:
        parts, step = [], max(1, _READ_BYTES // (4 * width))
        for at in range(channels.start, channels.stop, step):
            part = np.empty((width, min(step, channels.stop - at)), np.float32)
            _read_into(part, stored, key, (slice(0, width), slice(at, at + part.shape[1])), transposed=True)
            values, scale = quantise(part)
            parts.append(scale if weight.quantised == "scale" else values)
        whole = np.concatenate(parts, axis=-1)
    if weight.quantised == "scale":
        return whole
    if rest.stop - rest.start < width:
        read[name] = whole
    return whole[rest] if weight.transposed else whole[rest].T
