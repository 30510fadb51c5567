"""What some estimators take from data before training begins: a vocabulary, or a byte model and a threshold on its entropy."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import equinox as eqx
import jax
import numpy as np

from data import BOS, Batch, Split, open_batches
from estimators import Layout
from estimators.bpe import PrefixTree, find_size, train_vocabulary
from estimators.entropy import find_threshold, next_byte_entropy
from experiments.config import ConfigError, RunConfig, to_json
from experiments.folder import read_config
from experiments.registry import ByteModel, Found, patch_rule
from unet import UNet
from unet.likelihood import plain_layout
from unet.saving import CONFIG, WEIGHTS, load, save, write_atomically

VOCABULARY = "vocabulary.json"
BYTE_MODEL = "byte_model"

VOCABULARY_BYTES = 2**23
"""Training text, at most, that a vocabulary is learned from."""
RATE_BYTES = 2**19
"""Training text that rates are measured on."""


def find(config: RunConfig, split: Split) -> Found:
    """What the estimator of `config` needs of the training text. Raises `ConfigError` where it is not to be had."""
    try:
        if config.estimator in ("bpe", "bpe-distilled"):
            return Found(vocabulary=_find_vocabulary(config, split))
        if config.estimator == "entropy" and config.entropy.model is not None:
            byte_model = read_byte_model(config.entropy.model)
            return Found(byte_model=byte_model, threshold=threshold_of(config, byte_model.model, split))
    except (ImportError, ValueError) as error:
        raise ConfigError(f"--estimator {config.estimator}: {error}") from error
    return Found()


def write_found(folder: Path, found: Found) -> None:
    """Keep in a run's folder what cannot be had from its checkpoints."""
    if found.vocabulary is not None:
        words = [token.decode("latin-1") for token in found.vocabulary]
        write_atomically(folder / VOCABULARY, json.dumps(words) + "\n")
    if found.byte_model is not None:
        (folder / BYTE_MODEL).mkdir(exist_ok=True)
        write_atomically(folder / BYTE_MODEL / CONFIG, to_json(found.byte_model.config))
        save(found.byte_model.model, folder / BYTE_MODEL)


def read_found(folder: Path, config: RunConfig) -> Found | None:
    """What `write_found` kept; None where it did not come to that. The threshold comes with the model's weights."""
    if config.estimator in ("bpe", "bpe-distilled"):
        path = folder / VOCABULARY
        if not path.is_file():
            return None
        try:
            return Found(vocabulary=tuple(word.encode("latin-1") for word in json.loads(path.read_text())))
        except (ValueError, AttributeError, TypeError) as error:
            raise ConfigError(f"{path} is not a vocabulary ({error})") from None
    if config.estimator == "entropy":
        if not (folder / BYTE_MODEL / WEIGHTS).is_file():
            return None
        return Found(byte_model=read_byte_model(folder / BYTE_MODEL), threshold=0.0)
    return Found()


def read_byte_model(folder: Path) -> ByteModel:
    """The model of a run without learned tokens. Raises `ConfigError` for any other run, `LoadError` for one
    that is not finished."""
    config = read_config(folder)
    if config.estimator != "isotropic":
        raise ConfigError(
            f"{folder} holds a run of --estimator {config.estimator}; the entropy of bytes needs one of isotropic"
        )
    return ByteModel(config, load(folder).model)


def threshold_of(config: RunConfig, model: UNet, split: Split) -> float:
    """The threshold at which the rule asked for, on entropies of `model`, makes boundaries at the rate asked for, on training
    text.

    Raises `ValueError` where there is none.
    """
    entropies = eqx.filter_jit(next_byte_entropy)
    layouts = [_layout_of(batch) for batch in _batches(config, split, RATE_BYTES)]
    measured = np.concatenate([np.asarray(entropies(model, layout)) for layout in layouts])
    numbers = np.concatenate([np.asarray(layout.numbers) for layout in layouts])
    return find_threshold(measured, numbers, config.rate, patch_rule(config.entropy))


def _find_vocabulary(config: RunConfig, split: Split) -> tuple[bytes, ...]:
    vocabulary = train_vocabulary(_texts(config, split), config.bpe.vocabulary)
    layout = _layout(config, split)
    size = find_size(PrefixTree(vocabulary), layout, config.rate)
    return tuple(vocabulary[:size])


def _texts(config: RunConfig, split: Split) -> Iterator[bytes]:
    """Training text in pieces that hold no BOS."""
    for batch in _batches(config, split, VOCABULARY_BYTES):
        for values, mask in zip(batch["bytes"], batch["mask"], strict=True):
            yield from (part for part in values[mask].tobytes().split(bytes([BOS])) if part)


def _layout(config: RunConfig, split: Split) -> Layout:
    """Enough training rows to measure a rate on."""
    batches = [_layout_of(batch) for batch in _batches(config, split, RATE_BYTES)]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)


def _layout_of(batch: Batch) -> Layout:
    return plain_layout(*(jax.numpy.asarray(batch[name]) for name in ("bytes", "segments", "mask")))


def _batches(config: RunConfig, split: Split, num_bytes: int) -> Iterator[Batch]:
    """The first batches that training will see, up to `num_bytes`."""
    batches = open_batches(split, batch=config.batch, seed=config.seed)
    try:
        yield from itertools.islice(batches, max(1, min(num_bytes // config.bytes_per_step, config.total_steps)))
    finally:
        batches.close()
