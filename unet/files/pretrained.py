"""Loading published models by name or from files, and saving models in their layouts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.numpy

from unet.files import blt_layout, blt_written, decoder_config, decoder_layout, hnet_layout
from unet.files.blt_config import is_blt
from unet.files.blt_tokenizer import TOKENIZER, require_tokenizer
from unet.files.converted import WeightType
from unet.files.errors import LayoutError, LoadError
from unet.files.hnet_layout import named_parameters
from unet.files.hub import Repository
from unet.files.json_files import read_json
from unet.files.layouts import from_reference
from unet.files.pieces import HEAD, PieceParams
from unet.files.saving import write_atomically
from unet.files.torch_files import write_torch_file
from unet.files.weights import INDEX, TORCH, only_weights, open_weights, read_index
from unet.model import UNet
from unet.tokens.model import TokenModel
from unet.tokens.tokenizer import Tokenizer


def _published(
    layout: list[object], dims: list[int], mlp_dims: list[int], rotary_dims: list[int], windows: list[int]
) -> dict[str, object]:
    return {
        "arch_layout": layout,
        "d_model": dims,
        "d_intermediate": mlp_dims,
        "vocab_size": 256,
        "ssm_cfg": {"chunk_size": 256, "d_conv": 4, "d_state": 128, "expand": 2},
        "attn_cfg": {"num_heads": [16] * len(dims), "rotary_emb_dim": rotary_dims, "window_size": windows},
        "tie_embeddings": False,
    }


def _two_stage_xl(layers: int) -> dict[str, object]:
    layout: list[object] = ["m4", ["T1m4", [f"T{layers}"], "m4T1"], "m4"]
    return _published(layout, [1024, 1536, 2048], [0, 4096, 5504], [32, 48, 64], [1023, 1023, -1])


PUBLISHED: Mapping[str, Mapping[str, object]] = {
    "hnet_1stage_L": _published(["m4", ["T22"], "m4"], [1024, 1536], [0, 4096], [32, 48], [1023, -1]),
    "hnet_1stage_XL": _published(["m4", ["T24"], "m4"], [1024, 2048], [0, 5504], [32, 64], [1023, -1]),
    "hnet_2stage_L": _published(
        ["m4", ["T1m4", ["T26"], "m4T1"], "m4"], [1024, 1024, 1536], [0, 2816, 4096], [32, 32, 48], [1023, 1023, -1]
    ),
    "hnet_2stage_XL": _two_stage_xl(27),
    "hnet_2stage_XL_chinese": _two_stage_xl(30),
    "hnet_2stage_XL_code": _two_stage_xl(28),
}
"""The configurations of the published models, by the names of their repositories (and files) under `cartesia-ai`."""

SHARD_BYTES = 5 * 10**9
"""Most bytes of weights in one file that `save_blt` and `save_tokens` write."""


def load_pretrained(
    where: str | Path,
    *,
    config: str | Path | None = None,
    dtype: WeightType = "float32",
    chunk_sizes: Sequence[float] | None = None,
) -> UNet | TokenModel:
    """A published H-Net, Byte Latent Transformer, Llama or GPT-2, as its configuration says: by its name on the hub
    (`cartesia-ai/hnet_1stage_L`, `facebook/blt-1b`, or `owner/name@revision`), or from a `.pt` or `.safetensors` file in the
    published layout, the index of several `.safetensors` files, or a folder with one of these. Llama and GPT-2 are models of
    tokens; their `tokenizer.json` lies beside the weights.

    What compilers and wrappers put before names (`_orig_mod.`, `module.`) is taken off. `config`: the JSON file of its
    configuration; by default one beside the weights (`config.json`, or with the name of the weights), or else the published
    configuration of that name. `dtype` is that of weights and products; `chunk_sizes` is the target number of positions per chunk
    in further training of an H-Net; see `unet.from_reference`. No more than one parameter is in memory beside the model. Raises
    `LoadError` if there is no such model, if it is damaged, if it does not fit its configuration, and if its tokenizer does not
    fit the model.
    """
    weights = _located(where)
    settings = _config(weights, None if config is None else Path(config))
    if isinstance(arguments := settings.get("args"), Mapping) and "dim_global" in arguments:
        raise LoadError(
            f"{weights} is a Byte Latent Transformer in the authors' own layout: name a repository converted for transformers, "
            "whose config.json has the model_type blt"
        )
    try:
        if is_blt(settings) and (tokenizer := weights.with_name(TOKENIZER)).is_file():
            require_tokenizer(tokenizer)
        if decoder_config.is_decoder(settings):
            # First, since it is small and its faults are the likelier ones.
            tokenizer = _tokenizer(weights.with_name(TOKENIZER), decoder_config.described(settings))
            return TokenModel(tokenizer, from_reference(settings, open_weights(weights), dtype=dtype))
        return from_reference(settings, open_weights(weights), dtype=dtype, chunk_sizes=chunk_sizes)
    except LayoutError as error:
        raise LoadError(f"{weights}: {error}") from None


def _tokenizer(path: Path, parts: decoder_config.DecoderDescription) -> Tokenizer:
    """The tokenizer of a model of tokens. Raises `LoadError` where there is none, or one that does not fit the model."""
    if not path.is_file():
        raise LoadError(f"{path} is missing: a model of tokens needs its tokenizer beside its weights")
    try:
        return Tokenizer.read(path.read_bytes(), marks=parts.marks).padded(parts.vocab)
    except (ImportError, ValueError) as error:
        raise LoadError(f"{path} does not fit the model: {error}") from None


def load_hnet(
    where: str | Path,
    *,
    config: str | Path | None = None,
    dtype: WeightType = "float32",
    chunk_sizes: Sequence[float] | None = None,
) -> UNet:
    """A published H-Net: `load_pretrained`, for what is known to be one. Raises `LoadError` for any other model."""
    model = load_pretrained(where, config=config, dtype=dtype, chunk_sizes=chunk_sizes)
    if not isinstance(model, UNet) or blt_layout.is_blt(model):
        kind = "Byte Latent Transformer" if isinstance(model, UNet) else "model of tokens"
        raise LoadError(f"{where} is a {kind}, not an H-Net: load it with unet.load_pretrained")
    return model


def _located(where: str | Path) -> Path:
    """The file of the weights, downloaded where there is no such file or folder."""
    text = str(where)
    weights = Path(where)
    if not weights.exists():
        owner, _, name = text.partition("/")
        if (
            weights.suffix in (".safetensors", ".json", *TORCH)
            or owner in ("", ".", "..", "~")
            or not name
            or "/" in name
        ):
            raise LoadError(f"{where} is not a file, nor the name of a repository of the hub (owner/name)")
        try:
            weights = _fetched(text)
        except LoadError as error:
            raise LoadError(f"there is no file or folder {where} here, and {error}") from None
    return only_weights(weights) if weights.is_dir() else weights


def save_hnet(
    model: UNet, folder: str | Path, *, name: str = "model", kind: Literal["pt", "safetensors"] = "pt"
) -> Path:
    """Write a model in the released layout: `NAME.pt`, which PyTorch loads, or `NAME.safetensors`; and `NAME.json`, its
    configuration. Returns the path of the weights.

    Raises `unet.files.published.LayoutError` for a model with parts that the released layout does not have.
    """
    params, settings = hnet_layout.to_reference(model), hnet_layout.reference_config(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / f"{name}.{kind}"
    if kind == "pt":
        write_torch_file(weights, params)
    else:
        write_atomically(weights, safetensors.numpy.save(dict(params)))
    write_atomically(folder / f"{name}.json", json.dumps(settings, indent=2) + "\n")
    return weights


def save_blt(model: UNet, folder: str | Path, *, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write a Byte Latent Transformer as `transformers` reads it: `config.json`, and `model.safetensors` or, where that would
    have more than `shard_bytes` bytes, shards and their index. Returns the path of the weights, or of the index.

    Raises `LayoutError` for a model with parts that the published layout does not have.
    """
    settings, params = blt_written.reference_config(model), blt_layout.to_reference(model)
    return _write_published(Path(folder), settings, params, tied=model.head is None, shard_bytes=shard_bytes)


def save_tokens(model: TokenModel, folder: str | Path, *, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write a model of tokens with the layers of a Llama or a GPT-2 as `transformers` reads it, with its tokenizer; files and
    `shard_bytes` as in `save_blt`. Returns the path of the weights, or of the index.

    Raises `LayoutError` for a model with parts that neither layout has.
    """
    own, tokenizer = model.inner, model.tokenizer
    marks = model.alphabet.bos, model.alphabet.eos
    settings, params = decoder_layout.reference_config(own, marks), decoder_layout.to_reference(own)
    folder = Path(folder)
    weights = _write_published(folder, settings, params, tied=own.head is None, shard_bytes=shard_bytes)
    write_atomically(folder / TOKENIZER, np.asarray(tokenizer.json).tobytes())
    return weights


def _write_published(
    folder: Path, settings: Mapping[str, object], params: PieceParams, *, tied: bool, shard_bytes: int
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    # Of two names of one array `transformers` saves that of the embedding.
    names = [name for name in params if not (tied and name == HEAD)]
    sizes = {name: params.size(name) for name in names}
    shards: list[list[str]] = [[]]
    for name in names:
        if shards[-1] and sum(sizes[one] for one in shards[-1]) + sizes[name] > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    places: dict[str, str] = {}
    for number, some in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        content = safetensors.numpy.save({name: params[name] for name in some}, metadata={"format": "pt"})
        write_atomically(folder / file, content)
        places |= dict.fromkeys(some, file)
    weights = folder / "model.safetensors"
    if len(shards) > 1:
        weights = folder / f"model{INDEX}"
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        write_atomically(weights, json.dumps(index, indent=2) + "\n")
    write_atomically(folder / "config.json", json.dumps(settings, indent=2) + "\n")
    return weights


def parameter_count(model: UNet) -> int:
    """Number of parameters in the published layout, routers, residual projections and models of patches included."""
    if blt_layout.is_blt(model):
        return sum(piece.size for piece in blt_layout.pieces_of(model))
    return sum(one.leaf.size for one in named_parameters(model))


def _config(weights: Path, path: Path | None) -> Mapping[str, object]:
    name = weights.name.removesuffix(INDEX) if weights.name.endswith(INDEX) else weights.stem
    beside = [weights.with_name(f"{name}.json"), weights.with_name("config.json")]
    path = next((one for one in beside if one.is_file()), None) if path is None else path
    if path is None:
        if name in PUBLISHED:
            return PUBLISHED[name]
        raise LoadError(
            f"{weights} has no configuration beside it ({beside[0].name}, config.json) and is not named like a published model: "
            "put one there, or pass one with config="
        )
    return read_json(path)


def _fetched(repository: str) -> Path:
    """The path of the downloaded weights of a hub repository; its configuration, if there is one, is downloaded beside them."""
    name = repository.partition("@")[0].partition("/")[2]
    on_hub = Repository(repository)
    weights = on_hub.first(
        [f"{name}.safetensors", "model.safetensors", f"{name}{INDEX}", f"model{INDEX}", f"{name}.pt"]
    )
    if weights.name.endswith(INDEX):
        for file in sorted(set(read_index(weights).values())):
            on_hub.first([file])
    for file in (f"{name}.json", "config.json", TOKENIZER):
        on_hub.optional(file)
    return weights
