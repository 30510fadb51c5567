"""What some estimators are prepared with before training: a vocabulary, or a byte model and a threshold on its entropy."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

import equinox as eqx
import jax
import numpy as np

from data import BOS, Batch, Batches, Split, open_batches
from estimators import Layout
from estimators.routers.entropy import find_threshold, next_byte_entropy
from estimators.routers.prefixes import PrefixTree, find_size, train_vocabulary
from experiments.config.errors import ConfigError, require
from experiments.config.files import to_json
from experiments.config.registry import ByteModel, Prepared, Vocabulary, patch_rule
from experiments.config.settings import RunConfig
from experiments.training.run_dir import read_config
from unet import UNet
from unet.files.saving import CONFIG, WEIGHTS, load, save, write_atomically
from unet.likelihood import plain_layout

VOCABULARY = "vocabulary.json"
BYTE_MODEL = "byte_model"

RATE_BYTES = 2**19
"""Training text that rates are measured on, at most."""
RATE_SHARE = 1 / 8
"""Share of the text of a vocabulary, at most, that is kept from it to measure its rate on."""


def prepare(config: RunConfig, split: Split) -> Prepared:
    """What the estimator of `config` takes from the training text. Raises `ConfigError` where that is impossible."""
    try:
        if config.estimator in ("bpe", "bpe-distilled"):
            return Prepared(vocabulary=_learn_vocabulary(config, split))
        if config.estimator == "entropy":
            require_byte_model(config)
            assert config.entropy.model is not None
            byte_model = read_byte_model(config.entropy.model)
            return Prepared(byte_model=byte_model, threshold=threshold_of(config, byte_model.model, split))
    except (ImportError, ValueError) as error:
        raise ConfigError(f"--estimator {config.estimator}: {error}") from error
    return Prepared()


def require_byte_model(config: RunConfig) -> None:
    """Raise `ConfigError` where the entropy of a byte model is asked for and no byte model is named."""
    require(
        config.estimator != "entropy" or config.entropy.model is not None,
        "--estimator entropy needs a byte model: train one with --estimator isotropic --isotropic.no-token-level and name "
        "its folder with --entropy.model",
    )


def write_prepared(folder: Path, prepared: Prepared) -> None:
    """Save it in a run's folder: checkpoints do not hold it."""
    if prepared.vocabulary is not None:
        kept = {
            **vars(prepared.vocabulary),
            "tokens": [token.decode("latin-1") for token in prepared.vocabulary.tokens],
        }
        write_atomically(folder / VOCABULARY, json.dumps(kept) + "\n")
    if prepared.byte_model is not None:
        (folder / BYTE_MODEL).mkdir(exist_ok=True)
        write_atomically(folder / BYTE_MODEL / CONFIG, to_json(prepared.byte_model.config))
        save(prepared.byte_model.model, folder / BYTE_MODEL)


def read_prepared(folder: Path, config: RunConfig) -> Prepared | None:
    """What `write_prepared` saved; None where there is nothing. The threshold comes with the model's weights."""
    if config.estimator in ("bpe", "bpe-distilled"):
        path = folder / VOCABULARY
        return Prepared(vocabulary=_read_vocabulary(path)) if path.is_file() else None
    if config.estimator == "entropy":
        if not (folder / BYTE_MODEL / WEIGHTS).is_file():
            return None
        return Prepared(byte_model=read_byte_model(folder / BYTE_MODEL), threshold=0.0)
    return Prepared()


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
    document_positions = np.concatenate([np.asarray(layout.document_positions) for layout in layouts])
    return find_threshold(measured, document_positions, config.rate, patch_rule(config.entropy))


def notes(config: RunConfig, prepared: Prepared) -> list[str]:
    """What a user has to know of what was prepared: the rate of a vocabulary, which no setting of the run moves any more."""
    vocabulary = prepared.vocabulary
    if vocabulary is None:
        return []
    measured_on = "other" if vocabulary.apart else "the same"
    return [
        f"{len(vocabulary.tokens):,} byte-pair tokens, learned from {vocabulary.learned_from / 1e6:.2f} MB of training text, "
        f"begin at {vocabulary.rate:.4f} of the bytes of {measured_on} training text: no vocabulary of up to "
        f"{config.bpe.vocabulary:,} tokens of that text comes nearer to --rate {config.rate:g} (--bpe.vocabulary, "
        "--bpe.text-bytes)"
    ]


def _learn_vocabulary(config: RunConfig, split: Split) -> Vocabulary:
    """As many tokens as come nearest to the rate asked for.

    Of the text that they may see, one epoch at most, the first rows are kept from them: words that were learned are read in
    fewer tokens than others, so that a rate measured on them would be too low. Text of a single batch serves for both.
    """
    most = _batch_count(config, config.bpe.text_bytes)
    most_aside = min(_batch_count(config, RATE_BYTES), max(1, int(RATE_SHARE * most)))
    with contextlib.closing(open_batches(split, batch=config.batch, seed=config.seed)) as batches:
        aside = [next(batches)]
        while len(aside) < most_aside and batches.epochs < RATE_SHARE:
            aside.append(next(batches))
        apart, read = len(aside) < most and batches.epochs < 1.0, 0

        def texts() -> Iterator[bytes]:
            nonlocal read
            for text in _texts(_rest_of_epoch(batches, most - len(aside)) if apart else aside):
                read += len(text)
                yield text

        tokens = train_vocabulary(texts(), config.bpe.vocabulary)
    layout = jax.tree.map(lambda *leaves: np.concatenate(leaves), *map(_layout_of, aside))
    found = find_size(PrefixTree(tokens), layout, config.rate)
    return Vocabulary(tuple(tokens[: found.size]), found.rate, read, apart)


def _rest_of_epoch(batches: Batches, most: int) -> Iterator[Batch]:
    """The following batches, `most` of them, as long as they show text that has not been seen."""
    for batch in itertools.islice(batches, most):
        yield batch
        if batches.epochs >= 1.0:
            return


def _read_vocabulary(path: Path) -> Vocabulary:
    """Raises `ConfigError` where `path` is anything but what `write_prepared` wrote."""
    try:
        kept = json.loads(path.read_text())
        tokens = tuple(word.encode("latin-1") for word in kept["tokens"])
        return Vocabulary(tokens, float(kept["rate"]), int(kept["learned_from"]), bool(kept["apart"]))
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is not a vocabulary ({error})") from None


def _texts(batches: Iterable[Batch]) -> Iterator[bytes]:
    """Their text in pieces that hold no BOS."""
    for batch in batches:
        for values, mask in zip(batch["bytes"], batch["mask"], strict=True):
            yield from (part for part in values[mask].tobytes().split(bytes([BOS])) if part)


def _layout_of(batch: Batch) -> Layout:
    return plain_layout(*(jax.numpy.asarray(batch[name]) for name in ("bytes", "segments", "mask")))


def _batch_count(config: RunConfig, num_bytes: int) -> int:
    """The batches, at least one, in `num_bytes` of the run's text."""
    return max(1, min(num_bytes // config.bytes_per_step, config.total_steps))


def _batches(config: RunConfig, split: Split, num_bytes: int) -> Generator[Batch, None, None]:
    """The first batches that training will see, up to `num_bytes`."""
    batches = open_batches(split, batch=config.batch, seed=config.seed)
    try:
        yield from itertools.islice(batches, _batch_count(config, num_bytes))
    finally:
        batches.close()
