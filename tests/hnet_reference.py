"""A small one-stage H-Net as plainly as it can be written, for golden files: its layers are loops and full matrices, its
chunking is the library's own."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp

from estimators import Boundaries, CosineRouter, Draw, Likelier
from unet import Projection, SelectSmooth
from unet.likelihood import plain_layout
from unet.ops import boundary_scan

EPS = 1e-5


class Weights(dict):
    """Parameters by their published names; `part` narrows to those under a prefix."""

    def part(self, prefix):
        return Weights({name[len(prefix) + 1 :]: v for name, v in self.items() if name.startswith(prefix + ".")})


def rms_norm(x, weight):
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + EPS) * weight


def mamba(x, w, state):
    """Mamba-2, one step after another."""
    inner = w["norm.weight"].shape[0]
    heads = w["A_log"].shape[0]
    z, xbc, dt = jnp.split(x @ w["in_proj.weight"].T, [inner, 2 * inner + 2 * state], axis=-1)
    padded = jnp.pad(xbc, ((0, 0), (3, 0), (0, 0)))
    taps = w["conv1d.weight"][:, 0]
    xbc = sum(padded[:, k : k + x.shape[1]] * taps[:, k] for k in range(4)) + w["conv1d.bias"]
    value, b, c = jnp.split(jax.nn.silu(xbc), [inner, inner + state], axis=-1)
    dt = jax.nn.softplus(dt + w["dt_bias"])
    decay = jnp.exp(-dt * jnp.exp(w["A_log"]))
    value = value.reshape(*x.shape[:2], heads, -1)

    def step(memory, row):
        decay, dt, value, b, c = row
        memory = decay[..., None, None] * memory + (dt[..., None] * value)[..., None] * b[:, None, None, :]
        return memory, jnp.einsum("bhps,bs->bhp", memory, c)

    memory = jnp.zeros((x.shape[0], heads, value.shape[-1], state))
    rows = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), (decay, dt, value, b, c))
    _, out = jax.lax.scan(step, memory, rows)
    out = jnp.swapaxes(out, 0, 1) + w["D"][:, None] * value
    gated = out.reshape(*x.shape[:2], inner) * jax.nn.silu(z)
    return rms_norm(gated, w["norm.weight"]) @ w["out_proj.weight"].T


def rotate(x, positions, size):
    angles = positions[..., None] * 10000.0 ** (-jnp.arange(0, size, 2) / size)
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second, rest = x[..., : size // 2], x[..., size // 2 : size], x[..., size:]
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos, rest], axis=-1)


def attention(x, w, heads, rotary):
    batch, length, dim = x.shape
    q, k, v = jnp.moveaxis((x @ w["Wqkv.weight"].T).reshape(batch, length, 3, heads, -1), 2, 0)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.float32), (batch, length))
    q, k = rotate(q, positions, rotary), rotate(k, positions, rotary)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(q.shape[-1])
    scores = jnp.where(jnp.tri(length, dtype=bool), scores, -jnp.inf)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v)
    return mixed.reshape(batch, length, dim) @ w["out_proj.weight"].T


def network(x, w, layer):
    """Pre-norm layers with a norm at the end."""
    number = 0
    while f"layers.{number}.norm1.weight" in w:
        part = w.part(f"layers.{number}")
        x = x + layer(rms_norm(x, part["norm1.weight"]), part.part("mixer"))
        if "norm2.weight" in part:
            value, gate = jnp.split(rms_norm(x, part["norm2.weight"]) @ part["mlp.fc1.weight"].T, 2, axis=-1)
            x = x + (value * jax.nn.silu(gate)) @ part["mlp.fc2.weight"].T
        number += 1
    return rms_norm(x, w["rmsnorm.weight"])


def hnet(weights: Weights, config: str, ids) -> tuple[jax.Array, Boundaries]:
    """Logits and boundaries of a one-stage model."""
    settings = json.loads(config)
    state = settings["ssm_cfg"]["d_state"]
    outer, inner = settings["d_model"]
    heads, rotary = settings["attn_cfg"]["num_heads"][1], settings["attn_cfg"]["rotary_emb_dim"][1]
    w = weights.part("backbone")
    projection = _with(Projection(outer), weight=w["residual_proj.weight"], bias=w["residual_proj.bias"])
    chunker = SelectSmooth(projection)
    query, key = (w[f"routing_module.{name}_proj_layer.weight"] for name in "qk")
    router = Likelier(_with(CosineRouter(outer), query=query, key=key))

    encoded = network(weights["embeddings.weight"][ids], w.part("encoder"), lambda x, p: mamba(x, p, state))
    boundaries = router(encoded, plain_layout(ids), Draw(boundary_scan))
    rows = chunker.down(encoded, boundaries, capacity=ids.shape[1])
    pad = jnp.broadcast_to(w["main_network.pad_dimension"], (*rows.values.shape[:2], inner - outer))
    tokens = network(
        jnp.concatenate([rows.values, pad], axis=-1),
        w.part("main_network.main_network"),
        lambda x, p: attention(x, p, heads, rotary),
    )
    joined = chunker.up(tokens[..., :outer], rows, encoded, boundaries)
    decoded = network(joined, w.part("decoder"), lambda x, p: mamba(x, p, state))
    return decoded @ weights["lm_head.weight"].T, boundaries


def _with(module, **fields):
    """The module with some of its fields replaced, past its own `__init__`."""
    names = tuple(fields)
    return eqx.tree_at(
        lambda m: tuple(getattr(m, name) for name in names), module, tuple(fields[name] for name in names)
    )
