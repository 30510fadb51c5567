"""Published H-Net configurations, and the shapes that they describe."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Literal

from unet.hnet import HNetConfig, read_layout

WeightType = Literal["float32", "bfloat16"]

MULTIPLE = 128
"""The released code rounds the inner widths of MLPs up to a multiple of this."""


class LayoutError(Exception):
    """Why something does not fit the released layout, in one sentence."""


def shape_of(config: Mapping[str, object], *, compute: WeightType = "float32") -> HNetConfig:
    """The shape that a published configuration describes. Raises `LayoutError` if it is invalid, or has parts that no published
    model has."""
    try:
        layout = json.dumps(config["arch_layout"])
        ssm = _settings(config, "ssm_cfg", ("d_conv", "expand", "d_state", "chunk_size"))
        attention = _settings(config, "attn_cfg", ("num_heads", "rotary_emb_dim", "window_size"))
        depth = read_layout(layout).depth + 1
        tied = config.get("tie_embeddings", False)
        if not isinstance(tied, bool):
            raise LayoutError(f"tie_embeddings must be true or false; got {tied!r}")
        if config.get("vocab_size", 256) != 256:
            raise LayoutError(f"vocab_size must be 256, the number of bytes; got {config['vocab_size']}")
        dims = _several(config["d_model"], "d_model", depth)
        return HNetConfig(
            layout=layout,
            dims=dims,
            mlp_dims=_mlp_dims(config["d_intermediate"], dims),
            heads=_several(attention["num_heads"], "num_heads", depth),
            rotary_dims=_several(attention["rotary_emb_dim"], "rotary_emb_dim", depth),
            # A published window does not count the position itself, and is -1 for unlimited attention.
            windows=tuple(window + 1 for window in _several(attention["window_size"], "window_size", depth)),
            state=_one(ssm.get("d_state", 128), "d_state"),
            conv_width=_one(ssm.get("d_conv", 4), "d_conv"),
            expand=_one(ssm.get("expand", 2), "expand"),
            tie_embeddings=tied,
            compute=compute,
        )
    except KeyError as error:
        raise LayoutError(f"this is not the configuration of a published H-Net: {error.args[0]} is missing") from None
    except ValueError as error:
        raise LayoutError(f"this configuration is not a valid H-Net: {error}") from None


def _several(value: object, name: str, stages: int) -> tuple[int, ...]:
    values = value if isinstance(value, Sequence) else [value] * stages
    if any(type(one) is not int for one in values):
        raise LayoutError(f"{name} must be whole numbers, one for each stage; got {value!r}")
    return tuple(values)


def _settings(config: Mapping[str, object], name: str, known: Sequence[str]) -> Mapping[str, object]:
    """The object `name` of a configuration, which may have only the `known` settings."""
    settings = config[name]
    if not isinstance(settings, Mapping):
        raise LayoutError(f"{name} must be an object with settings; got {settings!r}")
    surplus = sorted(settings.keys() - set(known))
    if surplus:
        raise LayoutError(f"{name} has {surplus[0]}, which the released code does not know: it has {', '.join(known)}")
    return settings


def _mlp_dims(value: object, dims: tuple[int, ...]) -> tuple[int, ...]:
    """Inner widths of the MLPs as in the released code: if none is given 8/3 of the stage's width, rounded up."""
    values = list(value) if isinstance(value, Sequence) else [value] * len(dims)
    if len(values) == len(dims):
        values = [8 * dim // 3 if one is None else one for one, dim in zip(values, dims, strict=True)]
    return tuple(map(rounded, _several(values, "d_intermediate", len(dims))))


def rounded(width: int) -> int:
    """The inner width of a released MLP that was configured with `width`."""
    return -(-width // MULTIPLE) * MULTIPLE


def _one(value: object, name: str) -> int:
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not values or any(type(one) is not int or one != values[0] for one in values):
        raise LayoutError(f"{name} must be a whole number, the same at every stage; got {value!r}")
    return values[0]
