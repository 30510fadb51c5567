"""Whole models on the device: training steps, generation, scoring, a profile, and the sizes of the token level."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Iterator

import jax

import unet
from data import Split
from experiments.benchmark.cards import peak_of
from experiments.benchmark.device.asked import Asked, Item, Result
from experiments.benchmark.generation import texts_of, untrained_model
from experiments.benchmark.profile import ProfiledKernel, costliest
from experiments.benchmark.shapes import shapes_of
from experiments.benchmark.steps import Compiled, compiled_step
from experiments.benchmark.timing import Timing, time_interleaved
from experiments.config.settings import RunConfig
from experiments.training.data import load_split
from unet import TextStream
from unet.flops import layer_flops
from unet.fused_attention import AttentionForm
from unet.ops import Implementation

PROMPT = 512
"""Bytes of each prompt, at most half of the model's sequences."""

AS_IT_IS = "as it is"

SWITCHES: dict[str, tuple[Implementation | None, AttentionForm]] = {
    AS_IT_IS: (None, "auto"),
    "all in XLA": ("xla", "xla"),
    "attention in XLA": (None, "xla"),
    "own kernels in XLA": ("xla", "auto"),
}
"""The forms of the operations with kernels of this library and of attention."""


def utilisation(config: RunConfig, bytes_per_second: float) -> float | None:
    """Model FLOP utilisation: the products of every layer at the target rate, forward and backward without what is computed twice
    (`unet.flops.layer_flops`, embeddings as lookups), per second, as a share of the card's peak in bfloat16. None if that is
    unknown, and for products in another dtype."""
    peak = peak_of(jax.devices()[0].device_kind)
    if peak is None or config.unet.compute != "bfloat16":
        return None
    counts = layer_flops(shapes_of(config), length=config.length, rate=config.rate)
    return (counts.total - counts.embed) * bytes_per_second / peak


def memory_of_device() -> int | None:
    """The most memory of the device that arrays took in this process; None where it does not say."""
    stats = jax.devices()[0].memory_stats()
    return None if not stats else stats.get("peak_bytes_in_use")


class Steps:
    """The training step of one model, as it is and with its parts switched, each in turns with it as it is. Where that could not
    be measured, the others are timed alone."""

    def __init__(self, model: str, asked: Asked):
        self._asked, self._model = asked, model
        self._first: Compiled | None = None

    @functools.cached_property
    def _split(self) -> Split:
        return load_split(self._asked.config(self._model))

    def items(self) -> Iterator[Item]:
        """A row for each of `SWITCHES`."""
        for name, forms in SWITCHES.items():
            yield Item(f"{self._model}, {name}", functools.partial(self._measured, name, *forms))

    def _measured(self, name: str, implementation: Implementation | None, attention: AttentionForm) -> Result:
        config = self._asked.config(self._model, implementation, attention)
        own = compiled_step(config, self._split)
        timing = self._timed(own)
        ratio = None if self._first is None else timing.speedup
        # That of the process: later rows would have the highest of all.
        peak = memory_of_device() if name == AS_IT_IS else None
        if name == AS_IT_IS:
            self._first = own
        speed = config.bytes_per_step / timing.seconds
        return {
            "batch": f"{config.batch} × {config.length}",
            "ms": 1e3 * timing.seconds,
            "bytes/s": speed,
            "MFU": utilisation(config, speed),
            "times its speed as it is": ratio,
            "GiB at the peak": None if peak is None else peak / 2**30,
            "GiB by XLA": own.peak / 2**30,
            "s to compile": own.seconds,
        }

    def _timed(self, own: Compiled) -> Timing:
        first = {} if self._first is None else {"first": self._first.work}
        works = {**first, "own": own.work}
        asked = self._asked
        return time_interleaved(works, baseline=next(iter(works)), rounds=asked.rounds, calls=asked.calls)["own"]


def step_items(model: str, asked: Asked) -> list[Item]:
    """The training step of a model."""
    return list(Steps(model, asked).items())


def generation_items(asked: Asked) -> list[Item]:
    """Generation in batches of each size, and scoring, of the smallest and the largest model."""
    found: list[Item] = []
    for name in dict.fromkeys((asked.models[0], asked.models[-1])):
        writer = Writer(asked.config(name), asked)
        found += [
            Item(f"{name}, generation, {batch} at once", functools.partial(writer.generate, batch))
            for batch in asked.batches
        ]
        found.append(Item(f"{name}, scoring", writer.score))
    return found


class Writer:
    """An untrained model that generates and scores."""

    def __init__(self, config: RunConfig, asked: Asked):
        self._config, self._asked = config, asked

    @functools.cached_property
    def _model(self) -> unet.UNet:
        return untrained_model(self._config)

    @functools.cached_property
    def _split(self) -> Split:
        return load_split(self._config)

    def generate(self, batch: int) -> Result:
        """Bytes after prompts, so many texts at once. Programs are compiled in a round that does not count."""
        prompts = texts_of(self._split, batch, min(PROMPT, self._config.length // 2))
        speeds = []
        for number in range(1 + self._asked.rounds):
            stream = TextStream(
                self._model, prompts, max_bytes=self._asked.generated, key=jax.random.key(number), endless=True
            )
            for _ in stream:
                pass
            speeds.append(stream.throughput.bytes_per_second)
        return {"bytes/s": statistics.median(speeds[1:])}

    def score(self) -> Result:
        """Bytes of texts as long as the model's sequences."""
        texts = texts_of(self._split, self._config.batch, self._config.length - 1)

        def work() -> tuple[()]:
            unet.score(self._model, texts, key=jax.random.key(0), batch=len(texts))
            return ()

        timing = time_interleaved({"own": work}, baseline="own", rounds=self._asked.rounds)["own"]
        return {"bytes/s": sum(map(len, texts)) / timing.seconds}


def capacity_items(asked: Asked) -> list[Item]:
    """The step that chooses between several sizes of the token level, against the same with the largest alone."""
    return [Item(name, functools.partial(_capacities, asked.config(name), asked)) for name in asked.models]


def _capacities(config: RunConfig, asked: Asked) -> Result:
    split = load_split(config)
    works = {
        str(buckets): compiled_step(dataclasses.replace(config, buckets=buckets), split).work
        for buckets in dict.fromkeys((1, config.buckets))
    }
    timing = time_interleaved(works, baseline="1", rounds=asked.rounds, calls=asked.calls)[str(config.buckets)]
    return {
        "sizes": config.buckets,
        "ms": 1e3 * timing.seconds,
        "times the speed of one size": timing.speedup,
        "95 % interval": timing.ratio,
        "pays (5 %)": timing.speedup >= 1.05,
    }


def profile_items(asked: Asked) -> list[Item]:
    """The ten costliest kernels of a step of the largest model, each a row."""
    config = asked.config(asked.models[-1])

    @functools.cache
    def kernels() -> list[ProfiledKernel] | Exception:
        try:
            return costliest(compiled_step(config, load_split(config)).work, asked.calls)
        # Whatever it is, it is not tried again for each row.
        except Exception as error:
            return error

    def kernel(place: int) -> Result:
        found = kernels()
        if isinstance(found, Exception):
            raise found
        if place >= len(found):
            return {"kernel": "(none)"}
        one = found[place]
        return {"kernel": one.name, "launches a step": one.launches, "ms a step": one.ms, "share": one.share}

    return [Item(f"{asked.models[-1]}, {place + 1}", functools.partial(kernel, place)) for place in range(10)]
