"""Time and memory of a training step: two streams against the literal packing of all rows, in one run.

    python benchmarks/train_step.py                      the comparison, with all anchors and with T/8 of them
    python benchmarks/train_step.py --table              two streams alone, over T and G
    python benchmarks/train_step.py --rows               mask rows of noise against learned ones, both without sampler

Both sides have the same geometry (trio-17m's by default, random weights), remat, losses and chunks, hold as many
attention scores at a time, and compute the gradient of the adapter. Memory is what the compiler reserves for
temporaries.
"""

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from mtp_jax.model.decoder import REMAT_POLICIES, Decoder
from mtp_jax.model.geometry import Geometry
from mtp_jax.model.rope import angles, rotate
from mtp_jax.model.weights import PROJECTIONS, init_params
from mtp_jax.mtp.adapter import AdapterShape, init_adapter
from mtp_jax.mtp.blocks import Noise, choose_anchors, hash_positions, noise_ids
from mtp_jax.mtp.losses import LossTerms, MultiTokenLoss

TRIO_17M = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
SCORE_BYTES = 256 << 20


class LiteralPacking(MultiTokenLoss):
    """The same losses over one sequence of T + G M rows with a dense mask and LoRA times gate."""

    def latents(self, trained: Any, frozen: Any, context: Any, blocks: Any, noise: Any) -> Any:
        del trained, frozen, blocks, noise
        return context.kept  # they came with those of the real rows

    def real_latents(self, trained: Any, frozen: Any, batch: Any) -> tuple[jax.Array, Any]:
        g, M, p = self.model.g, self.shape.masks, frozen["params"]
        tokens, positions, anchors = batch["tokens"], batch["positions"], batch["anchors"]
        (B, T), G = tokens.shape, anchors.shape[1]
        x = jnp.concatenate(
            [
                p["embed"]["embedding"][tokens],
                jnp.broadcast_to(trained["mtp"]["masks"], (B, G, M, g.D)).reshape(B, -1, g.D),
            ],
            axis=1,
        )
        offset = jnp.arange(1, M + 1)
        position = jnp.concatenate([positions, (anchors[..., None] + offset).reshape(B, -1)], axis=1)
        block = jnp.concatenate(
            [jnp.full((B, T), -1), jnp.broadcast_to(jnp.arange(G)[:, None], (B, G, M)).reshape(B, -1)], 1
        )
        reach = jnp.concatenate([positions, jnp.broadcast_to(anchors[..., None], (B, G, M)).reshape(B, -1)], axis=1)
        gate = (block >= 0)[..., None].astype(jnp.float32)
        cos, sin = angles(g.layers[0].rope, position)
        R = x.shape[1]
        rows = max(1, SCORE_BYTES // (4 * B * g.N * R))

        def attend(q: Any, k: Any, v: Any) -> Any:
            k, v = jnp.repeat(k, g.N // g.K, 2), jnp.repeat(v, g.N // g.K, 2)

            @jax.checkpoint
            def part(of: Any) -> Any:
                q, block_q, reach_q, position_q = of
                prefix = (block[:, None] < 0) & (position[:, None] <= reach_q[..., None])
                own = (block[:, None] == block_q[..., None]) & (block[:, None] >= 0)
                visible = prefix | (own & (position[:, None] <= position_q[..., None]))
                scores = jnp.einsum("brnh,bsnh->bnrs", q, k) * g.H**-0.5
                weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -1e30), -1)
                return jnp.einsum("bnrs,bsnh->brnh", weights, v)

            count = -(-R // rows)

            def cut(leaf: Any) -> Any:
                leaf = jnp.pad(leaf, [(0, 0), (0, count * rows - R)] + [(0, 0)] * (leaf.ndim - 2))
                return jnp.moveaxis(leaf.reshape(B, count, rows, *leaf.shape[2:]), 1, 0)

            out = jax.lax.map(part, jax.tree.map(cut, (q, block, reach, position)))
            return jnp.moveaxis(out, 0, 1).reshape(B, count * rows, g.N, g.H)[:, :R]

        def norm(x: Any, scale: Any) -> Any:
            return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + g.norm_epsilon) * scale

        def layer(x: Any, of: Any) -> tuple[Any, None]:
            w, lora = of

            def project(name: str, h: Any) -> Any:
                a, b = lora[name]["a"], lora[name]["b"]
                return h @ w[name]["kernel"] + gate * self.shape.scale * ((h @ a) @ b)

            h = norm(x, w["attention_norm"]["scale"])
            q = rotate(project("q", h).reshape(B, R, g.N, g.H), cos, sin)
            k = rotate(project("k", h).reshape(B, R, g.K, g.H), cos, sin)
            h = attend(q, k, project("v", h).reshape(B, R, g.K, g.H))
            x = x + project("o", h.reshape(B, R, -1))
            h = norm(x, w["mlp_norm"]["scale"])
            return x + project("down", jax.nn.silu(project("gate", h)) * project("up", h)), None

        if self.model.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[self.model.remat])
        x, _ = jax.lax.scan(layer, x, (p["layers"], trained["lora"]["layers"]))
        x = norm(x, p["norm"]["scale"])
        return x[:, :T], x[:, T:].reshape(B, G, M, g.D)


def make_batch(B: int, T: int, G: int | None, V: int) -> dict[str, Any]:
    """One document per sequence, every token supervised."""
    text = np.random.default_rng(0).integers(0, V, (B, T + 1)).astype(np.int32)
    segments = np.ones((B, T), np.int32)
    if G == T or G is None:
        anchors = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    else:
        hashes = [hash_positions(0, 0, b, np.arange(T)) for b in range(B)]
        anchors = np.stack([choose_anchors(h, np.ones(T, bool), segments[0], G) for h in hashes])
    return {
        "tokens": text[:, :-1],
        "labels": text[:, 1:],
        "supervised": np.ones((B, T), bool),
        "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
        "segments": segments,
        "anchors": anchors,
    }


class Step:
    """The compiled gradient of one side."""

    def __init__(
        self,
        kind: type[MultiTokenLoss],
        g: Geometry,
        arguments: argparse.Namespace,
        T: int,
        G: int,
        sampler: str = "residual",
        noise: Noise | None = None,
    ):
        shape = AdapterShape(arguments.masks, arguments.rank, 2.0 * arguments.rank, PROJECTIONS, sampler, noise=noise)
        chunk = max(1, SCORE_BYTES // (4 * arguments.batch * g.N * shape.masks * T))
        terms = LossTerms(target=arguments.target)
        loss = kind(Decoder(g, remat=arguments.remat), shape, terms, arguments.loss_chunk, chunk)
        self.batch = make_batch(arguments.batch, T, G, g.V)
        if noise is not None:
            hashes = hash_positions(0, 0, 0, np.arange(self.batch["anchors"].size))
            self.batch["noise"] = noise_ids(hashes, shape.masks, noise).reshape(*self.batch["anchors"].shape, -1)
        self.frozen = {"params": init_params(g, jax.random.key(0))}
        table = self.frozen["params"]["embed"]["embedding"]
        self.trained = init_adapter(g, shape, table, jax.random.key(1))
        key = jax.random.key(2)  # B is not zero, so that every gradient is exercised
        self.trained = jax.tree.map(lambda x: x + 0.01 * jax.random.normal(key, x.shape), self.trained)

        def gradient(trained: Any, frozen: Any, batch: Any) -> Any:
            step = jnp.int32(0)
            totals = loss.totals(batch)
            return jax.value_and_grad(loss.loss, has_aux=True)(trained, frozen, batch, totals, step)

        self.compiled = jax.jit(gradient).lower(self.trained, self.frozen, self.batch).compile()
        self.temporaries = self.compiled.memory_analysis().temp_size_in_bytes
        self.flops = self.compiled.cost_analysis()["flops"]
        (self.loss, _), self.gradient = jax.block_until_ready(self())

    def __call__(self) -> Any:
        return self.compiled(self.trained, self.frozen, self.batch)

    def seconds(self) -> float:
        begin = time.perf_counter()
        jax.block_until_ready(self())
        return time.perf_counter() - begin


def distance(a: Any, b: Any) -> float:
    """Largest relative distance of two gradients, leaf by leaf."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.linalg.norm(x - y) / (jnp.linalg.norm(y) + 1e-12)) for x, y in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=512, metavar="T")
    parser.add_argument("--masks", type=int, default=8, metavar="M")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--target", default="data", choices=["data", "base_hard", "base_soft", "total_variation"])
    parser.add_argument("--remat", default="full", choices=list(REMAT_POLICIES))
    parser.add_argument("--loss-chunk", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--rows", action="store_true")
    arguments = parser.parse_args()
    g = Geometry.from_config(TRIO_17M)
    console, T = Console(width=120), arguments.length

    if arguments.table:
        table = Table("T", "G", "mask rows", "seconds", "per 1,000 mask rows", "temporaries, MB", "GFLOP")
        for length in (T // 4, T // 2, T):
            for G in (length // 8, length // 4, length // 2, length):
                step = Step(MultiTokenLoss, g, arguments, length, G)
                seconds = statistics.median(step.seconds() for _ in range(arguments.repeats))
                rows = arguments.batch * G * arguments.masks
                table.add_row(
                    *(str(n) for n in (length, G, rows)),
                    f"{seconds:.3f}",
                    f"{1000 * seconds / rows:.3f}",
                    f"{step.temporaries / 1e6:.0f}",
                    f"{step.flops / 1e9:.1f}",
                )
        console.print(table)
        return

    if arguments.rows:
        table = Table("T", "G", "learned rows, seconds", "noise rows, seconds", "noise / learned")
        for G in (T, T // 8):
            sides = [Step(MultiTokenLoss, g, arguments, T, G, "none", rows) for rows in (None, Noise(0, g.V))]
            times = [[side.seconds() for side in sides] for _ in range(arguments.repeats)]
            learned, noise = (statistics.median(side) for side in zip(*times, strict=True))
            ratio = statistics.median(second / first for first, second in times)
            table.add_row(str(T), str(G), f"{learned:.3f}", f"{noise:.3f}", f"{ratio:.3f}")
        console.print(table)
        return

    table = Table("T", "G", "forward", "seconds", "faster", "temporaries, MB", "less", "gradients differ by")
    literal = {}
    for G in (T, T // 8):
        ours = Step(MultiTokenLoss, g, arguments, T, G)
        literal[G] = Step(LiteralPacking, g, arguments, T, G)
        against = literal[T]  # sampled anchors stand in for all: their rival is the packing of every prefix
        times = [(ours.seconds(), against.seconds()) for _ in range(arguments.repeats)]
        mine, theirs = (statistics.median(side) for side in zip(*times, strict=True))
        apart = distance(ours.gradient, literal[G].gradient)
        packed = (f"{theirs:.3f}", "", f"{against.temporaries / 1e6:.0f}", "", "")
        table.add_row(str(T), str(T), "literal packing", *packed)
        table.add_row(
            str(T),
            str(G),
            "two streams",
            f"{mine:.3f}",
            f"{theirs / mine:.1f}x",
            f"{ours.temporaries / 1e6:.0f}",
            f"1/{against.temporaries / ours.temporaries:.1f}",
            f"{apart:.1e}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
