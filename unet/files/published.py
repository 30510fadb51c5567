"""Published H-Net configurations, and the shapes that they describe."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from unet.files.converted import WeightType
from unet.files.errors import LayoutError
from unet.hnet import HNetConfig, read_layout

MULTIPLE = 128
"""The released code rounds the inner widths of MLPs up to a multiple of this."""
MAX_STAGES = 32
"""Maximum number of stages of a configuration."""

MAX_WIDTH = 1 << 20
"""Maximum of every width, number of heads and factor."""

MAX_WINDOW = (1 << 31) - 2
"""Maximum window."""


def shape_of(config: Mapping[str, object], *, compute: WeightType = "float32") -> HNetConfig:
    """The shape that a published configuration describes. Raises `LayoutError` if it is invalid, or has parts that no published
    model has."""
    try:
        layout = _layout(config["arch_layout"])
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
            windows=tuple(
                window + 1 for window in _several(attention["window_size"], "window_size", depth, MAX_WINDOW)
            ),
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
    except RecursionError:
        raise LayoutError("this configuration is not a valid H-Net: it is nested too deep") from None


def layer_count(shape: HNetConfig) -> int:
    """Number of layers of all networks."""
    count, networks = 0, read_layout(shape.layout)
    while networks is not None:
        count += len(networks.encoder) + len(networks.decoder) + len(networks.main)
        networks = networks.inside
    return count


def _layout(nested: object) -> str:
    """The layout of a configuration as text, which must not have too many stages."""
    inner, stages = nested, 1
    while isinstance(inner, list) and len(inner) == 3:
        inner, stages = inner[1], stages + 1
        if stages > MAX_STAGES:
            raise LayoutError(f"arch_layout has more than {MAX_STAGES} stages")
    return json.dumps(nested)


def _several(value: object, name: str, stages: int, limit: int = MAX_WIDTH) -> tuple[int, ...]:
    values = value if isinstance(value, Sequence) else [value] * stages
    if any(type(one) is not int or not -1 <= one <= limit for one in values):
        raise LayoutError(f"{name} must be whole numbers of at most {limit}, one for each stage; got {value!r}")
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
    if not values or any(type(one) is not int or not 0 <= one <= MAX_WIDTH or one != values[0] for one in values):
        raise LayoutError(
            f"{name} must be a whole number of at most {MAX_WIDTH}, the same at every stage; got {value!r}"
        )
    return values[0]
