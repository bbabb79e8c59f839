"""The platform's flash attention for real rows of whole sequences; other platforms use plain XLA.

Mask rows stay with XLA (`attend_blocks`): the two parts of their softmax are joined through its total, and the kernels
give that without a gradient.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from mtp_jax.model.attention import LayerCache, Scores
from mtp_jax.sharding import parts_of, spec_of

PLATFORMS = {"splash": ("tpu",), "cudnn": ("cuda", "gpu")}
_LANES = 128  # rows of a sequence that a TPU kernel takes come in multiples of it
_LARGEST_BLOCK = 512
_CUDNN_WIDTH = 128


def misfit(kernel: str, rows: int, width: int, dtype: DTypeLike, scores_of: Scores) -> str | None:
    """Why a kernel cannot take sequences of `rows` rows with heads of this width; None where it can."""
    if scores_of.cap is not None:
        return "takes no capped scores"
    if kernel == "splash" and rows % _LANES:
        return f"takes sequences of a multiple of {_LANES} tokens, not {rows}"
    if kernel == "splash" and width % 64:
        return f"takes heads of a multiple of 64, not {width}"
    if kernel == "cudnn" and dtype != jnp.bfloat16:
        return f"computes in bfloat16, not in {jnp.dtype(dtype)}"
    if kernel == "cudnn" and (width % 8 or width > _CUDNN_WIDTH):
        return f"takes heads of a multiple of 8 up to {_CUDNN_WIDTH}, not {width}"
    return None


def flash(
    kernel: str,
    q: Float[Array, "B R N H"],
    real: LayerCache,
    visible: Bool[Array, "windows B R R"],
    segments: Int[Array, "B R"] | None,
    windows: list[int | None],
    window: Int[Array, ""] | int,
    scale: float,
) -> Float[Array, "B R N H"]:
    """What `attend` gives: a row sees its own segment up to itself, within the window of that number."""
    if kernel == "cudnn":
        k, v = (x.swapaxes(1, 2) for x in real)
        return jax.nn.dot_product_attention(q, k, v, mask=visible[window][:, None], scale=scale, implementation="cudnn")
    branches = [functools.partial(splash, scale=scale, window=one) for one in windows]
    if len(branches) == 1:
        return branches[0](q, real, segments)
    return jax.lax.switch(window, branches, q, real, segments)


def splash(
    q: Float[Array, "B R N H"],
    real: LayerCache,
    segments: Int[Array, "B R"] | None,
    scale: float,
    window: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B R N H"]:
    """The TPU kernel, on each device for its sequences and heads; `interpret` computes it anywhere, for tests."""
    if segments is None:
        segments = jnp.ones(q.shape[:2], jnp.int32)
    heads = (q * scale).swapaxes(1, 2)
    run = functools.partial(_splash, window=window, interpret=interpret)
    if jax.sharding.get_abstract_mesh().size > 1:
        # The compiler cannot part a kernel by itself. Heads that the devices do not divide stay whole on each.
        axis = "kv_heads" if real.k.shape[1] % parts_of("kv_heads") == 0 else None
        rows = spec_of("batch", axis, None, None)
        of_segments = PartitionSpec(rows[0], None)
        run = jax.shard_map(run, in_specs=(rows, rows, rows, of_segments), out_specs=rows, check_vma=False)
    return run(heads, *real, segments).swapaxes(1, 2)


def _splash(
    q: Float[Array, "B N R H"],
    k: Float[Array, "B K R H"],
    v: Float[Array, "B K R H"],
    segments: Int[Array, "B R"],
    window: int | None,
    interpret: bool,
) -> Float[Array, "B N R H"]:
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    N, R = q.shape[1:3]
    seen = library.CausalMask((R, R)) if window is None else library.LocalMask((R, R), (window - 1, 0), 0)
    size = next(size for size in (_LARGEST_BLOCK, 256, _LANES) if R % size == 0)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    sizes: dict[str, Any] = dict.fromkeys((*names, "block_q_dq", "block_kv_dq"), size)
    blocks = library.BlockSizes(**sizes)
    kernel = library.make_splash_mha(
        library.MultiHeadMask([seen] * N), block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret
    )
    return jax.vmap(lambda q, k, v, s: kernel(q, k, v, library.SegmentIds(s, s)))(q, k, v, segments)
