"""Attention of mask rows without scores in memory, in Pallas: for TPU, and for GPU through Triton.

Under the gate the keys and values of real rows are constants. So the kernels compute the prefix's part of the output
with its log-sum-exp, and the gradient of the queries alone; the few keys of a row's own block stay with XLA. Both parts
join through their log-sum-exp. Rows are sorted by anchor, and a tile of rows reads no key behind its last anchor.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as pltriton
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from mtp_jax.model.attention import Blocks, LayerCache, RealRows
from mtp_jax.sharding import parts_of, spec_of

LOWEST = -1e30  # the log-sum-exp of no keys, and the score of a key that is not seen
_LANES = 128


class Tiling(NamedTuple):
    """How a kernel goes through rows and keys. Hashable, so that it can be static."""

    rows: int
    keys: int
    platform: str  # "tpu" or "gpu"
    interpret: bool = False  # computed by XLA anywhere, for tests


def tiling(platform: str, keys: int, width: int) -> Tiling | None:
    """The tiling for so many keys and heads of a width; None where no kernel fits."""
    if platform == "tpu" and keys % _LANES == 0 and width % 64 == 0:
        return Tiling(256, next(size for size in (512, 256, _LANES) if keys % size == 0), "tpu")
    if platform in ("cuda", "gpu") and keys % 64 == 0 and width in (64, 128):
        return Tiling(64, 64, "gpu")
    return None


def attend_blocks_fused(
    q: Float[Array, "B G M N H"],
    own: tuple[Array, Array],
    real: LayerCache,
    blocks: Blocks,
    keys: RealRows,
    window: Int[Array, ""] | int | None,
    tiles: Tiling,
    scale: float,
) -> Float[Array, "B G M N H"]:
    """What `attend_blocks` gives without a cap, where nothing trained reaches `real` and documents lie side by side."""
    low, high = _ranges(blocks, keys)

    def here(q: Array, own_k: Array, own_v: Array, k: Array, v: Array, low: Array, high: Array) -> Array:
        B, G, M, N, H = q.shape
        K = k.shape[1]
        heads = q.reshape(B, G, M, K, N // K, H).transpose(0, 3, 1, 2, 4, 5)
        own_k, own_v = (x.transpose(0, 3, 1, 2, 4) for x in (own_k, own_v))  # [B, K, G, M, H]
        reach = jnp.asarray(jnp.iinfo(jnp.int32).max if window is None else window, jnp.int32)
        out = _attention(tiles, scale, heads, own_k, own_v, k, v, low, high, reach)
        return out.transpose(0, 2, 3, 1, 4, 5).reshape(B, G, M, N, H)

    if jax.sharding.get_abstract_mesh().size > 1:
        # The compiler cannot part a kernel by itself. Heads that the devices do not divide stay whole on each.
        axis = "kv_heads" if real.k.shape[1] % parts_of("kv_heads") == 0 else None
        rows, cache = spec_of("batch", None, None, axis, None), spec_of("batch", axis, None, None)
        each = PartitionSpec(rows[0], None)
        here = jax.shard_map(
            here, in_specs=(rows, rows, rows, cache, cache, each, each), out_specs=rows, check_vma=False
        )
    return here(q, *own, *real, low, high)


def _ranges(blocks: Blocks, keys: RealRows) -> tuple[Int[Array, "B G"], Int[Array, "B G"]]:
    """The first and the last key that a block sees, without windows; a block that only fills the array sees none."""
    low = jnp.zeros_like(blocks.anchors)
    if blocks.segments is None:
        return low, blocks.anchors
    assert keys.segments is not None
    S = keys.segments.shape[1]
    begins = jnp.pad(keys.segments[:, 1:] != keys.segments[:, :-1], ((0, 0), (1, 0)))
    start = jax.lax.cummax(jnp.where(begins, jnp.arange(S), 0), axis=1)
    low = jnp.take_along_axis(start, blocks.anchors, axis=1)
    return low, jnp.where(blocks.segments == 0, -1, blocks.anchors)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    tiles: Tiling,
    scale: float,
    q: Float[Array, "B K G M n H"],
    own_k: Float[Array, "B K G M H"],
    own_v: Float[Array, "B K G M H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    low: Int[Array, "B G"],
    high: Int[Array, "B G"],
    window: Any,  # a number, perhaps known when compiled
) -> Float[Array, "B K G M n H"]:
    return _forward(tiles, scale, q, own_k, own_v, k, v, low, high, window)[0]


def _forward(
    tiles: Tiling, scale: float, q: Array, own_k: Array, own_v: Array, *rest: Any
) -> tuple[Array, tuple[Any, ...]]:
    k, v, low, high, window = rest
    rows, of = _rows(tiles, q, low, high, window)
    out, total = _prefix(tiles, scale, rows, k, v, of)
    out, total = _unrows(out, q.shape), _unrows(total[..., None], q.shape)[..., 0]
    scores = _own_scores(q, own_k, window, scale)
    own_total = jax.nn.logsumexp(scores, axis=-1)
    together = jnp.logaddexp(total, own_total)
    share = jnp.exp(scores - together[..., None]).astype(own_v.dtype)
    own_out = jnp.einsum("bkgmnj,bkgjh->bkgmnh", share, own_v, preferred_element_type=jnp.float32)
    out = (out.astype(jnp.float32) * jnp.exp(total - together)[..., None] + own_out).astype(q.dtype)
    return out, (q, own_k, own_v, *rest, out, together)


def _backward(
    tiles: Tiling, scale: float, saved: tuple[Any, ...], slope: Float[Array, "B K G M n H"]
) -> tuple[Any, ...]:
    q, own_k, own_v, k, v, low, high, window, out, total = saved
    delta = jnp.sum(slope.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    rows, of = _rows(tiles, q, low, high, window)
    slopes = _pad(slope.reshape(*rows.shape[:2], -1, q.shape[-1]), rows.shape[2])
    totals, deltas = (_pad(x.reshape(*rows.shape[:2], -1), rows.shape[2], axis=2) for x in (total, delta))
    dq = _unrows(_prefix_gradient(tiles, scale, rows, k, v, slopes, totals, deltas, of), q.shape).astype(jnp.float32)
    share = jnp.exp(_own_scores(q, own_k, window, scale) - total[..., None])
    inner = jnp.einsum("bkgmnh,bkgjh->bkgmnj", slope, own_v, preferred_element_type=jnp.float32)
    ds = (share * (inner - delta[..., None]) * scale).astype(q.dtype)
    dq += jnp.einsum("bkgmnj,bkgjh->bkgmnh", ds, own_k, preferred_element_type=jnp.float32)
    dk = jnp.einsum("bkgmnj,bkgmnh->bkgjh", ds, q, preferred_element_type=jnp.float32)
    dv = jnp.einsum("bkgmnj,bkgmnh->bkgjh", share.astype(slope.dtype), slope, preferred_element_type=jnp.float32)
    return dq.astype(q.dtype), dk.astype(own_k.dtype), dv.astype(own_v.dtype), None, None, None, None, None


_attention.defvjp(_forward, _backward)


def _own_scores(
    q: Float[Array, "B K G M n H"], own_k: Float[Array, "B K G M H"], window: Any, scale: float
) -> Float[Array, "B K G M n M"]:
    M = own_k.shape[3]
    scores = jnp.einsum("bkgmnh,bkgjh->bkgmnj", q, own_k, preferred_element_type=jnp.float32) * scale
    behind = jnp.arange(M)[:, None] - jnp.arange(M)
    return jnp.where(((behind >= 0) & (behind < window))[:, None], scores, LOWEST)


# ---- rows in tiles


class _Of(NamedTuple):
    """What each row sees, and which tiles of keys each tile of rows reads."""

    low: Int[Array, "B R"]
    high: Int[Array, "B R"]
    first: Int[Array, "B tiles"]
    last: Int[Array, "B tiles"]


def _rows(tiles: Tiling, q: Array, low: Array, high: Array, window: Any) -> tuple[Float[Array, "B K R H"], _Of]:
    """Queries as rows in the order of their anchors, filled up to whole tiles with rows that see nothing."""
    B, K, G, M, n, H = q.shape
    R = -(-G * M * n // tiles.rows) * tiles.rows
    offset = jnp.arange(M)[:, None]
    # A window is measured from the row's own position, which is one more than the anchor's for the first mask.
    begin = jnp.maximum(low[..., None, None], high[..., None, None] + 2 + offset - window)
    begin, end = (jnp.broadcast_to(x, (B, G, M, n)).reshape(B, -1) for x in (begin, high[..., None, None]))
    begin, end = _pad(begin, R, axis=1), _pad(end, R, axis=1, value=-1)
    seen = end >= begin
    large = jnp.iinfo(jnp.int32).max
    parted = lambda x: x.reshape(B, -1, tiles.rows)  # noqa: E731
    first = jnp.min(parted(jnp.where(seen, begin, large)), axis=-1) // tiles.keys
    last = jnp.max(parted(jnp.where(seen, end, -1)), axis=-1) // tiles.keys
    first = jnp.where(last < 0, 0, first)
    return _pad(q.reshape(B, K, -1, H), R), _Of(begin, end, first.astype(jnp.int32), last.astype(jnp.int32))


def _pad(x: Array, rows: int, axis: int = 2, value: int = 0) -> Array:
    widths = [(0, rows - x.shape[i] if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value)


def _unrows(x: Float[Array, "B K R w"], shape: tuple[int, ...]) -> Array:
    """Rows as queries were, [B, K, G, M, n, w]."""
    return x[:, :, : math.prod(shape[2:5])].reshape(*shape[:5], x.shape[-1])


# ---- kernels: the same arithmetic, a tile of keys at a time


def _product(a: Float[Array, "r s"], b: Array, axis: int) -> Array:
    """`a` times `b` over an axis of `b`, in float32; float32 factors are not rounded."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    over = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(a, b, over, precision=exact, preferred_element_type=jnp.float32)


def _scores(q: Array, k: Array, low: Array, high: Array, start: Any, scale: float) -> tuple[Array, Array]:
    """Scores of a tile, and which of them are seen; `low` and `high` are columns."""
    scores = _product(q, k, 1) * scale
    key = start + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    seen = (key >= low) & (key <= high)
    return jnp.where(seen, scores, LOWEST), seen


def _absorb(scores: Array, seen: Array, v: Array, top: Array, total: Array, out: Array) -> tuple[Array, Array, Array]:
    """The running maximum, sum and output with one tile of keys more."""
    higher = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
    share = jnp.where(seen, jnp.exp(scores - higher), 0.0)
    faded = jnp.exp(top - higher)
    out = out * faded + _product(share.astype(v.dtype), v, 0)
    return higher, total * faded + jnp.sum(share, axis=1, keepdims=True), out


def _finished(top: Array, total: Array, out: Array) -> tuple[Array, Array]:
    """The output and its log-sum-exp; rows that saw nothing have 0 and the lowest."""
    some = jnp.where(total > 0, total, 1.0)
    return out / some, jnp.where(total > 0, top + jnp.log(some), LOWEST)


def _slope(q: Array, k: Array, v: Array, slope: Array, total: Array, delta: Array, seen_by: Any, scale: float) -> Array:
    """What a tile of keys adds to the gradient of the queries."""
    low, high, start = seen_by
    scores, seen = _scores(q, k, low, high, start, scale)
    share = jnp.where(seen, jnp.exp(scores - total), 0.0)
    ds = (share * (_product(slope, v, 1) - delta) * scale).astype(k.dtype)
    return _product(ds, k, 0)


def _prefix(tiles: Tiling, scale: float, q: Array, k: Array, v: Array, of: _Of) -> tuple[Array, Float[Array, "B K R"]]:
    """Output [B, K, R, H] and log-sum-exp of rows over the keys that they see."""
    B, K, R, _ = q.shape
    kernel = _prefix_tpu if tiles.platform == "tpu" else _prefix_gpu
    shapes = (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, K, 1, R), jnp.float32))
    out, total = _call(tiles, scale, kernel, q, k, v, (), of, shapes, 2)
    return out, total[:, :, 0]


def _prefix_gradient(
    tiles: Tiling, scale: float, q: Array, k: Array, v: Array, slope: Array, total: Array, delta: Array, of: _Of
) -> Float[Array, "B K R H"]:
    """The gradient of the queries."""
    more = (slope, total[:, :, None], delta[:, :, None])
    kernel = _gradient_tpu if tiles.platform == "tpu" else _gradient_gpu
    return _call(tiles, scale, kernel, q, k, v, more, of, (jax.ShapeDtypeStruct(q.shape, q.dtype),), 3)[0]


def _call(
    tiles: Tiling,
    scale: float,
    kernel: Any,
    q: Array,
    k: Array,
    v: Array,
    more: tuple[Array, ...],
    of: _Of,
    shapes: Any,
    products: int,
) -> Any:
    """Run a kernel over tiles of rows, and on TPU of keys."""
    (B, K, R, H), S = q.shape, k.shape[2]
    rows, keys = tiles.rows, tiles.keys
    on_tpu = tiles.platform == "tpu"

    def wide(b: Any, h: Any, i: Any, *_: Any) -> tuple[Any, ...]:
        return b, h, i, 0

    def vector(b: Any, h: Any, i: Any, *_: Any) -> tuple[Any, ...]:
        return b, h, 0, i

    def shared(b: Any, h: Any, i: Any, *_: Any) -> tuple[Any, ...]:
        return b, 0, i

    def key_tile(b: Any, h: Any, i: Any, j: Any, first: Any, last: Any) -> tuple[Any, ...]:
        return b, h, jnp.clip(first[b, i] + j, 0, jnp.maximum(last[b, i], 0)), 0

    def whole(b: Any, h: Any, i: Any) -> tuple[Any, ...]:
        return b, h, 0, 0

    matrix = pl.BlockSpec((None, None, rows, H), wide)
    column = pl.BlockSpec((None, None, 1, rows), vector)
    cache = pl.BlockSpec((None, None, keys, H), key_tile) if on_tpu else pl.BlockSpec((None, None, S, H), whole)
    seen = pl.BlockSpec((None, 1, rows), shared)
    inputs = [matrix, cache, cache, *(matrix if x.ndim == 4 and x.shape[2] == R else column for x in more), seen, seen]
    outputs = [matrix if x.shape[2] == R else column for x in shapes]
    operands = (q, k, v, *more, of.low[:, None], of.high[:, None])
    # What is read at least: each row once, and half of the keys for each tile of rows.
    moved = sum(x.size * x.dtype.itemsize for x in (q, *more, *shapes)) + (k.nbytes + v.nbytes) * (R // rows) // 2
    cost = pl.CostEstimate(flops=products * B * K * R * S * H, transcendentals=B * K * R * S // 2, bytes_accessed=moved)
    body = functools.partial(kernel, scale=scale, keys=keys)
    if not on_tpu:
        return pl.pallas_call(
            body,
            out_shape=shapes,
            grid=(B, K, R // rows),
            in_specs=inputs,
            out_specs=outputs,
            interpret=tiles.interpret,
            cost_estimate=cost,
            compiler_params=None if tiles.interpret else pltriton.CompilerParams(num_warps=4, num_stages=2),
        )(*operands)
    scratch = [pltpu.VMEM((rows, width), jnp.float32) for width in ((1, 1, H) if not more else (H,))]
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(B, K, R // rows, S // keys),
        in_specs=inputs,
        out_specs=outputs,
        scratch_shapes=scratch,
    )
    parallel: Any = ("parallel", "parallel", "parallel", "arbitrary")
    return pl.pallas_call(
        body,
        out_shape=shapes,
        grid_spec=grid,
        interpret=tiles.interpret,
        cost_estimate=cost,
        compiler_params=None if tiles.interpret else pltpu.CompilerParams(dimension_semantics=parallel),
    )(of.first, of.last, *operands)


def _as_column(row: Array) -> Array:
    """[1, rows] as [rows, 1], on TPU."""
    return jnp.broadcast_to(row, (_LANES, row.shape[1])).T[:, :1]


def _as_row(column: Array) -> Array:
    """[rows, 1] as [1, rows], on TPU."""
    return jnp.broadcast_to(column, (column.shape[0], _LANES)).T[:1]


def _prefix_tpu(
    first: Any,
    last: Any,
    q: Any,
    k: Any,
    v: Any,
    low: Any,
    high: Any,
    out: Any,
    total: Any,
    *kept: Any,
    scale: float,
    keys: int,
) -> None:
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    top, sum_, acc = kept

    @pl.when(j == 0)
    def begin() -> None:
        top[...] = jnp.full_like(top, LOWEST)
        sum_[...] = jnp.zeros_like(sum_)
        acc[...] = jnp.zeros_like(acc)

    tile = first[b, i] + j

    @pl.when(tile <= last[b, i])
    def absorb() -> None:
        seen_by = _as_column(low[...]), _as_column(high[...]), tile * keys
        scores, seen = _scores(q[...], k[...], *seen_by, scale)
        top[...], sum_[...], acc[...] = _absorb(scores, seen, v[...], top[...], sum_[...], acc[...])

    @pl.when(j == pl.num_programs(3) - 1)
    def end() -> None:
        done, log = _finished(top[...], sum_[...], acc[...])
        out[...] = done.astype(out.dtype)
        total[...] = _as_row(log)


def _gradient_tpu(
    first: Any,
    last: Any,
    q: Any,
    k: Any,
    v: Any,
    slope: Any,
    total: Any,
    delta: Any,
    low: Any,
    high: Any,
    *rest: Any,
    scale: float,
    keys: int,
) -> None:
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    dq, acc = rest

    @pl.when(j == 0)
    def begin() -> None:
        acc[...] = jnp.zeros_like(acc)

    tile = first[b, i] + j

    @pl.when(tile <= last[b, i])
    def add() -> None:
        seen_by = _as_column(low[...]), _as_column(high[...]), tile * keys
        columns = _as_column(total[...]), _as_column(delta[...])
        acc[...] += _slope(q[...], k[...], v[...], slope[...], *columns, seen_by, scale)

    @pl.when(j == pl.num_programs(3) - 1)
    def end() -> None:
        dq[...] = acc[...].astype(dq.dtype)


def _tiles_of(low: Array, high: Array, keys: int) -> tuple[Array, Array]:
    """The first tile of keys that some row sees, and the one behind the last."""
    seen = high >= low
    first = jnp.min(jnp.where(seen, low, jnp.iinfo(jnp.int32).max)) // keys
    behind = jnp.max(jnp.where(seen, high, -1)) // keys + 1
    return jnp.minimum(first, behind), behind


def _prefix_gpu(q: Any, k: Any, v: Any, low: Any, high: Any, out: Any, total: Any, *, scale: float, keys: int) -> None:
    lowest, highest, queries = low[0, :], high[0, :], q[...]
    first, behind = _tiles_of(lowest, highest, keys)

    def absorb(tile: Any, carry: Any) -> Any:
        here = pl.ds(tile * keys, keys)
        scores, seen = _scores(queries, k[here, :], lowest[:, None], highest[:, None], tile * keys, scale)
        return _absorb(scores, seen, v[here, :], *carry)

    rows = queries.shape[0]
    column = jnp.zeros((rows, 1), jnp.float32)
    carry = (column + LOWEST, column, jnp.zeros(queries.shape, jnp.float32))
    done, log = _finished(*jax.lax.fori_loop(first, behind, absorb, carry))
    out[...] = done.astype(out.dtype)
    total[0, :] = log[:, 0]


def _gradient_gpu(
    q: Any, k: Any, v: Any, slope: Any, total: Any, delta: Any, low: Any, high: Any, dq: Any, *, scale: float, keys: int
) -> None:
    lowest, highest, queries, slopes = low[0, :], high[0, :], q[...], slope[...]
    totals, deltas = total[0, :][:, None], delta[0, :][:, None]
    first, behind = _tiles_of(lowest, highest, keys)

    def add(tile: Any, so_far: Any) -> Any:
        here, seen_by = pl.ds(tile * keys, keys), (lowest[:, None], highest[:, None], tile * keys)
        return so_far + _slope(queries, k[here, :], v[here, :], slopes, totals, deltas, seen_by, scale)

    dq[...] = jax.lax.fori_loop(first, behind, add, jnp.zeros(queries.shape, jnp.float32)).astype(dq.dtype)
