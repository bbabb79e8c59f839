"""The kernels of mask rows against plain XLA, by every kind of row, and that compilers of accelerators take them."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import environment

from mtp_jax.fitting.chips import topology_devices
from mtp_jax.model import mask_kernel as subject
from mtp_jax.model.attention import Blocks, LayerCache, RealRows, Scores, attend_blocks
from mtp_jax.model.mask_kernel import Tiling, attend_blocks_fused, tiling

B, G, M, N, K, H, S = 2, 10, 3, 4, 2, 8, 24
SCALE = 0.4  # of scores; not 1/sqrt(H), which a kernel could have taken by itself
BOTH = ("tpu", "gpu")


def arrays(seed=0):
    draw = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(draw.standard_normal(shape), jnp.float32)  # noqa: E731
    q, own, real = normal(B, G, M, N, H), (normal(B, G, M, K, H), normal(B, G, M, K, H)), (normal(B, K, S, H),) * 2
    packed = np.repeat([1, 2, 0], [9, 11, 4])
    segments = jnp.asarray(np.stack([packed, np.ones(S)]), jnp.int32)
    positions = jnp.asarray(np.stack([np.r_[np.arange(9), np.arange(11), np.arange(4)], np.arange(S)]), jnp.int32)
    anchors = np.stack([np.r_[np.sort(draw.choice(19, 8, False)), -1, -1], np.sort(draw.choice(S - 1, G, False))])
    at = jnp.maximum(jnp.asarray(anchors, jnp.int32), 0)
    of = jnp.where(anchors >= 0, jnp.take_along_axis(segments, at, axis=1), 0)
    blocks = Blocks(at, jnp.take_along_axis(positions, at, axis=1), of)
    return q, own, LayerCache(*real), blocks, RealRows(positions, segments)


def slopes(attention, q, own, weights):
    return jax.value_and_grad(lambda q, k, v: jnp.sum(attention(q, (k, v)) * weights), (0, 1, 2))(q, *own)


@pytest.mark.parametrize("platform", BOTH)
@pytest.mark.parametrize("window", [None, 2, 5, 1000])
def test_output_and_gradients_are_those_of_xla(platform, window):
    q, own, real, blocks, keys = arrays()
    weights = arrays(1)[0]
    plain = lambda q, own: attend_blocks(q, own, real, blocks, keys, window, None, Scores(SCALE))  # noqa: E731
    fused = lambda q, own: attend_blocks_fused(  # noqa: E731
        q, own, real, blocks, keys, window, Tiling(16, 8, platform, interpret=True), SCALE
    )
    assert np.allclose(plain(q, own), fused(q, own), atol=2e-6)
    for a, b in zip(
        jax.tree.leaves(slopes(plain, q, own, weights)), jax.tree.leaves(slopes(fused, q, own, weights)), strict=True
    ):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a)


def test_no_tile_of_keys_behind_the_last_anchor_is_read():
    """Keys that no row may see are not a number, which would spread to whoever reads them with a weight of 0."""
    q, own, real, blocks, keys = arrays()
    blocks = Blocks(jnp.minimum(blocks.anchors, 7), jnp.minimum(blocks.positions, 7), jnp.minimum(blocks.segments, 1))
    spoilt = LayerCache(*(x.at[:, :, 8:].set(jnp.nan) for x in real))
    for platform in BOTH:
        tiles = Tiling(16, 8, platform, interpret=True)
        assert np.isfinite(attend_blocks_fused(q, own, spoilt, blocks, keys, None, tiles, SCALE)).all()
    assert not np.isfinite(attend_blocks(q, own, spoilt, blocks, keys, None, None, Scores(SCALE))).all()


def test_what_each_tile_reads():
    q, _, _, blocks, keys = arrays()
    low, high = subject._ranges(blocks, keys)
    heads = q.reshape(B, G, M, K, N // K, H).transpose(0, 3, 1, 2, 4, 5)
    for window in (1000, 3):
        _, of = subject._rows(Tiling(16, 4, "tpu"), heads, low, high, jnp.int32(window))
        for b in range(B):
            for tile, (first, last) in enumerate(zip(of.first[b], of.last[b], strict=True)):
                seen = []
                for row in range(16 * tile, min(16 * tile + 16, G * M * N // K)):
                    block, mask = row // (M * N // K), row % (M * N // K) // (N // K)
                    if blocks.segments[b, block] == 0:
                        continue
                    anchor = int(blocks.anchors[b, block])
                    same = [t for t in range(anchor + 1) if keys.segments[b, t] == blocks.segments[b, block]]
                    position = int(blocks.positions[b, block]) + 1 + mask
                    seen += [t for t in same if position - int(keys.positions[b, t]) < window]
                assert (int(last) < 0) == (not seen)
                if seen:
                    assert (int(first), int(last)) == (min(seen) // 4, max(seen) // 4)


ON_A_MESH = """
import jax, numpy as np
import test_mask_kernel as t
from mtp_jax import sharding
from mtp_jax.config import Mesh
q, own, real, blocks, keys = t.arrays()
def step(q, k, v):
    out = t.attend_blocks_fused(q, (k, v), real, blocks, keys, 5, t.Tiling(16, 8, "tpu", interpret=True), t.SCALE)
    return (out * out).sum()
plain = jax.value_and_grad(step, (0, 1, 2))(q, *own)
for data, tensor in ((2, 2), (2, 1), (1, 4)):
    mesh = sharding.make_mesh(Mesh(data=data, fsdp=1, tensor=tensor), jax.devices()[:data * tensor])
    with sharding.on(mesh):
        spread = jax.jit(jax.value_and_grad(step, (0, 1, 2)))(q, *own)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(spread), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
print("equal")
"""


def test_every_device_takes_its_sequences_and_heads():
    """Two key/value heads over two devices, and over four, which they do not divide by."""
    env = environment(4)
    env["PYTHONPATH"] = os.pathsep.join(
        [*(str(Path(__file__).parents[i]) for i in (0, 1)), *filter(None, [env.get("PYTHONPATH")])]
    )
    done = subprocess.run([sys.executable, "-c", ON_A_MESH], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.endswith("equal\n"), done.stderr[-3000:]


@pytest.mark.parametrize(
    ("platform", "keys", "width", "fits"),
    [
        ("tpu", 2048, 128, True),
        ("tpu", 2000, 128, False),
        ("tpu", 256, 80, False),
        ("gpu", 2048, 64, True),
        ("cuda", 2048, 128, True),
        ("gpu", 100, 64, False),
        ("gpu", 2048, 96, False),
        ("cpu", 2048, 128, False),
    ],
)
def test_shapes_that_fit(platform, keys, width, fits):
    assert (tiling(platform, keys, width) is not None) == fits


def program(platform, dtype, width):
    """Output and gradients of the kernels, and the shapes of their arguments."""
    blocks, masks, keys = 16, 8, 256
    tiles = tiling(platform, keys, width)

    def step(q, k, v, cache, at, segments, real):
        of, reals = Blocks(at, at, segments), RealRows(real, real)
        attention = lambda q, k, v: attend_blocks_fused(q, (k, v), cache, of, reals, None, tiles, SCALE)  # noqa: E731
        return jax.value_and_grad(lambda *x: jnp.sum(attention(*x)).astype(jnp.float32), (0, 1, 2))(q, k, v)

    wide = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    whole = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    own, cache = wide(1, blocks, masks, 2, width), LayerCache(wide(1, 2, keys, width), wide(1, 2, keys, width))
    return step, (wide(1, blocks, masks, 4, width), own, own, cache, *[whole(1, blocks)] * 2, whole(1, keys))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_compiler_for_gpus_takes_the_kernels(dtype):
    """As far as Triton's language; there is no GPU here to compile it further for."""
    step, arguments = program("gpu", dtype, 64)
    text = jax.jit(step).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") >= 2


@pytest.mark.usefixtures("tpu_compiler")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2", "v5p:2x2x1"])
def test_the_compiler_for_tpus_compiles_the_kernels(topology, dtype):
    step, arguments = program("tpu", dtype, 128)
    chip = jax.sharding.SingleDeviceSharding(topology_devices(topology)[0])
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip), arguments)
    lowered = jax.jit(step).trace(*placed).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("tpu_custom_call") >= 2
    assert lowered.compile().memory_analysis().temp_size_in_bytes >= 0
