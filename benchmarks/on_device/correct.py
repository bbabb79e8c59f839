"""Whether this device computes what the CPU does, decodes losslessly, and samples from the right distribution."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.stats import chi2
from train_step import distance, make_batch

import mtp_jax
from mtp_jax.cpu import fastest_forward
from mtp_jax.decoding.generator import Completion, Generator, tokens_per_step
from mtp_jax.decoding.options import Options, Sampling
from mtp_jax.decoding.plan import parse_plan, plain
from mtp_jax.model.decoder import Decoder
from mtp_jax.model.geometry import Geometry
from mtp_jax.model.weights import PROJECTIONS, Params, init_params, unstack_layers
from mtp_jax.mtp.adapter import AdapterShape, init_adapter
from mtp_jax.mtp.losses import LossTerms, MultiTokenLoss
from on_device import Cases, Setting
from on_device.geometries import TINY

_SMALL = TINY | {"vocab_size": 64, "initializer_range": 0.3}
_FEW = TINY | {"vocab_size": 6, "hidden_size": 16, "intermediate_size": 24, "head_dim": 8, "initializer_range": 0.8}
_SHAPE = AdapterShape(4, 8, 16.0, PROJECTIONS, "residual")
_PLANS = ("linear:1", "linear:4", "quadratic:1", "quadratic:2", "quadratic:4", "blocks:3,2,1,1")
_PROMPTS = (
    "def main():",
    "class Reader:",
    "import os\n",
    "for i in range(",
    "if not self.",
    "try:\n",
    "x = [",
    "with ",
)
_NEVER = 1e-6  # a right distribution has a smaller p-value with this probability


def cases(setting: Setting) -> Cases:
    """Two streams, each plan, sampling, bfloat16."""
    yield "two streams against the CPU", lambda: streams(64 if setting.tiny else 256)
    learnt = _Learnt(40 if setting.tiny else 120)
    for plan in _PLANS:
        yield f"lossless: {plan}", lambda plan=plan: learnt.lossless(plan)
    yield "sampled: chi-square", lambda: sampled(4_000 if setting.tiny else 24_000)
    yield "bfloat16 flips", lambda: flips(16 if setting.tiny else 64)


def streams(length: int) -> dict[str, Any]:
    """Loss and gradient of the two-stream step in float32 at the highest precision, here and on the CPU."""
    g = Geometry.from_config(TINY)
    loss = MultiTokenLoss(Decoder(g), _SHAPE, LossTerms(), 1024)
    params = init_params(g, jax.random.key(0))
    adapter = init_adapter(g, _SHAPE, params["embed"]["embedding"], jax.random.key(1))
    adapter = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(2), x.shape), adapter)
    arguments = (adapter, {"params": params}, make_batch(2, length, length // 4, g.V))

    def gradient(trained: Any, frozen: Any, batch: Any) -> Any:
        return jax.value_and_grad(loss.loss, has_aux=True)(trained, frozen, batch, loss.totals(batch), jnp.int32(0))

    found = []
    for device in (jax.devices()[0], jax.devices("cpu")[0]):
        with jax.default_matmul_precision("highest"):
            (value, _), slopes = jax.jit(gradient)(*jax.device_put(arguments, device))
        found.append((float(value), jax.device_get(slopes)))
    (here, slopes), (there, theirs) = found
    apart = {"loss": abs(here - there) / abs(there), "gradient": distance(slopes, theirs)}
    return {"relative_difference": apart, "right": max(apart.values()) < 1e-4}


class _Learnt:
    """A small random model, and an adapter that has learnt what it writes on the spot."""

    def __init__(self, steps: int):
        self.steps, self.made = steps, None

    def generator(self) -> Generator:
        if self.made is None:
            self.made = self._make()
        return self.made

    def _make(self) -> Generator:
        g, new = Geometry.from_config(_SMALL), 48
        params = init_params(g, jax.random.key(3))
        self.prompts = np.random.default_rng(0).integers(0, g.V, (16, 8)).tolist()
        adapter = init_adapter(g, _SHAPE, params["embed"]["embedding"], jax.random.key(4))
        self.plain = _generator(g, params, adapter, _SHAPE, Options()).complete(self.prompts, new, 16)
        tokens = np.asarray([p + done.token_ids for p, done in zip(self.prompts, self.plain, strict=True)], np.int32)
        batch = make_batch(len(tokens), tokens.shape[1] - 1, None, g.V)
        batch |= {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}
        loss = MultiTokenLoss(Decoder(g), _SHAPE, LossTerms("base_hard", lcm_weight=0.0), 4096)
        tx = optax.adam(5e-3)

        @jax.jit
        def step(adapter: Any, state: Any) -> Any:
            of = lambda a: loss.loss(a, {"params": params}, batch, loss.totals(batch), jnp.int32(0))[0]  # noqa: E731
            updates, state = tx.update(jax.grad(of)(adapter), state)
            return optax.apply_updates(adapter, updates), state

        state = tx.init(adapter)
        for _ in range(self.steps):
            adapter, state = step(adapter, state)
        return _generator(g, params, adapter, _SHAPE, Options())

    def lossless(self, plan: str) -> dict[str, Any]:
        """Outputs with drafts against those without, alone and in a batch."""
        generator = self.generator().using(plan=parse_plan(plan))
        same, all_ = 0, []
        for size in (1, 16):
            done = generator.complete(self.prompts[: 4 if size == 1 else None], 48, size)
            same += sum(a.token_ids == b.token_ids for a, b in zip(done, self.plain, strict=False))
            all_ += done
        count = len(all_)
        return {"identical": same, "of": count, "tokens_per_step": tokens_per_step(all_), "right": same == count}


def sampled(draws: int) -> dict[str, Any]:
    """p-values of draws with drafts: against the base's distribution, and against one of another temperature."""
    g, new, prompt, size = Geometry.from_config(_FEW), 3, [1, 4, 2], 2_000
    shape = AdapterShape(2, 4, 8.0, PROJECTIONS, "residual")
    params = init_params(g, jax.random.key(3))
    adapter = init_adapter(g, shape, params["embed"]["embedding"], jax.random.key(4))
    draw = np.random.default_rng(5)
    adapter = jax.tree.map(lambda x: x + 0.2 * draw.standard_normal(x.shape).astype(np.float32), adapter)
    generator = _generator(g, params, adapter, shape, Options(parse_plan("quadratic:2"), 4))
    counts = np.zeros(g.V**new)
    for start in range(0, draws, size):
        for done in generator.complete([prompt] * size, new, size, Sampling(temperature=1.0, seed=0), start):
            counts[int(np.polyval(done.token_ids, g.V))] += 1
    right, wrong = (improbability(counts, joint(g, params, prompt, new, heat)) for heat in (1.0, 1.2))
    return {"draws": draws, "p_value": right, "p_value_of_another_temperature": wrong, "right": right > _NEVER > wrong}


def joint(g: Geometry, params: Params, prompt: list[int], new: int, temperature: float) -> np.ndarray:
    """The probability of every text of `new` tokens behind a prompt, from the base model alone."""
    texts = np.array(list(itertools.product(range(g.V), repeat=new)), np.int32)
    tokens = np.concatenate([np.tile(prompt, (len(texts), 1)), texts], axis=1).astype(np.int32)
    model = Decoder(g)

    @jax.jit
    def logits(tokens: Any) -> Any:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        latents, _ = model.apply({"params": params}, tokens, positions)
        return jax.nn.log_softmax(model.apply({"params": params}, latents, method="logits") / temperature)

    with jax.default_matmul_precision("highest"):
        rows = np.asarray(logits(tokens), np.float64)[:, len(prompt) - 1 : -1]
    return np.exp(np.take_along_axis(rows, texts[..., None], axis=2)[..., 0].sum(axis=1))


def improbability(counts: np.ndarray, probability: np.ndarray) -> float:
    """p-value of chi-square; texts that are expected less than ten times count together."""
    expected = probability / probability.sum() * counts.sum()
    often = expected >= 10
    pairs = list(zip(counts[often], expected[often], strict=True))
    if (~often).any():
        pairs.append((counts[~often].sum(), expected[~often].sum()))
    found, wanted = np.array(pairs).T
    return float(chi2.sf(np.sum((found - wanted) ** 2 / wanted), len(pairs) - 1))


def flips(new: int) -> dict[str, Any]:
    """Outputs in bfloat16 that differ from plain decoding's with batch 1: its own in a batch, and those with drafts."""
    generator = mtp_jax.load("bundled:stdlib-5m", adapter="bundled:stdlib-5m", dtype="bfloat16")
    prompts = [generator.encode(prompt) for prompt in _PROMPTS]

    def run(plan: Any, size: int) -> list[Completion]:
        return generator.using(plan=plan).complete(prompts, new, size)

    def differ(done: list[Completion]) -> int:
        return sum(a.token_ids != b.token_ids for a, b in zip(done, alone, strict=True))

    alone = run(plain(), 1)
    found = {"none, batch 8": differ(run(plain(), 8))}
    found |= {plan: differ(run(parse_plan(plan), 1)) for plan in ("linear:4", "quadratic:4")}
    return {"outputs": len(prompts), "flips": found}


def _generator(g: Geometry, params: Params, adapter: Params, shape: AdapterShape, options: Options) -> Generator:
    forward = fastest_forward(Decoder(g, scanned=False), shape)
    variables = forward.prepare(unstack_layers(jax.tree.map(jnp.copy, params)), adapter)
    return Generator(forward, variables, None, (), options)
