"""Continuations that a model writes for tasks, each generated once."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from estimators.bounds import require_within
from experiments.config.errors import ConfigError, one_line
from experiments.scoring.cache import ScoreCache
from experiments.scoring.models import OpenModel
from experiments.scoring.score import Plan
from unet import Sampling, generate
from unet.decoding.kv_cache import rounded_up
from unet.decoding.sampling import NumBytes

BATCH = 32
"""Texts that are generated beside each other."""
FORMAT = 1
"""To be raised whenever the same model, prompts and settings would give other texts."""
DEFAULT_TOKENS = 256
"""Tokens of a text where a task sets no limit, as in the harness's own models."""

LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names that tasks have for the limit in tokens, in the order in which they count."""
KNOWN = {"until", "do_sample", "temperature", "top_k", "top_p", "min_p", "num_beams", "max_gen_bytes", *LIMITS}


@dataclass(frozen=True)
class Style:
    """How a task wants texts: their end and their greatest length in bytes, and how bytes are drawn (temperature 0: greedy)."""

    stop: tuple[str, ...]
    max_bytes: int
    temperature: float
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p)


def style_of(settings: Mapping[str, object], bytes_per_token: int) -> Style:
    """The style that a task's `generation_kwargs` ask for.

    `until`: one stop string or several. `max_gen_bytes`, or a limit in tokens (`LIMITS`), each of `bytes_per_token` bytes. Bytes
    are drawn at `temperature` (by default 1) if `do_sample` says so or, where it is left out, the temperature is above 0.
    Raises `ConfigError` for anything else.
    """
    if unknown := sorted(map(str, settings.keys() - KNOWN)):
        raise ConfigError(
            f"a task sets {one_line(unknown[0])} for generation, which this model does not have: it knows "
            f"{', '.join(sorted(KNOWN))}"
        )
    if settings.get("num_beams", 1) != 1:
        raise ConfigError(f"a task wants {settings['num_beams']!r} beams, but this model generates one text at a time")
    try:
        given = settings.get("temperature")
        temperature = 1.0 if given is None else float(str(given))
        is_drawn = settings.get("do_sample", given is not None and temperature > 0)
        style = Style(
            _strings(settings.get("until")),
            _max_bytes(settings, bytes_per_token),
            temperature if is_drawn else 0.0,
            _number(settings, "top_k", int),
            _number(settings, "top_p", float),
            _number(settings, "min_p", float),
        )
        style.sampling.checked()
        require_within("the limit of bytes", style.max_bytes, NumBytes)
    except ValueError as error:
        raise ConfigError(f"a task's generation settings cannot be used: {one_line(str(error))}") from None
    return style


def kept_prompt(prompt: bytes, context: int) -> bytes:
    """What is read of a prompt: with the BOS before it, at most `context` positions, which lose their beginning."""
    return prompt[-max(1, context - 1) :]


def _strings(until: object) -> tuple[str, ...]:
    """Stop strings: None, one, or several. An empty one would end every text before its first byte, so it is left out, as the
    harness's own models do."""
    strings = until if isinstance(until, list | tuple) else [] if until is None else [until]
    for string in strings:
        if not isinstance(string, str):
            raise ValueError(f"until must be strings; got {until!r}")
    return tuple(str(string) for string in strings if string)


def _max_bytes(settings: Mapping[str, object], bytes_per_token: int) -> int:
    limit = _number(settings, "max_gen_bytes", int)
    if limit is not None:
        return limit
    given = (_number(settings, name, int) for name in LIMITS)
    return next((tokens for tokens in given if tokens is not None), DEFAULT_TOKENS) * bytes_per_token


def _repeats(prompts: Sequence[bytes]) -> list[int]:
    """For each prompt, how many of the earlier ones are the same."""
    seen: Counter[bytes] = Counter()
    repeats = []
    for prompt in prompts:
        repeats.append(seen[prompt])
        seen[prompt] += 1
    return repeats


Number = TypeVar("Number", int, float)


def _number(settings: Mapping[str, object], name: str, kind: Callable[[str], Number]) -> Number | None:
    value = settings.get(name)
    return None if value is None else kind(str(value))


@dataclass(frozen=True)
class Generations:
    """A model that continues prompts with the boundaries of `plan`. What the cache has is not generated again.

    A prompt keeps the last `plan.context` - 1 bytes. A text has the keys of its prompt: those of the seed of `plan`, with the
    prompt's CRC-32 and the number of earlier requests with this prompt folded in. `known`: batches generated before.
    """

    opened: OpenModel
    plan: Plan
    cache: ScoreCache
    batch: int = BATCH
    known: dict[str, list[bytes]] = field(default_factory=dict)

    def of(
        self,
        prompts: Sequence[bytes],
        styles: Sequence[Style],
        advance: Callable[[int], None] = lambda number: None,
    ) -> list[bytes]:
        """The continuation of each prompt, without its stop string, in order."""
        kept = [kept_prompt(prompt, self.plan.context) for prompt in prompts]
        repeats = _repeats(kept)
        found: dict[int, bytes] = {}
        for numbers in self._batches(kept, styles):
            some = [kept[number] for number in numbers]
            texts = self._batch(some, [repeats[number] for number in numbers], styles[numbers[0]])
            found |= zip(numbers, texts, strict=True)
            advance(len(numbers))
        return [found[number] for number in range(len(kept))]

    def _batches(self, prompts: Sequence[bytes], styles: Sequence[Style]) -> Iterator[list[int]]:
        """Numbers of prompts of one style and of one padded length, the longest first."""
        groups: dict[tuple[int, Style], list[int]] = {}
        for number, (prompt, style) in enumerate(zip(prompts, styles, strict=True)):
            groups.setdefault((rounded_up(1 + len(prompt)), style), []).append(number)
        for _, numbers in sorted(groups.items(), key=lambda item: -item[0][0]):
            for first in range(0, len(numbers), self.batch):
                yield numbers[first : first + self.batch]

    def _batch(self, prompts: Sequence[bytes], repeats: Sequence[int], style: Style) -> list[bytes]:
        key = self._key(prompts, repeats, style)
        if key not in self.known:
            self.known[key] = self._stored_or_generated(key, prompts, repeats, style)
        return self.known[key]

    def _stored_or_generated(
        self, key: str, prompts: Sequence[bytes], repeats: Sequence[int], style: Style
    ) -> list[bytes]:
        stored = self.cache.read_arrays(key, ("sizes", "bytes"))
        if stored is not None and len(stored["sizes"]) == len(prompts):
            content, ends = stored["bytes"].tobytes(), np.cumsum(stored["sizes"])
            return [content[end - size : end] for end, size in zip(ends, stored["sizes"], strict=True)]
        generated = generate(
            self.opened.model,
            prompts,
            max_bytes=style.max_bytes,
            key=self._keys(prompts, repeats),
            sampling=style.sampling,
            stop=style.stop,
            greedy_boundaries=self.plan.boundaries == "greedy",
        )
        texts = [text.piece.bytes for text in generated.texts]
        sizes = np.array([len(text) for text in texts], np.int64)
        self.cache.write_arrays(key, {"sizes": sizes, "bytes": np.frombuffer(b"".join(texts), np.uint8)})
        return texts

    def _keys(self, prompts: Sequence[bytes], repeats: Sequence[int]) -> Key[Array, " prompts"]:
        numbers = jnp.asarray([zlib.crc32(prompt) for prompt in prompts], jnp.uint32)
        of_prompts = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(self.plan.seed), numbers)
        return jax.vmap(jax.random.fold_in)(of_prompts, jnp.asarray(repeats, jnp.uint32))

    def _key(self, prompts: Sequence[bytes], repeats: Sequence[int], style: Style) -> str:
        settings = [FORMAT, self.opened.digest, self.plan.boundaries, self.plan.seed, repr(style), list(repeats)]
        texts = [prompt.hex() for prompt in prompts]
        return hashlib.sha256(json.dumps(["generations", settings, texts]).encode()).hexdigest()
