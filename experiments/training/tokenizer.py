"""The tokenizer of a run whose model reads tokens: learned from its training text, read from a file, or another model's."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from data import Split
from estimators.vocabulary import texts_of
from experiments.config.errors import ConfigError
from experiments.config.plugins import import_plugins, load_model, modules_of
from experiments.config.settings import RunConfig
from experiments.training.text import RunText
from unet.files.saving import LoadError
from unet.tokens.model import TokenModel
from unet.tokens.tokenizer import Tokenizer, train_tokenizer

LEARNED = "bpe"
"""The source of a tokenizer that is learned from the training text."""


def prepare_tokenizer(config: RunConfig, split: Split) -> Tokenizer:
    """The tokenizer that `--tokenizer.source` names. Raises `ConfigError` where there is none that covers bytes."""
    source = config.tokenizer.source
    assert source is not None
    try:
        if source == LEARNED:
            return train_tokenizer(_training_texts(config, split), config.tokenizer.vocabulary)
        if source.endswith(".json") or (Path(source).is_file() and not source.endswith(".safetensors")):
            return Tokenizer.read(_content(source))
        model = load_model(source, (*modules_of(config), *import_plugins(config.plugin))).model
    except LoadError as error:
        raise ConfigError(
            f"--tokenizer.source {source} is neither {LEARNED}, nor a tokenizer.json, nor a model of tokens ({error})"
        ) from None
    except (ImportError, ValueError) as error:
        raise ConfigError(f"--tokenizer.source {source}: {error}") from None
    if not isinstance(model, TokenModel):
        raise ConfigError(f"--tokenizer.source {source} is a model of bytes and has no tokenizer")
    return model.tokenizer


def _content(source: str) -> bytes:
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise ConfigError(f"--tokenizer.source {source} cannot be read: {error.strerror}") from None


def _training_texts(config: RunConfig, split: Split) -> Iterator[bytes]:
    """The first texts that the run sees, one pass over them at most."""
    text = RunText(config, split)
    with text.batches() as batches:
        for layout in itertools.islice(batches, text.count(config.tokenizer.text_bytes)):
            yield from texts_of(layout)
            if batches.epochs >= 1.0:
                return


def tokenizer_notes(config: RunConfig, tokenizer: Tokenizer) -> list[str]:
    """What a user should know of the tokenizer."""
    learned = f"learned from {tokenizer.learned_from / 1e6:.2f} MB of training text"
    whence = learned if tokenizer.learned_from else f"of {config.tokenizer.source}"
    few = ""
    if config.tokenizer.source == LEARNED and tokenizer.size < config.tokenizer.vocabulary:
        few = f"; there are no more words in it for the {config.tokenizer.vocabulary:,} of --tokenizer.vocabulary"
    return [f"the model reads {tokenizer.size:,} byte-pair tokens, {whence}{few}"]


def tokenizer_figures(tokenizer: Tokenizer) -> dict[str, float | int]:
    """What the summary of a run says of it."""
    return {"vocabulary": tokenizer.size, "vocabulary_bytes": tokenizer.learned_from}
