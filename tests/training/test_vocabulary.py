"""The chunked loss is the plain one, in value and gradient, without memory for rows x vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtp_jax.model.chunks import sum_over_chunks
from mtp_jax.model.geometry import Geometry
from mtp_jax.model.head import Head
from mtp_jax.mtp.vocabulary import cross_entropy_sums, over_vocabulary, rows_at_a_time

B, T, D, V = 3, 17, 8, 50
G = Geometry.from_config(  # its head changes no logit
    {
        "model_type": "llama",
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": D,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": T,
    }
)


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    latents = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    table = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    return latents, table, labels, jnp.asarray(rng.random((B, T)) < 0.7)


def chunked(latents, table, labels, counted, chunk):
    def f(rows):
        return cross_entropy_sums(rows[0] @ table.T, *rows[1:])

    return sum_over_chunks(f, (latents, labels, counted), rows_at_a_time(chunk, len(latents)))


def plain(latents, table, labels, counted):
    logits = latents @ table.T
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    right = (logits.argmax(-1) == labels) & counted
    return {"loss": jnp.where(counted, loss, 0).sum(), "accuracy": right.sum().astype(jnp.float32)}


def close(a, b, tolerance=1e-6):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.parametrize("chunk", [1, 3, 7, 12, 15, B * T - 1, B * T, 1000])
def test_loss_and_gradient_are_those_of_the_whole(case, chunk):
    latents, table, labels, counted = case
    ours = jax.jit(chunked, static_argnums=4)(*case, chunk)
    theirs = plain(*case)
    assert close(ours["loss"], theirs["loss"]) and ours["accuracy"] == theirs["accuracy"]
    gradient = jax.jit(jax.grad(lambda *x: chunked(*x, labels, counted, chunk)["loss"], argnums=(0, 1)))(latents, table)
    expected = jax.grad(lambda *x: plain(*x, labels, counted)["loss"], argnums=(0, 1))(latents, table)
    assert all(close(a, b) for a, b in zip(gradient, expected, strict=True))
    assert (np.asarray(gradient[0])[~np.asarray(counted)] == 0).all()


def test_accuracy_counts_right_guesses(case):
    latents, table, _, counted = case
    best = (latents @ table.T).argmax(-1)
    assert chunked(latents, table, best, counted, 7)["accuracy"] == counted.sum()
    assert chunked(latents, table, (best + 1) % V, counted, 7)["accuracy"] == 0


def temporary_bytes(f, T):
    shapes = [
        jax.ShapeDtypeStruct((B, T, D), jnp.float32),
        jax.ShapeDtypeStruct((2000, D), jnp.float32),
        jax.ShapeDtypeStruct((B, T), jnp.int32),
        jax.ShapeDtypeStruct((B, T), jnp.bool_),
    ]
    gradient = jax.grad(lambda latents, table, *rest: f(latents, table, *rest)["loss"], argnums=(0, 1))
    return jax.jit(gradient).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_rows_times_vocabulary():
    logits = B * 256 * 2000 * 4  # bytes of the logits that four times the rows add, and more
    grown = temporary_bytes(lambda *x: chunked(*x, 48), 256) - temporary_bytes(lambda *x: chunked(*x, 48), 64)
    control = temporary_bytes(plain, 256) - temporary_bytes(plain, 64)
    assert control > 0.7 * logits
    assert grown < 0.05 * logits


# ---- losses whose gradient is found beside them


def judged(scores, labels):
    log_q = jax.nn.log_softmax(scores)
    gold = jnp.take_along_axis(log_q, labels[..., None], axis=-1)[..., 0]
    return -gold, scores.argmax(-1) == labels


def summed(latents, table, labels, counted, chunk, once=True):
    def f(rows):
        z, labels, counted = rows
        loss, right = over_vocabulary(judged, z, Head(table), G, labels) if once else judged(Head(table)(z, G), labels)
        return {"loss": jnp.sum(jnp.sin(loss) * counted), "right": jnp.sum(right & counted).astype(jnp.float32)}

    return sum_over_chunks(f, (latents, labels, counted), rows_at_a_time(chunk, len(latents)))


@pytest.mark.parametrize("chunk", [7, 1000])
def test_gradient_found_beside_the_loss_is_that_of_reverse_mode(case, chunk):
    latents, table, labels, counted = case
    values, gradients = [], []
    for once in (True, False):
        f = lambda z, once=once: summed(z, table, labels, counted, chunk, once)  # noqa: E731
        values.append(f(latents))
        gradients.append(jax.jit(jax.grad(lambda z, f=f: 3.0 * f(z)["loss"]))(latents))
    assert close(values[0]["loss"], values[1]["loss"]) and values[0]["right"] == values[1]["right"]
    assert close(*gradients) and np.abs(gradients[0]).max() > 0


def products(jaxpr, size):
    """Matrix products with an axis of this size, anywhere in a program."""
    count = 0
    for equation in jaxpr.eqns:
        shapes = [variable.aval.shape for variable in (*equation.invars, *equation.outvars)]
        count += equation.primitive.name == "dot_general" and any(size in shape for shape in shapes)
        count += sum(products(inner, size) for inner in jax.core.jaxprs_in_params(equation.params))
    return count


def test_logits_are_computed_once(case):
    latents, table, labels, counted = case
    of = lambda once: jax.make_jaxpr(  # noqa: E731
        jax.grad(lambda z: summed(z, table, labels, counted, 7, once)["loss"])
    )(latents)
    assert products(of(True).jaxpr, V) == 2  # logits, and their gradient in the latents
    assert products(of(False).jaxpr, V) == 3  # logits once more
