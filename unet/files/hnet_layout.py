"""Conversion to and from H-Net's released layout of parameters and configurations.

A configuration is the JSON object of a published configuration file; parameters are arrays by their published names.
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
from estimators.routers import CosineRouter, Greedy
from unet.attention import Attention
from unet.blocks import PreNorm, Stack
from unet.chunkers import Chunker, Projection, Select, Smooth
from unet.experts import Experts
from unet.files.converted import WeightType, converted, require_names, require_shape
from unet.files.errors import LayoutError
from unet.files.published import layer_count, rounded, shape_of
from unet.hierarchy import AbstractStage, Flat, Hierarchy
from unet.hnet import HNetConfig
from unet.layers import MLP, ROTARY_BASE, Affine, Linear, ScaleNorm, SwiGLU
from unet.mamba import Mamba2
from unet.model import UNet
from unet.widened import Widened

FLOAT32_PARAMETERS = (
    ".A_log",
    ".D",
    ".dt_bias",
    "q_proj_layer.weight",
    "k_proj_layer.weight",
    "residual_proj.weight",
    "residual_proj.bias",
)
"""Suffixes of the names of parameters that stay float32 in any dtype: those of recurrences, routers and residual projections."""


EMBEDDING, HEAD = "embeddings.weight", "lm_head.weight"
"""Names of one array if embeddings are tied: a state dict has both, a list of parameters only the first."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of a model, or its shape, with its published `name`. `shape` is the published one, of the transpose if
    `transposed`. If that is larger, each of `blocks` blocks of rows is padded with zeros."""

    name: str
    leaf: Array | jax.ShapeDtypeStruct
    shape: tuple[int, ...]
    transposed: bool = False
    blocks: int = 1


def new_hnet(shape: HNetConfig, *, chunk_sizes: Sequence[float] | None = None) -> UNet:
    """A model of this shape with dynamic chunking at every stage, and initial weights drawn with key 0.

    `chunk_sizes`: target number of positions per chunk (N of H-Net eq. 10; None: as published, 6 for one stage, 3 each for
    more).
    """
    widths = shape.widths[:-1]
    sizes = ([6.0] if len(widths) == 1 else [3.0] * len(widths)) if chunk_sizes is None else list(chunk_sizes)
    if len(sizes) != len(widths):
        raise LayoutError(f"{len(widths)} stages with chunks need as many chunk_sizes; got {sizes}")
    key, key_chunks = jax.random.split(jax.random.key(0))
    estimators = [
        DynamicChunking(dim, chunker=Chunker(Select(), Smooth(Projection(dim, key=one))), target_rate=1 / size)
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
    """The language model of a published configuration and its parameters.

    `model(input_ids)` has `logits`, and in `levels` the boundaries of every stage. `dtype` is that of weights and products
    (`FLOAT32_PARAMETERS` stay float32); `chunk_sizes` as in `new_hnet`. Parameters are read one at a time, so a mapping that
    reads them from a file never holds two. If embeddings are tied, the embedding may be given by its own name, as the head, or
    as both. Raises `LayoutError` for missing and unknown names, for another shape or dtype, and for a tied head that differs
    from the embedding.
    """
    shape = shape_of(config, compute=dtype)
    layers = layer_count(shape)
    if layers > len(params):
        raise LayoutError(f"the configuration has {layers} layers, more than there are parameters ({len(params)})")
    skeleton = eqx.filter_eval_shape(new_hnet, shape, chunk_sizes=chunk_sizes)
    parameters = list(named_parameters(skeleton))
    sources, given = {parameter.name: parameter.name for parameter in parameters}, set(params)
    if shape.tie_embeddings:
        _check_tied(params)
        if EMBEDDING in given:
            given -= {HEAD}
        elif HEAD in given:
            sources[EMBEDDING] = HEAD
    require_names(sources.values(), given)
    weights = {
        id(parameter.leaf): _weight(parameter, params[sources[parameter.name]], dtype) for parameter in parameters
    }
    assert len(weights) == len(parameters)
    return jax.tree.map(lambda leaf: weights.get(id(leaf), leaf), skeleton)


def _check_tied(params: Mapping[str, np.ndarray]) -> None:
    if EMBEDDING in params and HEAD in params and not np.array_equal(params[EMBEDDING], params[HEAD]):
        raise LayoutError(
            f"tie_embeddings is true, but {HEAD} is not equal to {EMBEDDING}: give only one of them, or, if they were trained "
            "separately, set tie_embeddings to false"
        )


def _weight(parameter: Parameter, value: np.ndarray, dtype: WeightType) -> Array:
    require_shape(parameter.name, value.shape, parameter.shape)
    wanted = jnp.dtype(jnp.float32 if parameter.name.endswith(FLOAT32_PARAMETERS) else dtype)
    value = value.T if parameter.transposed else value.reshape(parameter.leaf.shape)
    # Wait, or pending copies would pile up in memory.
    return jax.block_until_ready(jnp.asarray(converted(parameter.name, value, wanted)))


class ReferenceParams(Mapping[str, np.ndarray]):
    """The parameters of a model by their published names and in their published shapes, each converted when it is read."""

    def __init__(self, model: UNet):
        self._named = {one.name: one for one in named_parameters(model)}
        if model.head is None:
            self._named[HEAD] = self._named[EMBEDDING]

    def __getitem__(self, name: str) -> np.ndarray:
        one = self._named[name]
        assert isinstance(one.leaf, jax.Array)
        value = np.asarray(one.leaf)
        return _padded(np.ascontiguousarray(value.T), one) if one.transposed else value.reshape(one.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)


def _padded(value: np.ndarray, parameter: Parameter) -> np.ndarray:
    """A matrix, padded with zeros to its published shape."""
    if value.shape == parameter.shape:
        return value
    parts = value.reshape(parameter.blocks, -1, value.shape[1])
    rows, columns = parameter.shape[0] // parameter.blocks - parts.shape[1], parameter.shape[1] - parts.shape[2]
    return np.pad(parts, ((0, 0), (0, rows), (0, columns))).reshape(parameter.shape)


def to_reference(model: UNet) -> Mapping[str, np.ndarray]:
    """The parameters of a model in the released layout: the inverse of `from_reference`.

    Tied embeddings, and their gradients, appear as two equal arrays, as in the state dict that the released code loads. MLPs
    whose widths that code would round up are padded with zeros, which change nothing. Raises `LayoutError` for a model with
    parts that the released layout does not have.
    """
    return ReferenceParams(model)


def reference_config(model: UNet) -> dict[str, object]:
    """The published configuration of a model. Raises `LayoutError` as `to_reference`."""
    stages = list(_stages(model.stage))
    mixers = [[block.mixer for block in _blocks(stack)] for stage in stages for stack in stage.stacks]
    mambas = [mixer for group in mixers for mixer in group if isinstance(mixer, Mamba2)]
    state = {(m.conv_weight.shape[0] - m.norm.weight.shape[0]) // 2 for m in mambas} or {128}
    conv_width = {m.conv_weight.shape[1] for m in mambas} or {4}
    expand = {m.project_out.weight.shape[0] // m.project_out.weight.shape[1] for m in mambas} or {2}
    if max(len(state), len(conv_width), len(expand)) > 1:
        raise LayoutError("in the released layout all Mamba-2 layers must have the same state, conv_width and expand")
    return {
        "arch_layout": _layout(model.stage),
        "d_model": [stage.dim for stage in stages],
        "d_intermediate": [stage.mlp_dim for stage in stages],
        "vocab_size": model.embedding.shape[0],
        "ssm_cfg": {"chunk_size": 256, "d_conv": conv_width.pop(), "d_state": state.pop(), "expand": expand.pop()},
        "attn_cfg": {
            "num_heads": [stage.heads for stage in stages],
            "rotary_emb_dim": [stage.rotary_dim for stage in stages],
            "window_size": [stage.window for stage in stages],
        },
        "tie_embeddings": model.head is None,
    }


@dataclass(frozen=True)
class _Stage:
    """The stacks of one stage, and its entries in the configuration."""

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
        mlps = [mlp for block in self.blocks if (mlp := _mlp(block)) is not None]
        return max((rounded(mlp.out.weight.shape[0]) for mlp in mlps), default=0)

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
        raise LayoutError("in the released layout every network must end with a norm; one of this model does not")
    return stack.norm.weight.shape[0]


def _blocks(stack: Stack) -> list[PreNorm]:
    if stack.rotary_base != ROTARY_BASE or stack.rotary_scaling is not None:
        raise LayoutError(
            f"rotary embeddings in the released layout have base {ROTARY_BASE:g}, not {stack.rotary_base:g}"
        )
    for block in stack.blocks:
        if not isinstance(block, PreNorm):
            raise LayoutError(f"the released layout has no {type(block).__name__}: its layers are PreNorm")
        if isinstance(block.mlp, MLP) or not isinstance(block.before_mixer, ScaleNorm):
            raise LayoutError("layers in the released layout have RMS norms and gated MLPs; this model has others")
        if isinstance(block.mixer, Attention) and not isinstance(block.mixer.qkv, Linear):
            raise LayoutError("attention in the released layout has no biases")
        if isinstance(block.mixer, Attention) and block.mixer.cap is not None:
            raise LayoutError("attention in the released layout does not cap its logits")
        if isinstance(block.mixer, Attention) and block.mixer.kv_heads != block.mixer.heads:
            raise LayoutError("attention in the released layout has keys and values for every head")
    return [block for block in stack.blocks if isinstance(block, PreNorm)]


def _layout(stage: AbstractStage) -> list[object]:
    if isinstance(stage, Widened):
        return _layout(stage.stage)
    if isinstance(stage, Flat):
        return [_letters(stage.stack)]
    assert isinstance(stage, Hierarchy)
    return [_letters(stage.encoder), _layout(stage.inner), _letters(stage.decoder)]


def _letters(stack: Stack) -> str:
    """The layers in published notation, such as `T1m4`."""
    runs: list[tuple[str, int]] = []
    for block in _blocks(stack):
        letter = "m" if isinstance(block.mixer, Mamba2) else "t"
        letter = letter if block.mlp is None else letter.upper()
        count = runs.pop()[1] if runs and runs[-1][0] == letter else 0
        runs.append((letter, count + 1))
    return "".join(f"{letter}{count}" for letter, count in runs)


def named_parameters(model: UNet) -> Iterator[Parameter]:
    """Every parameter of a model with its published name (the first, for tied ones). Raises `LayoutError` as `to_reference`."""
    if model.norm is not None or model.early_head is not None or model.ngrams is not None:
        raise LayoutError(
            "the released layout has no n-gram embeddings, no early-exit head and no norm before the head"
        )
    yield _named(EMBEDDING, model.embedding)
    yield from _stage_parameters(model.stage, "backbone")
    if model.head is not None:
        yield _matrix(HEAD, model.head)


def _named(name: str, leaf: Array | jax.ShapeDtypeStruct) -> Parameter:
    return Parameter(name, leaf, tuple(leaf.shape))


def _matrix(name: str, layer: Linear | Affine) -> Parameter:
    return Parameter(name, layer.weight, tuple(layer.weight.shape[::-1]), transposed=True)


def _stage_parameters(stage: AbstractStage, prefix: str) -> Iterator[Parameter]:
    if isinstance(stage, Widened):
        yield _named(f"{prefix}.pad_dimension", stage.padding)
        stage = stage.stage
    if isinstance(stage, Flat):
        yield from _stack_parameters(stage.stack, f"{prefix}.main_network")
    elif isinstance(stage, Hierarchy):
        router, up = _routing(stage)
        if not up.smoothing or up.weighting == "confidence" or not stage.chunk_positions:
            raise LayoutError(
                "stages of the released layout smooth their tokens, do not weight them by the confidence itself, and give them "
                "rotary positions by index; this model does not"
            )
        yield from _stack_parameters(stage.encoder, f"{prefix}.encoder")
        yield from _stage_parameters(stage.inner, f"{prefix}.main_network")
        yield from _stack_parameters(stage.decoder, f"{prefix}.decoder")
        yield _named(f"{prefix}.routing_module.q_proj_layer.weight", router.query)
        yield _named(f"{prefix}.routing_module.k_proj_layer.weight", router.key)
        assert up.projection is not None
        yield _named(f"{prefix}.residual_proj.weight", up.projection.weight)
        yield _named(f"{prefix}.residual_proj.bias", up.projection.bias)
    else:
        raise LayoutError(f"the released layout has no {type(stage).__name__}")


def _routing(stage: Hierarchy) -> tuple[CosineRouter, Smooth]:
    """The router and the upsampler of a stage in the released layout."""
    greedy, chunker = stage.estimator.router, stage.estimator.chunker
    router = greedy.router if isinstance(greedy, Greedy) else None
    down, up = (chunker.downsampler, chunker.upsampler) if isinstance(chunker, Chunker) else (None, None)
    fits = isinstance(down, Select) and isinstance(up, Smooth) and up.projection is not None
    if not fits or not isinstance(router, CosineRouter) or not isinstance(up, Smooth):
        raise LayoutError(
            "stages of the released layout draw boundaries by cosine, greedily, and have a chunker of Select and Smooth with a "
            f"projected residual; this model has {type(greedy).__name__}, {type(down).__name__} and {type(up).__name__}"
        )
    return router, up


def _stack_parameters(stack: Stack, prefix: str) -> Iterator[Parameter]:
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
        mlp = _mlp(block)
        if mlp is not None and block.before_mlp is not None:
            yield _named(f"{layer}.norm2.weight", block.before_mlp.weight)
            hidden, dim = mlp.out.weight.shape
            padded = rounded(hidden)
            assert mlp.value_gate.weight.shape == (dim, 2 * hidden)
            yield Parameter(
                f"{layer}.mlp.fc1.weight", mlp.value_gate.weight, (2 * padded, dim), transposed=True, blocks=2
            )
            yield Parameter(f"{layer}.mlp.fc2.weight", mlp.out.weight, (dim, padded), transposed=True)
    if stack.norm is not None:
        yield _named(f"{prefix}.rmsnorm.weight", stack.norm.weight)


def _mlp(block: PreNorm) -> SwiGLU | None:
    if isinstance(block.mlp, Experts):
        raise LayoutError("the released layout has no mixtures of experts")
    assert not isinstance(block.mlp, MLP)
    return block.mlp


def _mamba_parameters(mamba: Mamba2, prefix: str) -> Iterator[Parameter]:
    channels, conv_width = mamba.conv_weight.shape
    yield _named(f"{prefix}.dt_bias", mamba.dt_bias)
    yield _named(f"{prefix}.A_log", mamba.A_log)
    yield _named(f"{prefix}.D", mamba.D)
    yield _matrix(f"{prefix}.in_proj.weight", mamba.project_in)
    yield Parameter(f"{prefix}.conv1d.weight", mamba.conv_weight, (channels, 1, conv_width))
    yield _named(f"{prefix}.conv1d.bias", mamba.conv_bias)
    yield _named(f"{prefix}.norm.weight", mamba.norm.weight)
    yield _matrix(f"{prefix}.out_proj.weight", mamba.project_out)
