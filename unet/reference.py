"""H-Net's released layout of parameters and configurations, and models in it.

A configuration is the JSON object of a published configuration file, parameters are arrays by their published names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from estimators.dynamic_chunking import DynamicChunking
from estimators.routers import CosineRouter, Likelier
from unet.attention import Attention
from unet.blocks import PreNorm, Stack
from unet.chunkers import Projection, SelectSmooth
from unet.hnet import HNetConfig
from unet.layers import ROTARY_BASE, Linear
from unet.mamba import Mamba2
from unet.model import UNet
from unet.published import LayoutError, WeightType, rounded, shape_of
from unet.stage import AbstractStage, Flat, Hierarchy
from unet.widened import Widened

KEPT_WIDE = (
    ".A_log",
    ".D",
    ".dt_bias",
    "q_proj_layer.weight",
    "k_proj_layer.weight",
    "residual_proj.weight",
    "residual_proj.bias",
)
"""Ends of the names of parameters that stay float32 whatever the others are: those of recurrences, routers and residuals."""


EMBEDDING, HEAD = "embeddings.weight", "lm_head.weight"
"""Names of one array where embeddings are tied: a state dictionary has both, a list of parameters the first alone."""


@dataclass(frozen=True)
class Named:
    """A parameter of a model, or of the shapes of one, by its published `name`; `shape` is the published one, of the transpose
    where it is `turned`. Where that is larger, each of so many `blocks` of rows is filled up with zeros."""

    name: str
    leaf: Array | jax.ShapeDtypeStruct
    shape: tuple[int, ...]
    turned: bool = False
    blocks: int = 1


def new_hnet(shape: HNetConfig, *, chunk_sizes: Sequence[float] | None = None) -> UNet:
    """A model of this shape with dynamic chunking at every stage, aiming at `chunk_sizes` rows a chunk (N of H-Net eq. 10; None:
    as published, 6 for one stage, 3 each for more), and weights as they are drawn with key 0."""
    widths = shape.widths[:-1]
    sizes = ([6.0] if len(widths) == 1 else [3.0] * len(widths)) if chunk_sizes is None else list(chunk_sizes)
    if len(sizes) != len(widths):
        raise LayoutError(f"{len(widths)} stages with chunks need as many chunk sizes; got {sizes}")
    key, key_chunks = jax.random.split(jax.random.key(0))
    estimators = [
        DynamicChunking(dim, chunker=SelectSmooth(Projection(dim, key=one)), target_rate=1 / size)
        for dim, size, one in zip(widths, sizes, jax.random.split(key_chunks, len(sizes)), strict=True)
    ]
    return UNet(shape, estimators, key=key)


def from_reference(
    config: Mapping[str, object],
    params: Mapping[str, np.ndarray],
    *,
    dtype: WeightType = "float32",
    chunk_sizes: Sequence[float] | None = None,
) -> UNet:
    """The language model that a published configuration and its parameters make.

    `model(input_ids)` has `logits`, and in `levels` the boundaries of every stage. `dtype` is that of its weights and products
    (`KEPT_WIDE` stay float32); `chunk_sizes` as `new_hnet`. Parameters are asked for one after another, so that a mapping that
    reads them from a file never holds two. Where embeddings are tied, the embedding may come as such, as the head, or as both.
    Raises `LayoutError` where a name is missing or left over, where a shape or a dtype is another, and where a tied head is
    not the embedding.
    """
    shape = shape_of(config, compute=dtype)
    skeleton = eqx.filter_eval_shape(new_hnet, shape, chunk_sizes=chunk_sizes)
    places = list(named_parameters(skeleton))
    sources, given = {place.name: place.name for place in places}, set(params)
    if shape.tie_embeddings:
        _check_tied(params)
        if EMBEDDING in given:
            given -= {HEAD}
        elif HEAD in given:
            sources[EMBEDDING] = HEAD
    names = set(sources.values())
    if names != given:
        missing, surplus = sorted(names - given), sorted(given - names)
        raise LayoutError(
            f"parameters do not fit the configuration: {len(missing)} missing{_first(missing)}, {len(surplus)} that it has no "
            f"place for{_first(surplus)}"
        )
    filled = {id(place.leaf): _weight(place, params[sources[place.name]], dtype) for place in places}
    assert len(filled) == len(places)
    return jax.tree.map(lambda leaf: filled.get(id(leaf), leaf), skeleton)


def _check_tied(params: Mapping[str, np.ndarray]) -> None:
    if EMBEDDING in params and HEAD in params and not np.array_equal(params[EMBEDDING], params[HEAD]):
        raise LayoutError(
            f"tie_embeddings is true, but {HEAD} is not equal to {EMBEDDING}: give one of them alone, or, if they were trained "
            "apart, set tie_embeddings to false"
        )


def _first(names: Sequence[str]) -> str:
    return f" (such as {names[0]})" if names else ""


def _weight(place: Named, value: np.ndarray, dtype: WeightType) -> Array:
    if value.shape != place.shape:
        raise LayoutError(f"{place.name} has shape {list(value.shape)}; the configuration asks for {list(place.shape)}")
    if value.dtype not in (np.float32, np.float16, jnp.bfloat16):
        raise LayoutError(f"{place.name} is {value.dtype}; weights are float32, float16 or bfloat16")
    wanted = jnp.float32 if place.name.endswith(KEPT_WIDE) else jnp.dtype(dtype)
    value = value.T if place.turned else value.reshape(place.leaf.shape)
    # Waited for: what is still being copied would pile up.
    return jax.block_until_ready(jnp.asarray(value.astype(wanted, order="C")))


class ReferenceParams(Mapping[str, np.ndarray]):
    """The parameters of a model by their published names and in their published shapes, each made when it is asked for."""

    def __init__(self, model: UNet):
        self._named = {one.name: one for one in named_parameters(model)}
        if model.head is None:
            self._named[HEAD] = self._named[EMBEDDING]

    def __getitem__(self, name: str) -> np.ndarray:
        one = self._named[name]
        assert isinstance(one.leaf, jax.Array)
        value = np.asarray(one.leaf)
        return _filled(np.ascontiguousarray(value.T), one) if one.turned else value.reshape(one.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)


def _filled(value: np.ndarray, place: Named) -> np.ndarray:
    """A matrix in its published shape."""
    if value.shape == place.shape:
        return value
    parts = value.reshape(place.blocks, -1, value.shape[1])
    rows, columns = place.shape[0] // place.blocks - parts.shape[1], place.shape[1] - parts.shape[2]
    return np.pad(parts, ((0, 0), (0, rows), (0, columns))).reshape(place.shape)


def to_reference(model: UNet) -> Mapping[str, np.ndarray]:
    """The parameters of a model in the released layout: `from_reference` undone.

    Of tied embeddings, as of their gradient, there are two equal arrays, as in the state dictionary that the released program
    loads. MLPs whose widths it would round up are filled up with zeros, which change nothing. Raises `LayoutError` for a model
    that has parts of which the released layout knows nothing.
    """
    return ReferenceParams(model)


def reference_config(model: UNet) -> dict[str, object]:
    """The published configuration of a model. Raises `LayoutError` as `to_reference`."""
    stages = list(_stages(model.stage))
    mixers = [[block.mixer for block in _blocks(stack)] for stage in stages for stack in stage.stacks]
    mambas = [mixer for group in mixers for mixer in group if isinstance(mixer, Mamba2)]
    state = {(m.conv_weight.shape[0] - m.norm.weight.shape[0]) // 2 for m in mambas} or {128}
    taps = {m.conv_weight.shape[1] for m in mambas} or {4}
    expand = {m.project_out.weight.shape[0] // m.project_out.weight.shape[1] for m in mambas} or {2}
    if max(len(state), len(taps), len(expand)) > 1:
        raise LayoutError("the Mamba-2 layers of a published model are alike in state, taps and expansion")
    return {
        "arch_layout": _layout(model.stage),
        "d_model": [stage.dim for stage in stages],
        "d_intermediate": [stage.mlp_dim for stage in stages],
        "vocab_size": model.embedding.shape[0],
        "ssm_cfg": {"chunk_size": 256, "d_conv": taps.pop(), "d_state": state.pop(), "expand": expand.pop()},
        "attn_cfg": {
            "num_heads": [stage.heads for stage in stages],
            "rotary_emb_dim": [stage.rotary_dim for stage in stages],
            "window_size": [stage.window for stage in stages],
        },
        "tie_embeddings": model.head is None,
    }


@dataclass(frozen=True)
class _Stage:
    """The stacks of one stage, and what its configuration says."""

    stacks: tuple[Stack, ...]
    dim: int

    @property
    def blocks(self) -> list[PreNorm]:
        return [block for stack in self.stacks for block in _blocks(stack)]

    @property
    def attention(self) -> list[Attention]:
        return [block.mixer for block in self.blocks if isinstance(block.mixer, Attention)]

    @property
    def mlp_dim(self) -> int:
        return max(
            (rounded(block.mlp.out.weight.shape[0]) for block in self.blocks if block.mlp is not None), default=0
        )

    @property
    def heads(self) -> int:
        return self.attention[0].heads if self.attention else 1

    @property
    def rotary_dim(self) -> int:
        return (self.attention[0].rotary_dim or 0) if self.attention else 0

    @property
    def window(self) -> int:
        return -1 if self.stacks[0].window is None else self.stacks[0].window - 1


def _stages(stage: AbstractStage) -> Iterator[_Stage]:
    if isinstance(stage, Widened):
        yield from _stages(stage.stage)
    elif isinstance(stage, Flat):
        yield _Stage((stage.stack,), _width(stage.stack))
    elif isinstance(stage, Hierarchy):
        yield _Stage((stage.encoder, stage.decoder), _width(stage.encoder))
        yield from _stages(stage.inner)
    else:
        raise LayoutError(f"the released layout has no {type(stage).__name__}")


def _width(stack: Stack) -> int:
    if stack.norm is None:
        raise LayoutError("in the released layout every network ends with a norm; one of this model does not")
    return stack.norm.weight.shape[0]


def _blocks(stack: Stack) -> list[PreNorm]:
    if stack.rotary_base != ROTARY_BASE:
        raise LayoutError(
            f"rotary embeddings of the released layout have base {ROTARY_BASE:g}, not {stack.rotary_base:g}"
        )
    for block in stack.blocks:
        if not isinstance(block, PreNorm):
            raise LayoutError(f"the released layout has no {type(block).__name__}: its layers are PreNorm")
        if isinstance(block.mixer, Attention) and block.mixer.cap is not None:
            raise LayoutError("attention in the released layout does not cap its logits")
    return [block for block in stack.blocks if isinstance(block, PreNorm)]


def _layout(stage: AbstractStage) -> list[object]:
    if isinstance(stage, Widened):
        return _layout(stage.stage)
    if isinstance(stage, Flat):
        return [_letters(stage.stack)]
    assert isinstance(stage, Hierarchy)
    return [_letters(stage.encoder), _layout(stage.inner), _letters(stage.decoder)]


def _letters(stack: Stack) -> str:
    """Such as `T1m4`."""
    runs: list[tuple[str, int]] = []
    for block in _blocks(stack):
        letter = "m" if isinstance(block.mixer, Mamba2) else "t"
        letter = letter if block.mlp is None else letter.upper()
        count = runs.pop()[1] if runs and runs[-1][0] == letter else 0
        runs.append((letter, count + 1))
    return "".join(f"{letter}{count}" for letter, count in runs)


def named_parameters(model: UNet) -> Iterator[Named]:
    """Every parameter of a model with its published name, one that is used twice with its first. Raises `LayoutError` as
    `to_reference`."""
    if model.norm is not None or model.early_head is not None or model.ngrams is not None:
        raise LayoutError("the released layout has one embedding, one head, and no norm but those that end networks")
    yield _named(EMBEDDING, model.embedding)
    yield from _stage_parameters(model.stage, "backbone")
    if model.head is not None:
        yield _matrix(HEAD, model.head)


def _named(name: str, leaf: Array | jax.ShapeDtypeStruct) -> Named:
    return Named(name, leaf, tuple(leaf.shape))


def _matrix(name: str, layer: Linear) -> Named:
    return Named(name, layer.weight, tuple(layer.weight.shape[::-1]), turned=True)


def _stage_parameters(stage: AbstractStage, prefix: str) -> Iterator[Named]:
    if isinstance(stage, Widened):
        yield _named(f"{prefix}.pad_dimension", stage.padding)
        stage = stage.stage
    if isinstance(stage, Flat):
        yield from _stack_parameters(stage.stack, f"{prefix}.main_network")
    elif isinstance(stage, Hierarchy):
        likelier, chunker = stage.estimator.router, stage.estimator.chunker
        router = likelier.router if isinstance(likelier, Likelier) else None
        if not isinstance(router, CosineRouter) or not isinstance(chunker, SelectSmooth) or chunker.projection is None:
            raise LayoutError(
                "stages of the released layout draw boundaries by cosine, where they are likelier than not, and bring tokens "
                f"back smoothed, onto a projected residual; this model has {type(likelier).__name__} and "
                f"{type(chunker).__name__}"
            )
        if not chunker.smoothing or chunker.weighting == "confidence" or not stage.chunk_positions:
            raise LayoutError(
                "stages of the released layout smooth their tokens, weight them by no confidence, and number them for rotary "
                "embeddings; this model does not"
            )
        yield from _stack_parameters(stage.encoder, f"{prefix}.encoder")
        yield from _stage_parameters(stage.inner, f"{prefix}.main_network")
        yield from _stack_parameters(stage.decoder, f"{prefix}.decoder")
        yield _named(f"{prefix}.routing_module.q_proj_layer.weight", router.query)
        yield _named(f"{prefix}.routing_module.k_proj_layer.weight", router.key)
        yield _named(f"{prefix}.residual_proj.weight", chunker.projection.weight)
        yield _named(f"{prefix}.residual_proj.bias", chunker.projection.bias)
    else:
        raise LayoutError(f"the released layout has no {type(stage).__name__}")


def _stack_parameters(stack: Stack, prefix: str) -> Iterator[Named]:
    _width(stack)
    for number, block in enumerate(_blocks(stack)):
        layer = f"{prefix}.layers.{number}"
        yield _named(f"{layer}.norm1.weight", block.before_mixer.weight)
        if isinstance(block.mixer, Mamba2):
            yield from _mamba_parameters(block.mixer, f"{layer}.mixer")
        elif isinstance(block.mixer, Attention):
            yield _matrix(f"{layer}.mixer.Wqkv.weight", block.mixer.qkv)
            yield _matrix(f"{layer}.mixer.out_proj.weight", block.mixer.out)
        else:
            raise LayoutError(f"the released layout has no {type(block.mixer).__name__}")
        if block.mlp is not None and block.before_mlp is not None:
            yield _named(f"{layer}.norm2.weight", block.before_mlp.weight)
            (dim, both), wide = block.mlp.value_gate.weight.shape, rounded(block.mlp.out.weight.shape[0])
            assert both == 2 * block.mlp.out.weight.shape[0]
            yield Named(f"{layer}.mlp.fc1.weight", block.mlp.value_gate.weight, (2 * wide, dim), turned=True, blocks=2)
            yield Named(f"{layer}.mlp.fc2.weight", block.mlp.out.weight, (dim, wide), turned=True)
    if stack.norm is not None:
        yield _named(f"{prefix}.rmsnorm.weight", stack.norm.weight)


def _mamba_parameters(mamba: Mamba2, prefix: str) -> Iterator[Named]:
    channels, taps = mamba.conv_weight.shape
    yield _named(f"{prefix}.dt_bias", mamba.step_bias)
    yield _named(f"{prefix}.A_log", mamba.log_rate)
    yield _named(f"{prefix}.D", mamba.skip)
    yield _matrix(f"{prefix}.in_proj.weight", mamba.project_in)
    yield Named(f"{prefix}.conv1d.weight", mamba.conv_weight, (channels, 1, taps))
    yield _named(f"{prefix}.conv1d.bias", mamba.conv_bias)
    yield _named(f"{prefix}.norm.weight", mamba.norm.weight)
    yield _matrix(f"{prefix}.out_proj.weight", mamba.project_out)
