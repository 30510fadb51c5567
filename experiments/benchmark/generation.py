"""What it costs to generate byte by byte, against a forward pass over everything for each byte."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from data import Split
from estimators import Layout, RuleRouter
from experiments.config.registry import build_model
from experiments.config.settings import RunConfig
from unet import TextStream, UNet
from unet.decoding.kv_cache import KVCache, rounded_up
from unet.decoding.score import padded, rate_of
from unet.hierarchy import Hierarchy, HierarchyState

BATCH = 16
PROMPT = 512
GENERATED = 512


@dataclass(frozen=True)
class GenerationReport:
    """Medians over rounds. `speedup`: the time of a forward pass over a text of the mean length, over that of a byte generated
    alone; `bytes_per_second` alone and in a batch, and `batch_speedup`, their ratio; `token_steps`: the share of steps in which
    the token level ran; `token_time`: the share of the time that is gone where no token ever closes."""

    speedup: float
    bytes_per_second: float
    batch_bytes_per_second: float
    batch_speedup: float
    token_steps: float
    batch_token_steps: float
    token_time: float
    batch_token_time: float


@dataclass(frozen=True)
class CacheReport:
    """Bytes that one text of `context` bytes keeps at the byte level and at the token level, and its tokens."""

    context: int
    byte_level: int
    token_level: int
    tokens: int


def fresh(config: RunConfig) -> UNet:
    """The model of a run before training."""

    def build() -> UNet:
        return build_model(config, jax.random.key(config.seed))

    return eqx.filter_jit(build)()


def never(layout: Layout) -> Bool[Array, "batch length"]:
    """No boundary but those that are forced."""
    return jnp.zeros_like(layout.mask)


def texts_of(split: Split, count: int, size: int) -> list[bytes]:
    """Text of the validation part, cut into pieces of `size` bytes; begun again where it is too short."""
    rows = split.held_out_rows(count * size)
    text = b"".join(row["bytes"][row["mask"]].tobytes() for row in rows)
    text = text.replace(b"\xfe", b"").replace(b"\xff", b"")
    text *= -(-count * size // len(text))
    return [text[start : start + size] for start in range(0, count * size, size)]


@eqx.filter_jit
def _pass(
    model: UNet, bytes: Int[Array, "batch length"], keys: Key[Array, " batch"], capacity: int
) -> Float[Array, "batch vocab"]:
    return model(bytes, key=keys, capacities=(capacity,)).logits[:, -1]


def decode(model: UNet, prompts: Sequence[bytes], seed: int) -> TextStream:
    """All of it, for its throughput."""
    stream = TextStream(model, prompts, max_bytes=GENERATED, key=jax.random.key(seed), endless=True)
    for _ in stream:
        pass
    return stream


def measure_generation(config: RunConfig, split: Split, *, rounds: int) -> GenerationReport:
    """Generate 512 bytes after prompts of 512, alone and in a batch of 16, with an untrained model of that shape."""
    model = fresh(config)
    assert isinstance(model.stage, Hierarchy)
    closed = eqx.tree_at(lambda m: m.stage.estimator.router, model, RuleRouter(never, 0, rate_of(model)))
    prompts, keys = texts_of(split, BATCH, PROMPT), jax.random.split(jax.random.key(0), 1)
    middle = jnp.asarray(padded([texts_of(split, 1, PROMPT + GENERATED // 2 - 1)[0]]))
    capacity = rounded_up(round(1.3 * rate_of(model) * middle.shape[1]))

    def passing() -> float:
        started = time.perf_counter()
        _pass(model, middle, keys, capacity).block_until_ready()
        return time.perf_counter() - started

    passing()
    found: list[GenerationReport] = []
    for number in range(rounds + 1):
        whole = statistics.median(passing() for _ in range(5))
        one, many = decode(model, prompts[:1], number).throughput, decode(model, prompts, number).throughput
        quiet, all_quiet = decode(closed, prompts[:1], number).throughput, decode(closed, prompts, number).throughput
        speed, together = one.bytes_per_second, many.bytes_per_second
        found.append(
            GenerationReport(
                whole * speed,
                speed,
                together,
                together / speed,
                one.token_steps / one.steps,
                many.token_steps / many.steps,
                1.0 - speed / quiet.bytes_per_second,
                1.0 - together / all_quiet.bytes_per_second,
            )
        )
    # In the first round programs for a second size of cache may have been compiled.
    values = [list(vars(one).values()) for one in found[1:]]
    return GenerationReport(*(statistics.median(column) for column in zip(*values, strict=True)))


def measure_caches(config: RunConfig, split: Split, contexts: Sequence[int]) -> list[CacheReport]:
    """What is kept of prompts of these lengths."""
    model, found = fresh(config), []
    for context in contexts:
        writer = TextStream(model, texts_of(split, 1, context), max_bytes=1, key=jax.random.key(0))
        memory = writer.state.stage
        assert isinstance(memory, HierarchyState)
        inner = kept_bytes(memory.inner)
        outer = kept_bytes((memory.encoder, memory.decoder))
        found.append(CacheReport(context, outer, inner, int(np.asarray(memory.tokens)[0])))
    return found


def kept_bytes(memory: object) -> int:
    """Bytes of the rows that caches hold, without slots that are still free."""
    caches = jax.tree.leaves(memory, is_leaf=lambda part: isinstance(part, KVCache))
    rows = [(cache, min(int(cache.lengths[0]), cache.slots)) for cache in caches if isinstance(cache, KVCache)]
    return sum((cache.keys.nbytes + cache.values.nbytes) * count // cache.slots for cache, count in rows)
