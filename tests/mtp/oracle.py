"""The method written out literally: one sequence of all rows, a dense mask, LoRA times gate, loops over definitions.

Independent of the package's forward: it shares only the names of the weights.
"""

import jax
import jax.numpy as jnp
import numpy as np


def rows_of(batch, b, M):
    """Every row of sequence b as (kind, index among real rows or anchor, offset, document, position)."""
    segments, positions = np.asarray(batch["segments"][b]), np.asarray(batch["positions"][b])
    rows = [("real", i, 0, segments[i], positions[i]) for i in range(len(segments))]
    for anchor in np.asarray(batch["anchors"][b]):
        if anchor >= 0:
            rows += [("mask", anchor, j, segments[anchor], positions[anchor] + j) for j in range(1, M + 1)]
    return rows


def sees(row, other, window):
    kind, at, offset, document, position = row
    kind2, at2, offset2, document2, position2 = other
    if document != document2 or (window is not None and position - position2 >= window):
        return False
    if kind2 == "real":
        return at2 <= at
    return kind == "mask" and at2 == at and offset2 <= offset


def rms_norm(x, scale, g):
    return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + g.norm_epsilon) * (scale + g.norm_offset)


def capped(x, cap):
    return x if cap is None else cap * jnp.tanh(x / cap)


def activation(g, x):
    if g.activation == "silu":
        return x / (1 + jnp.exp(-x))
    return x * (1 + jnp.tanh((2 / jnp.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2


def mixture(p, g, x, layer):
    """Every expert computes every row; the router's weights of those not chosen are 0."""
    share = jax.nn.softmax(x @ p["router"]["kernel"][layer], -1)
    least = jnp.sort(share, -1)[:, -g.experts.chosen][:, None]
    share = jnp.where(share >= least, share, 0)
    share = share / share.sum(-1, keepdims=True) if g.experts.normalised else share
    out = 0
    for e in range(g.experts.total):
        gate, up, down = (p["experts"][name][layer, e] for name in ("gate", "up", "down"))
        out += share[:, e : e + 1] * ((activation(g, x @ gate) * (x @ up)) @ down)
    return out


def embeddings(params, g, token):
    return params["embed"]["embedding"][token] * g.embed_scale


def logits(g, latents, table):
    return capped(latents @ table.T / g.logit_divisor, g.logit_cap)


def rotate(x, position, rope):  # [rows, heads, H]
    if rope is None:
        return x
    inv_freq = jnp.asarray(rope.inv_freq)
    if rope.long is not None:
        longer = position.max() + 1 > rope.long[1]
        inv_freq = jnp.where(longer, jnp.asarray(rope.long[0]), inv_freq)
    x, rest = x[..., : 2 * len(inv_freq)], x[..., 2 * len(inv_freq) :]
    angle = position[:, None].astype(jnp.float32) * inv_freq
    full = jnp.concatenate([angle, angle], -1)[:, None]
    half = x.shape[-1] // 2
    turned = jnp.concatenate([-x[..., half:], x[..., :half]], -1)
    return jnp.concatenate([(x * jnp.cos(full) + turned * jnp.sin(full)) * rope.scale, rest], -1)


def forward(params, adapter, g, shape, batch, b):
    """Final latents of all rows of sequence b, in the order of `rows_of`."""
    rows = rows_of(batch, b, shape.masks)
    tokens = np.asarray(batch["tokens"][b])
    anchors = np.asarray(batch["anchors"][b]).tolist()

    def embedding(kind, at, offset):
        if kind == "mask" and shape.noise is None:
            return adapter["mtp"]["masks"][offset - 1]
        token = tokens[at] if kind == "real" else np.asarray(batch["noise"][b])[anchors.index(at), offset - 1]
        return embeddings(params, g, token)

    x = jnp.stack([embedding(*row[:3]) for row in rows])
    gate = np.array([1.0 if r[0] == "mask" or not shape.gated else 0.0 for r in rows], np.float32)[:, None]
    position = jnp.asarray([r[4] for r in rows])
    for layer in range(g.L):
        visible = np.array([[sees(r, o, g.windows[layer]) for o in rows] for r in rows])

        def project(name, h, layer=layer):
            p = {k: v[layer] for k, v in params["layers"][name].items()}
            y = h @ p["kernel"] + p.get("bias", 0.0)
            if name in adapter["lora"]["layers"]:
                lora = adapter["lora"]["layers"][name]
                y = y + gate * (shape.alpha / shape.rank) * ((h @ lora["a"][layer]) @ lora["b"][layer])
            return y

        def norm(name, h, layer=layer):  # where the model has it
            of = params["layers"].get(name)
            return h if of is None else rms_norm(h, of["scale"][layer], g)

        h = norm("attention_norm", x)
        q, k, v = (project(name, h) for name in "qkv")
        if g.qk_norm == "width":
            q, k = norm("q_norm", q), norm("k_norm", k)
        q, k, v = q.reshape(-1, g.N, g.H), k.reshape(-1, g.K, g.H), v.reshape(-1, g.K, g.H)
        if g.qk_norm == "head":
            q, k = norm("q_norm", q), norm("k_norm", k)
        rope = g.layers[layer].rope
        q, k = rotate(q, position, rope), rotate(k, position, rope)
        k, v = jnp.repeat(k, g.N // g.K, 1), jnp.repeat(v, g.N // g.K, 1)
        scale = g.H**-0.5 if g.score_scale is None else g.score_scale
        scores = capped(jnp.einsum("rnh,snh->nrs", q, k) * scale, g.score_cap)
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), -1)
        h = project("o", jnp.einsum("nrs,snh->rnh", weights, v).reshape(len(rows), -1))
        x = x + g.residual_scale * norm("attention_out_norm", h)
        h = norm("mlp_norm", x)
        if g.experts:
            h = mixture(params["layers"]["mixture"], g, h, layer)
        else:
            h = project("down", activation(g, project("gate", h)) * project("up", h))
        x = x + g.residual_scale * norm("mlp_out_norm", h)
    return rms_norm(x, params["norm"]["scale"], g)


def sampler_latents(adapter, shape, embedding, z):
    s = adapter["mtp"]["sampler"]
    h = jnp.concatenate([embedding, z], -1)
    for i in range(2):
        h = layer_norm(jax.nn.silu(h @ s[f"linear_{i}"]["kernel"] + s[f"linear_{i}"]["bias"]), s[f"norm_{i}"])
    return z + h if shape.sampler == "residual" else h


def layer_norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def losses(adapter, params, g, shape, terms, batch, vocabulary=None):
    """Every loss term and the total, by the definitions of the method, plus all latents; `vocabulary` is drafted."""
    E = params["embed"]["embedding"] * g.embed_scale
    table = params["embed"]["embedding"] if g.tied else params["unembed"]["embedding"]
    ids = np.arange(len(table)) if vocabulary is None else np.asarray(vocabulary)
    rest = (params, g, shape, terms, batch)
    parts = [sequence_losses(adapter, *rest, b, E, table, ids) for b in range(len(batch["tokens"]))]

    def mean(*names):  # over rows of all sequences: summed losses over summed counts
        found = [part[name] for part in parts for name in names if name in part]
        return sum(jnp.sum(loss) for loss, _ in found) / sum(np.sum(count) for _, count in found)

    out = {"base_loss": mean("base"), "real_loss": mean("real"), "lcm_loss": mean("lcm")}
    base = out["base_loss"] if shape.gated else mean("base", "real")
    total = terms.base_weight * base + terms.lcm_weight * out["lcm_loss"]
    if shape.sampler != "none":
        out["sampler_loss"] = sampler = mean("sampler")
        if terms.sampler_on_real:
            out["sampler_real_loss"], sampler = mean("sampler_real"), mean("sampler", "sampler_real")
        total = total + terms.sampler_weight * sampler
    out["loss"] = total
    return total, (out, [part["latents"] for part in parts])


def sequence_losses(adapter, params, g, shape, terms, batch, b, E, table, ids):
    z = forward(params, adapter, g, shape, batch, b)
    tokens, labels = np.asarray(batch["tokens"][b]), np.asarray(batch["labels"][b])
    supervised, segments = np.asarray(batch["supervised"][b]), np.asarray(batch["segments"][b])
    T = len(tokens)

    def nll(latents, label):
        return -jnp.take_along_axis(jax.nn.log_softmax(logits(g, latents, table)), label[:, None], 1)[:, 0]

    out = {"latents": z}
    real = np.flatnonzero(supervised)
    out["real"] = nll(z[real], labels[real]), np.ones(len(real))
    if terms.sampler_on_real and shape.sampler != "none":
        latents = sampler_latents(adapter, shape, E[tokens[real]], z[real])
        out["sampler_real"] = nll(latents, labels[real]), np.ones(len(real))

    # Mask rows with a real row of equal position t in their document: (row number, anchor, offset, t).
    masks = [
        (r, anchor, j, anchor + j)
        for r, (kind, anchor, j, document, _) in enumerate(rows_of(batch, b, shape.masks))
        if kind == "mask" and anchor + j < T and segments[anchor + j] == document
    ]
    group_size = {t: sum(1 for m in masks if m[3] == t) for t in {m[3] for m in masks}}
    row, at = np.array([m[0] for m in masks]), np.array([m[3] for m in masks])
    gap = jnp.mean((jax.lax.stop_gradient(z[at]) - z[row]) ** 2, -1)
    sizes = np.array([group_size[t] for t in at])
    out["lcm"] = gap / sizes, 1 / sizes  # the mean over positions of the mean over the rows of a position

    if terms.target == "data":
        masks = [m for m in masks if supervised[m[3]]]
        row, at = np.array([m[0] for m in masks]), np.array([m[3] for m in masks])
    heads = {"base": z[row]}
    if shape.sampler != "none":
        heads["sampler"] = sampler_latents(adapter, shape, E[tokens[at]], z[row])
    target = jax.lax.stop_gradient(logits(g, z[at], table))
    for name, latents in heads.items():
        p, q = jax.nn.softmax(target[:, ids]), jax.nn.softmax(logits(g, latents, table[ids]))
        tv = jnp.abs(p - q).sum(-1) / 2
        if terms.target in ("data", "base_hard"):
            label = labels[at] if terms.target == "data" else jnp.argmax(target, -1)
            chance = jnp.sum(q * (label[:, None] == ids), -1)  # 0 of a label that is never drafted
            loss = -jnp.log(jnp.where(chance > 0, chance, 1.0))
        else:
            loss = tv if terms.target == "total_variation" else jnp.sum(p * (jnp.log(p) - jnp.log(q)), -1)
        count = np.ones(len(masks))
        weight = list(count)
        if terms.offset_weights == "decay":
            count = weight = np.array([terms.decay ** (j - 1) for _, _, j, _ in masks])
        elif terms.offset_weights == "expected_length":
            accepted = chance if terms.target in ("data", "base_hard") else 1 - tv
            for i, (_, anchor, j, _) in enumerate(masks):
                if j > 1:  # the chain reaches offset j if every draft before it is accepted
                    before = next(k for k, m in enumerate(masks) if m[1:3] == (anchor, j - 1))
                    weight[i] = weight[before] * jax.lax.stop_gradient(accepted)[before]
        out[name] = loss * jnp.asarray(weight), count
    return out
