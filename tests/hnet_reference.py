"""H-Net once more, written out plainly: one sequence at a time, row after row, by the published names of its parameters.

Nothing of the library is used here, and float64 throughout. What is computed follows the paper and the released configuration.
Slopes come by differences; where the released program lets a gradient pass through something that has none, the loss is told
what that was without the difference.
"""

import re

import numpy as np

NORM_EPSILON = 1e-5


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    raised = np.exp(x - x.max(axis=-1, keepdims=True))
    return raised / raised.sum(axis=-1, keepdims=True)


def rms_norm(x, weight):
    return weight * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + NORM_EPSILON)


def turned(x, dim):
    """The first `dim` dimensions of each head turned by the number of the row; x: rows, heads, head_dim."""
    half = dim // 2
    angles = np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(half) / max(half, 1))
    cos, sin = np.cos(angles)[:, None, :], np.sin(angles)[:, None, :]
    a, b = x[..., :half], x[..., half:dim]
    return np.concatenate([a * cos - b * sin, a * sin + b * cos, x[..., dim:]], axis=-1)


def attention(p, name, x, heads, rotary_dim, window):
    rows, dim = x.shape
    query, key, value = (x @ p[f"{name}.Wqkv.weight"].T).reshape(rows, 3, heads, dim // heads).swapaxes(0, 1)
    query, key = turned(query, rotary_dim), turned(key, rotary_dim)
    mixed = []
    for row in range(rows):
        first = 0 if window < 0 else max(0, row - window)
        logits = np.einsum("hd,khd->hk", query[row], key[first : row + 1]) / np.sqrt(dim // heads)
        mixed.append(np.einsum("hk,khd->hd", softmax(logits), value[first : row + 1]).reshape(-1))
    return np.stack(mixed) @ p[f"{name}.out_proj.weight"].T


def mamba(p, name, x, state):
    rows = len(x)
    inner = p[f"{name}.norm.weight"].shape[0]
    projected = x @ p[f"{name}.in_proj.weight"].T
    gate, channels, step = np.split(projected, [inner, 2 * inner + 2 * state], axis=1)
    weight = p[f"{name}.conv1d.weight"][:, 0]
    taps = weight.shape[1]
    padded = np.concatenate([np.zeros((taps - 1, channels.shape[1])), channels])
    mixed = np.stack([np.sum(padded[row : row + taps].T * weight, axis=1) for row in range(rows)])
    mixed = silu(mixed + p[f"{name}.conv1d.bias"])
    values, writes, reads = np.split(mixed, [inner, inner + state], axis=1)
    step = np.log1p(np.exp(step + p[f"{name}.dt_bias"]))
    decay = np.exp(-step * np.exp(p[f"{name}.A_log"]))
    heads, memory, read = step.shape[1], 0.0, []
    values = values.reshape(rows, heads, 64)
    for row in range(rows):
        added = step[row][:, None, None] * values[row][:, :, None] * writes[row]
        memory = decay[row][:, None, None] * memory + added
        read.append(memory @ reads[row] + p[f"{name}.D"][:, None] * values[row])
    gated = np.stack(read).reshape(rows, inner) * silu(gate)
    return rms_norm(gated, p[f"{name}.norm.weight"]) @ p[f"{name}.out_proj.weight"].T


def network(p, name, letters, x, config, stage):
    layers = [letter for letter, number in re.findall(r"([mMtT])(\d+)", letters) for _ in range(int(number))]
    attn = config["attn_cfg"]
    for number, letter in enumerate(layers):
        layer = f"{name}.layers.{number}"
        normed = rms_norm(x, p[f"{layer}.norm1.weight"])
        if letter in "mM":
            x = x + mamba(p, f"{layer}.mixer", normed, config["ssm_cfg"]["d_state"])
        else:
            settings = (attn[key][stage] for key in ("num_heads", "rotary_emb_dim", "window_size"))
            x = x + attention(p, f"{layer}.mixer", normed, *settings)
        if letter in "MT":
            value, gate = np.split(rms_norm(x, p[f"{layer}.norm2.weight"]) @ p[f"{layer}.mlp.fc1.weight"].T, 2, axis=1)
            x = x + (value * silu(gate)) @ p[f"{layer}.mlp.fc2.weight"].T
    return rms_norm(x, p[f"{name}.rmsnorm.weight"])


def unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def stage(p, name, layout, x, config, number, known):
    """Rows out, and the probabilities and boundaries of this stage and those inside; `known`: what those were before."""
    width = x.shape[1]
    if f"{name}.pad_dimension" in p:
        x = np.concatenate([x, np.tile(p[f"{name}.pad_dimension"], (len(x), 1))], axis=1)
    if len(layout) == 1:
        return network(p, f"{name}.main_network", layout[0], x, config, number)[:, :width], []
    x = network(p, f"{name}.encoder", layout[0], x, config, number)
    residual = x @ p[f"{name}.residual_proj.weight"].T + p[f"{name}.residual_proj.bias"]
    query = unit(x[:-1] @ p[f"{name}.routing_module.q_proj_layer.weight"].T)
    key = unit(x[1:] @ p[f"{name}.routing_module.k_proj_layer.weight"].T)
    probs = np.concatenate([np.ones(1), np.clip((1 - np.sum(query * key, axis=1)) / 2, 0, 1)])
    before, closes = known[0] if known else (probs, probs > 0.5)
    places = np.flatnonzero(closes)
    tokens, inside = stage(p, f"{name}.main_network", layout[1], x[places], config, number + 1, known[1:])
    average, averages = 0.0, []
    for token, place in zip(tokens, places, strict=True):
        prob = np.clip(probs[place], 1e-4, 1 - 1e-4)
        average = prob * token + (1 - prob) * average
        averages.append(average)
    joined = []
    for row, token in enumerate(np.cumsum(closes) - 1):
        # One, with the slope of the confidence.
        sure = 1 + (probs[row] - before[row]) * (1 if closes[row] else -1)
        joined.append(averages[token] * sure + residual[row])
    out = network(p, f"{name}.decoder", layout[2], np.stack(joined), config, number)
    return out[:, :width], [(probs, closes), *inside]


def model(p, config, ids, known=()):
    """Logits of one sequence, and the probabilities and boundaries of every stage."""
    hidden, levels = stage(p, "backbone", config["arch_layout"], p["embeddings.weight"][ids], config, 0, known)
    head = p["embeddings.weight" if config["tie_embeddings"] else "lm_head.weight"]
    return hidden @ head.T, levels


def loss(p, config, batch, chunk_size, known=None):
    """Mean cross-entropy of the next bytes, and .03 of the ratio loss of every stage over the rows of all sequences; and what is
    `known` of each sequence and stage."""
    nats, levels = [], []
    for number, ids in enumerate(batch):
        logits, found = model(p, config, ids, known[number] if known else ())
        nats += [-np.log(softmax(row)[after]) for row, after in zip(logits[:-1], ids[1:], strict=True)]
        levels.append(found)
    total = np.mean(nats)
    for same in zip(*levels, strict=True):
        expected, drawn = (np.mean(np.concatenate(parts)) for parts in zip(*same, strict=True))
        both = (1 - drawn) * (1 - expected) + drawn * expected * (chunk_size - 1)
        total = total + 0.03 * both * chunk_size / (chunk_size - 1)
    return total, levels


def slope(p, config, batch, chunk_size, known, name, direction):
    """Of the loss, where the parameter `name` moves in a direction."""
    size = 1e-5
    ahead, back = (
        loss({**p, name: p[name] + sign * size * direction}, config, batch, chunk_size, known)[0] for sign in (1, -1)
    )
    return (ahead - back) / (2 * size)


def shapes(config):
    """The shapes of all parameters by their published names, as the released program makes them of a configuration."""
    found = {"embeddings.weight": (256, config["d_model"][0])}
    _stage_shapes(found, "backbone", config["arch_layout"], config, 0)
    return found if config["tie_embeddings"] else found | {"lm_head.weight": (256, config["d_model"][0])}


def _stage_shapes(found, name, layout, config, number):
    dim = config["d_model"][number]
    wider = dim - config["d_model"][number - 1] if number else 0
    if wider:
        found[f"{name}.pad_dimension"] = (wider,)
    if len(layout) == 1:
        _network_shapes(found, f"{name}.main_network", layout[0], config, number)
        return
    _network_shapes(found, f"{name}.encoder", layout[0], config, number)
    _stage_shapes(found, f"{name}.main_network", layout[1], config, number + 1)
    _network_shapes(found, f"{name}.decoder", layout[2], config, number)
    for projection in ("routing_module.q_proj_layer", "routing_module.k_proj_layer", "residual_proj"):
        found[f"{name}.{projection}.weight"] = (dim, dim)
    found[f"{name}.residual_proj.bias"] = (dim,)


def _network_shapes(found, name, letters, config, number):
    ssm, dim = config["ssm_cfg"], config["d_model"][number]
    wide = -(-config["d_intermediate"][number] // 128) * 128
    layers = [letter for letter, count in re.findall(r"([mMtT])(\d+)", letters) for _ in range(int(count))]
    inner = ssm["expand"] * dim
    heads, channels = inner // 64, inner + 2 * ssm["d_state"]
    mamba_shapes = {
        "dt_bias": (heads,),
        "A_log": (heads,),
        "D": (heads,),
        "in_proj.weight": (inner + channels + heads, dim),
        "conv1d.weight": (channels, 1, ssm["d_conv"]),
        "conv1d.bias": (channels,),
        "norm.weight": (inner,),
        "out_proj.weight": (dim, inner),
    }
    for place, letter in enumerate(layers):
        layer = f"{name}.layers.{place}"
        mixer = mamba_shapes if letter in "mM" else {"Wqkv.weight": (3 * dim, dim), "out_proj.weight": (dim, dim)}
        found[f"{layer}.norm1.weight"] = (dim,)
        found.update({f"{layer}.mixer.{part}": shape for part, shape in mixer.items()})
        if letter in "MT":
            found[f"{layer}.norm2.weight"] = (dim,)
            found[f"{layer}.mlp.fc1.weight"], found[f"{layer}.mlp.fc2.weight"] = (2 * wide, dim), (dim, wide)
    found[f"{name}.rmsnorm.weight"] = (dim,)
