"""Published configurations of Byte Latent Transformers, as `transformers` reads them, and what they describe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from jaxtyping import Array, Float

from estimators.bounds import MARGIN
from unet.blt import MARKS, SPECIAL_IDS, BLTConfig
from unet.files.config_values import Settings
from unet.files.converted import WeightType
from unet.files.errors import LayoutError, shown
from unet.ngrams import PRIMES

MODEL_TYPE = "blt"

LOCAL_BASE = 500_000.0
"""Base of rotary embeddings where none is given, but for the patcher."""

WHOLE: Mapping[str, object] = {
    "vocab_size": MARKS,
    "patch_in_forward": True,
    "patch_size": 4,
    "patching_mode": "entropy",
    "patching_threshold": 1.335442066192627,
    "patching_threshold_add": None,
    "monotonicity": False,
    "max_patch_length": None,
    "local_attention_window_len": 512,
    "cross_attn_k": 2,
    "encoder_hash_byte_group_size": [3, 4, 5, 6, 7, 8],
    "encoder_hash_byte_group_vocab": 500_002,
    "encoder_hash_byte_group_nb_functions": 1,
    "pm_size": 0,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
"""What holds where a configuration says nothing: saved ones leave out what is as usual."""

_LOCAL: Mapping[str, object] = {"vocab_size": MARKS, "cross_attn_k": 2, "hidden_size": 1024, "num_attention_heads": 16}
NETWORKS: Mapping[str, Mapping[str, object]] = {
    "encoder_config": {**_LOCAL, "num_hidden_layers": 1, "cross_attn_all_layers": False, "intermediate_size": None},
    "global_config": {
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_hidden_layers": 25,
        "intermediate_size": 5632,
    },
    "decoder_config": {
        **_LOCAL,
        "num_hidden_layers": 9,
        "cross_attn_all_layers": True,
        "intermediate_size": 2816,
        "hidden_size_global": 2048,
    },
    "patcher_config": {
        "vocab_size": MARKS,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "num_hidden_layers": 14,
        "intermediate_size": 2048,
        "sliding_window": 512,
    },
}
"""The same for the four networks."""

_EVERY: Mapping[str, object] = {
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-5,
    "dropout": 0.0,
    "hidden_act": "silu",
    "head_dim": None,
    "rope_parameters": None,
    "rope_scaling": None,
    "rope_theta": None,
    "pm_size": 0,
    "attention_bias": False,
    "mlp_bias": False,
}

_ONLY: Mapping[str, tuple[object, str]] = {
    "hidden_act": ("silu", "gates are SiLU"),
    "dropout": (0, "no published model has dropout"),
    "pm_size": (0, "no published model has it"),
    "attention_bias": (False, "no published model has biases"),
    "mlp_bias": (False, "no published model has biases"),
    "patch_in_forward": (True, "only models that bring the model of their patches are read"),
    "patching_mode": ("entropy", "only models whose own entropies make the patches are read"),
    "vocab_size": (MARKS, "its tokenizer does not fit: ids are those of 256 bytes and four marks"),
}
"""The one value that some settings may have, and why."""


@dataclass(frozen=True)
class Described:
    """What a configuration describes: the `shape` of the model and that of its `patcher`; a patch ends where the entropy passes
    `threshold`, or where it rises by that much (`monotonic`), and at `max_patch_length` bytes; `rate` is the expected number of
    patches per byte; `idle` is the number of cross-attention layers without effect (`AttentionPool.idle`)."""

    shape: BLTConfig
    patcher: BLTConfig
    threshold: float
    monotonic: bool
    max_patch_length: int | None
    rate: float
    idle: int


class NetworkSettings(TypedDict):
    """The settings that `BLTConfig` has for each network."""

    layers: tuple[int, ...]
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    mlp_dims: tuple[int, ...]
    windows: tuple[int, ...]
    rotary_bases: tuple[float, ...]
    epsilons: tuple[float, ...]


def is_blt(config: Mapping[str, object]) -> bool:
    """Whether this is the configuration of a Byte Latent Transformer."""
    return config.get("model_type") == MODEL_TYPE or "patcher_config" in config


def described(config: Mapping[str, object], *, compute: WeightType = "float32") -> Described:
    """What a published configuration describes. Raises `LayoutError` if it is invalid, or has parts that no published model
    has."""
    whole = Settings("", {**WHOLE, **config})
    encoder, main, decoder, patcher = (_network(name, config) for name in NETWORKS)
    for settings in (whole, encoder, main, decoder, patcher):
        settings.require_usual(_ONLY)
    _require_ids(whole)
    _require_equal(whole, encoder, main, decoder)
    try:
        shape = _shape(whole, (encoder, main, decoder), compute)
        own = _networks((patcher,), (patcher.optional("sliding_window"),))
        # Its entropies decide alike whatever the size of a pass: float32.
        patches = BLTConfig(dims=(patcher.whole("hidden_size"),), ngrams=(), attend="none", **own)
    except ValueError as error:
        raise LayoutError(f"this configuration is not a valid Byte Latent Transformer: {error}") from None
    if whole.values["patching_threshold_add"] not in (None, 0, False):
        raise LayoutError("patching_threshold_add is a second threshold, which no published model has: set it to null")
    return Described(
        shape=shape,
        patcher=patches,
        threshold=whole.number("patching_threshold"),
        monotonic=whole.truth("monotonicity"),
        max_patch_length=whole.optional("max_patch_length"),
        rate=min(max(1 / whole.number("patch_size", 1.0), MARGIN), 1 - MARGIN),
        idle=shape.layers[0] - 1 if encoder.truth("cross_attn_all_layers") else 0,
    )


def _network(name: str, config: Mapping[str, object]) -> Settings:
    given = config.get(name)
    if given is not None and not isinstance(given, Mapping):
        raise LayoutError(f"{name} must be an object with settings; got {shown(repr(given))}")
    return Settings(f"{name}.", {**_EVERY, **NETWORKS[name], **(given or {})})


def _require_ids(whole: Settings) -> None:
    for name, wanted in zip(("bos_token_id", "eos_token_id"), SPECIAL_IDS, strict=False):
        if whole.values[name] not in (None, wanted, [wanted]):
            raise LayoutError(
                f"{name} is {shown(repr(whole.values[name]))}, not {wanted}: its tokenizer does not fit published models"
            )


def _require_equal(whole: Settings, encoder: Settings, main: Settings, decoder: Settings) -> None:
    """Raise `LayoutError` where two settings that must be equal are not."""
    pairs = [
        (encoder, "hidden_size", decoder, "hidden_size"),
        (main, "hidden_size", decoder, "hidden_size_global"),
        (whole, "cross_attn_k", encoder, "cross_attn_k"),
        (whole, "cross_attn_k", decoder, "cross_attn_k"),
    ]
    for one, name, other, same in pairs:
        if one.values[name] != other.values[same]:
            raise LayoutError(
                f"{other.where}{same} is {shown(repr(other.values[same]))}, but {one.where}{name} "
                f"{shown(repr(one.values[name]))}: these are one width, or one number of vectors"
            )


def _shape(whole: Settings, networks: Sequence[Settings], compute: WeightType) -> BLTConfig:
    encoder, main, decoder = networks
    encoder.whole("num_hidden_layers")
    window = whole.optional("local_attention_window_len")
    sizes = whole.values["encoder_hash_byte_group_size"]
    if not isinstance(sizes, list | tuple) or any(type(one) is not int for one in sizes) or not sizes:
        raise whole.fail("encoder_hash_byte_group_size", "a list of whole numbers")
    return BLTConfig(
        dims=(encoder.whole("hidden_size"), main.whole("hidden_size")),
        ngrams=tuple(sizes),
        ngram_buckets=whole.whole("encoder_hash_byte_group_vocab"),
        ngram_functions=whole.whole("encoder_hash_byte_group_nb_functions", 1, len(PRIMES)),
        attend="every" if decoder.truth("cross_attn_all_layers") else "first",
        attend_vectors=whole.whole("cross_attn_k", 1, 1024),
        tie_embeddings=whole.truth("tie_word_embeddings"),
        compute=compute,
        **_networks(networks, (window, None, window)),
    )


def _networks(networks: Sequence[Settings], windows: Sequence[int | None]) -> NetworkSettings:
    """The settings of some networks together."""
    heads = [one.whole("num_attention_heads") for one in networks]
    kv_heads = [one.optional("num_key_value_heads") for one in networks]
    dims = [one.whole("hidden_size") for one in networks]
    for one, dim, number in zip(networks, dims, heads, strict=True):
        if one.values["head_dim"] not in (None, dim // number):
            raise LayoutError(
                f"{one.where}head_dim is {shown(repr(one.values['head_dim']))}, not {dim} / {number}: heads share the width"
            )
    mlp_dims = [one.optional("intermediate_size") for one in networks]
    return {
        "layers": tuple(one.whole("num_hidden_layers", 0, 4096) for one in networks),
        "heads": tuple(heads),
        "kv_heads": tuple(own or other for own, other in zip(kv_heads, heads, strict=True)),
        "mlp_dims": tuple(own or 8 * dim // 3 for own, dim in zip(mlp_dims, dims, strict=True)),
        "windows": tuple(one or 0 for one in windows),
        "rotary_bases": tuple(map(_rotary_base, networks)),
        "epsilons": tuple(one.number("rms_norm_eps", 0.0) for one in networks),
    }


def _rotary_base(network: Settings) -> float:
    """The base of rotary embeddings, which older configurations have beside `rope_scaling`."""
    rope = network.values["rope_parameters"] or network.values["rope_scaling"] or {}
    if not isinstance(rope, Mapping):
        raise network.fail("rope_parameters", "an object with settings")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise LayoutError(
            f"{network.where}rope_parameters has the rope_type {shown(repr(kind))}: no published model scales its positions"
        )
    usual = 10_000.0 if network.where.startswith("patcher") else LOCAL_BASE
    base = rope.get("rope_theta", network.values["rope_theta"])
    return Settings(network.where, {"rope_theta": usual if base is None else base}).number("rope_theta", 1.0)


def shortest(number: Float[Array, ""]) -> float:
    """The shortest decimal that is this float32."""
    return float(str(np.float32(number)))
