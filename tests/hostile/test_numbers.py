"""Every number that a user can give: refused in one sentence that names it, or good for a model, before anything is read."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated

import jax
import pytest

from estimators.bounds import LARGEST, Within, shown
from estimators.registry import ESTIMATORS
from estimators.sections import REDUCTIONS
from experiments import bench, run
from experiments.benchmark.shapes import shapes_of
from experiments.compare import CompareConfig
from experiments.config.build import require_fit
from experiments.config.errors import ConfigError
from experiments.config.settings import RunConfig
from experiments.generate import GenerateConfig
from experiments.lab import LabConfig
from experiments.training.capacity import rated_capacities
from experiments.training.optimizer import make_optimizer
from experiments.words import WordsConfig
from tests.compositions import config_of
from unet import HNetConfig
from unet.chunkers.named import CHUNKERS, POOLS
from unet.hnet import read_layout

WHOLE = (-1, 0, 2**31, 2**32, 2**64, 10**26, 10**400, True)
OTHERS = (math.nan, math.inf, -math.inf, -1.0, 0.0, 1e26, 1e308, 1e-320)

SMALL_HNET = HNetConfig(
    layout='["m1", ["T1", ["T1"], "T1"], "m1"]',
    dims=(64, 64, 64),
    mlp_dims=(0, 64, 64),
    heads=(4, 4, 4),
    rotary_dims=(8, 8, 8),
    windows=(8, 8, 0),
    state=16,
)


def number_in(kind: object) -> type | None:
    """The type of the number in a type: that of an optional or annotated one, or of a tuple's elements; None without."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return number_in(inside[0])
    if origin in (typing.Union, types.UnionType, tuple):
        return next((one for one in map(number_in, inside) if one is not None), None)
    return kind if kind in (int, float) else None  # type: ignore[bad-return]  # one of the two


def numeric_fields(cls: type) -> dict[str, object]:
    """The fields of a dataclass that hold numbers, with their types."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {one.name: hints[one.name] for one in dataclasses.fields(cls) if number_in(hints[one.name]) is not None}


def nasty_for(kind: object, value: object) -> Iterator[object]:
    """Nasty values in place of `value`, and the bounds themselves and what lies just beyond."""
    bounds = next((one for one in _metadata(kind) if isinstance(one, Within)), None)
    edges = () if bounds is None else (bounds.low, bounds.high, 2 * bounds.high)
    # Thousands of layers take long to build, even without arrays.
    for one in (*(WHOLE if number_in(kind) is int else OTHERS), *(edge for edge in edges if edge != 4096)):
        yield (one, *value[1:]) if isinstance(value, tuple) else (one,) if _is_tuple(kind) else one


def _metadata(kind: object) -> Iterator[object]:
    if typing.get_origin(kind) is Annotated:
        yield from typing.get_args(kind)[1:]
    for inside in typing.get_args(kind):
        yield from _metadata(inside)


def _is_tuple(kind: object) -> bool:
    return typing.get_origin(kind) is tuple or any(map(_is_tuple, typing.get_args(kind)))


def refused_or(made: Callable[[], object], field: str) -> object:
    """What `made` returns; None where it raises a `ConfigError` of one short line with a flag and the field's name."""
    try:
        return made()
    except ConfigError as error:
        text = str(error)
        assert len(text) <= 400, text
        assert text.isprintable(), text
        assert "--" in text, text
        named = field.split(".")[-1]
        assert named in text.replace("-", "_"), (field, text)
        return None


def fits(config: RunConfig) -> RunConfig:
    """The run, if everything that depends on its numbers can be made."""
    require_fit(config)
    make_optimizer(config)
    return config


def walked(
    settings: object, where: str, changed: Callable[[str, object], RunConfig], seen: list[RunConfig] | None = None
) -> None:
    """Every number of a dataclass, changed to every nasty value."""
    for name, kind in numeric_fields(type(settings)).items():
        for value in nasty_for(kind, getattr(settings, name)):
            made = refused_or(lambda name=name, value=value: fits(changed(name, value)), f"{where}{name}")
            if isinstance(made, RunConfig) and seen is not None:
                seen.append(made)


def replaced(settings, **changes):
    """`dataclasses.replace` for fields that are known by name only."""
    return dataclasses.replace(settings, **changes)


def small(**changes: object) -> RunConfig:
    """A run whose own numbers leave room."""
    return replaced(config_of("stride"), batch=4, length=64, **changes)


def test_every_number_of_a_run_and_of_its_parts():
    seen: list[RunConfig] = []
    base = small(bytes=2**30)
    walked(base, "", lambda name, value: replaced(base, **{name: value}), seen)
    for part in ("target", "optimizer", "data", "evaluation", "checkpoint"):
        own = getattr(base, part)

        def changed(name, value, part=part, own=own):
            return replaced(base, **{part: replaced(own, **{name: value})})

        walked(own, f"{part}.", changed, seen)
    for config in seen:
        # As the command does with the router's rate.
        capacities = rated_capacities(config, shapes_of(config).stage.estimators[0].router) if config.levels else ()
        assert all(1 <= one <= config.length for one in capacities)


@pytest.mark.parametrize("shape", ["unet", "hnet"])
def test_every_number_of_a_models_shape(shape):
    base = small() if shape == "unet" else small(unet=SMALL_HNET, inner_rates=(0.3,))
    seen: list[RunConfig] = []

    def changed(name, value):
        try:
            return replaced(base, unet=replaced(base.unet, **{name: value}))
        except ValueError as error:
            raise ConfigError(f"--unet: {error}") from None

    walked(base.unet, "unet.", changed, seen)
    assert len(seen) > 5
    for config in seen:
        shapes_of(config)


def _compositions() -> Iterator[RunConfig]:
    for name in ESTIMATORS.house:
        yield config_of(name)
    for name in REDUCTIONS.house:
        estimator = "sfe-offpolicy" if name == "importance-weight" else "sfe"
        names = [] if name == "importance-weight" else [name]
        samples = 2 if name == "sample-centre" else 1
        yield dataclasses.replace(config_of(estimator), batch=4).with_settings(
            sfe={"reductions": names, "samples": samples}
        )
    for name in CHUNKERS.house:
        if name != "attend":
            yield dataclasses.replace(config_of("stride"), chunker=name)
    for name in POOLS.house:
        yield dataclasses.replace(config_of("stride"), pool=name)


def test_every_number_of_every_part():
    done: set[str] = set()
    for config in _compositions():
        for section, settings in config.sections.items():
            if section in done:
                continue
            done.add(section)

            def changed(name, value, config=config, section=section):
                return config.with_settings(**{section: {name: value}})

            walked(settings, f"{section}.", changed)
    expected = {"policy", "sfe", "mlp", "hnet", "gumbel", "stride", "characters", "entropy", "bpe", "distilled"}
    assert done >= expected | {
        "offpolicy",
        "early_exit",
        "discount",
        "critic",
        "generalised_advantage",
        "attention_pool",
    }


def _measurement(cls: type) -> Callable[..., object]:
    needed = {"target": "h100"} if cls is bench.Compile else {}
    return lambda **changes: cls(**needed, **changes)


COMMANDS: Mapping[type, Callable[..., object]] = {
    GenerateConfig: lambda **changes: GenerateConfig("run", **changes),
    CompareConfig: CompareConfig,
    LabConfig: lambda **changes: LabConfig(Path("lab"), **changes),
    WordsConfig: lambda **changes: WordsConfig((Path("run"),), **changes),
    **{cls: _measurement(cls) for cls in typing.get_args(bench.Command)},
}


@pytest.mark.parametrize("cls", COMMANDS, ids=lambda cls: cls.__name__)
def test_every_number_of_every_command(cls):
    default = COMMANDS[cls]()
    for name, kind in numeric_fields(cls).items():
        assert any(isinstance(one, Within) for one in _metadata(kind)), name
        for value in nasty_for(kind, getattr(default, name)):
            refused_or(lambda name=name, value=value: COMMANDS[cls](**{name: value}), name)
        for value in (10**26, -(10**26)) if number_in(kind) is int else (math.nan, math.inf, -math.inf):
            with pytest.raises(ConfigError):
                COMMANDS[cls](**{name: (value,) if _is_tuple(kind) else value})


def test_every_number_of_a_run_has_bounds():
    parts = [type(getattr(small(), one)) for one in ("target", "optimizer", "data", "evaluation", "checkpoint", "unet")]
    for cls in (RunConfig, HNetConfig, *parts):
        for name, kind in numeric_fields(cls).items():
            assert any(isinstance(one, Within) for one in _metadata(kind)), f"{cls.__name__}.{name}"


REFUSED = [
    ("--seed", "-1"),
    ("--seed", "18446744073709551616"),
    ("--capacity-slack", "inf"),
    ("--buckets", "1" + "0" * 26),
    ("--bpe.vocabulary", "1000000000000000", "--estimator", "bpe"),
]


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
def test_a_run_with_such_a_number_is_refused_before_anything_is_touched(tmp_path, capsys, arguments):
    kept = tmp_path / "old" / "model.safetensors"
    kept.parent.mkdir()
    kept.write_bytes(b"trained for days")
    given = ["--dataset", str(tmp_path / "nowhere"), "--out", str(kept.parent), "--overwrite", *arguments]
    assert run.main(given) == 2
    error = capsys.readouterr().err
    assert arguments[0].partition(".")[0] in error
    assert len(error.splitlines()) == 1
    assert kept.read_bytes() == b"trained for days"


def test_the_greatest_seed_trains(tmp_path):
    assert dataclasses.replace(small(), seed=2**32 - 1).seed == 2**32 - 1
    assert jax.random.key(2**32 - 1).dtype == jax.random.key(0).dtype


@pytest.mark.parametrize("layout", ["[" * 200_000, "[" * 60 + '"m1"' + "]" * 60, '["m999999999"]', "x" * 10_000])
def test_a_layout_beyond_all_bounds_is_refused_in_a_short_sentence(layout):
    with pytest.raises(ValueError, match="layout") as refused:
        read_layout(layout)
    assert len(str(refused.value)) < 300


def test_a_value_is_shown_in_a_few_characters():
    assert shown(10**400) == "2^1328 or more"
    assert shown(-(10**30)) == "-2^99 or more"
    assert shown("\x1b[31m" * 99).isprintable()
    assert max(map(len, map(shown, (10**5000, "x" * 999, LARGEST)))) <= 40
