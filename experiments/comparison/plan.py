"""From a study and flags to runs: the configuration, the folder and the seeds of each, and what is compared with what."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from experiments.comparison.pairs import Names, every_pair
from experiments.comparison.study import Study, Variant
from experiments.config.errors import ConfigError, PluginError, require
from experiments.config.flags import fitting, parse_run, plain_flag, shared_out, with_flag_length
from experiments.config.layers import plain, preset, require_used, sections_of, with_values
from experiments.config.plugins import import_plugins, plugins_in
from experiments.config.presets import PRESETS, joined
from experiments.config.settings import RunConfig
from experiments.training.run_dir import differing

BYTE_MODEL_RUN = "byte-model"

Requested = Mapping[str, RunConfig]
"""By variant, the run that is asked for, without its seed and its folder."""
ALIASES = {"bytes": "steps", "steps": "bytes"}
"""Settings that are two ways to say one thing."""


@dataclass(frozen=True)
class Plan:
    """What a comparison does: the runs `requested` by variant for each of the `seeds`, `jobs` at a time, in `out`."""

    study: Study
    requested: Requested
    seeds: tuple[int, ...]
    reference: str
    pairs: tuple[Names, ...]
    out: Path
    jobs: int = 1
    tables: tuple[Path, ...] = ()
    modules: tuple[str, ...] = ()
    """Modules that files may name, since the command line names them."""


def requested_runs(study: Study, arguments: Sequence[str], modules: Sequence[str] = ()) -> Requested:
    """The run of each variant that is to be trained: its preset, the settings of the study, its own, and the flags on top.

    Each takes the flags that it has, and every flag must be one of some run. `modules`: those that files may name. Raises
    `ConfigError` in a sentence that names file, variant and key for what cannot be run, for variants that are the same run, and
    for flags that would undo what a variant is.
    """
    import_plugins(plugins_in(arguments))
    variants = [variant for variant in study.variants if not variant.runs]
    for variant in variants:
        _require_untouched(study, variant, arguments)
    bases = {variant.name: _base(study, variant, arguments, modules) for variant in variants}
    words = {variant.name: variant.flags for variant in variants}
    given = shared_out(arguments, {name: (base, words[name]) for name, base in bases.items()})
    requested = {}
    for variant in variants:
        with _named(study, variant.name):
            base, flags = with_flag_length(bases[variant.name], arguments), [*given[variant.name], *variant.flags]
            run = parse_run(flags, base, program="python -m experiments.run") if flags else fitting(base)
            require_used(sections_of(variant.values), [run])
        requested[variant.name] = dataclasses.replace(run, plugin=plugins_in(arguments))
    if requested:
        with _named(study, ""):
            require_used(sections_of(study.settings), list(requested.values()))
    for (first, run), (second, other) in itertools.combinations(requested.items(), 2):
        require(
            bool(differing(run, other)),
            f"{study.place(second)}it is the same run as {first}: nothing in their settings differs",
        )
    return requested


def _base(study: Study, variant: Variant, arguments: Sequence[str], modules: Sequence[str]) -> RunConfig:
    """What a variant is before any flag."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--model")
    model = early.parse_known_args(arguments)[0].model
    with _named(study, variant.name):
        if model is not None and model not in PRESETS:
            raise ConfigError(f"--model {model!r} is none of {', '.join(PRESETS)}")
        values = plain(joined(study.settings, variant.values))
        return with_values(preset(values, model), values, modules)


@contextmanager
def _named(study: Study, variant: str) -> Iterator[None]:
    """A block whose `ConfigError`s begin with the study and the variant."""
    try:
        yield
    except ConfigError as error:
        place, cls = study.place(variant), PluginError if isinstance(error, PluginError) else ConfigError
        raise (cls(f"{place}{error}") if place else error) from error.__cause__


def _require_untouched(study: Study, variant: Variant, arguments: Sequence[str]) -> None:
    """Raise `ConfigError` for a flag that sets what the variant sets itself."""
    own = {*_names(variant.values)}
    own |= {plain_flag(flag) for flag in variant.flags if flag.startswith("--")}
    own |= {ALIASES[name] for name in own & ALIASES.keys()}
    for word in arguments:
        if word.startswith("--"):
            section, dot, last = plain_flag(word.partition("=")[0]).rpartition(".")
            if {f"{section}{dot}{last}", f"{section}{dot}{last.removeprefix('no_')}"} & own:
                raise ConfigError(
                    f"{word.partition('=')[0]} is what makes the variant {variant.name} of {study.file or 'the comparison'}: "
                    "leave the flag out"
                )


def _names(values: Mapping[str, object], prefix: str = "") -> list[str]:
    """The names of flags that set what these plain values set."""
    names = []
    for name, value in values.items():
        here = "" if name == "settings" and not prefix else f"{prefix}{name}."
        names += _names(value, here) if isinstance(value, Mapping) else [f"{prefix}{name}"]
    return names


def pairs_of(study: Study, asked: Sequence[str], reference: str | None) -> tuple[Names, ...]:
    """The pairs asked for as FIRST:SECOND; without any, all with the reference, of estimators every two.

    Raises `ConfigError` for one that is not of two variants, or is there twice.
    """
    names = study.names
    if not asked:
        every = every_pair(names, last=reference)
        return tuple(pair for pair in every if study.file is None or reference in pair)
    pairs = []
    for text in asked:
        splits = [(text[:place], text[place + 1 :]) for place, letter in enumerate(text) if letter == ":"]
        first, second = next((both for both in splits if set(names) >= set(both)), ("", ""))
        if first == second:
            raise ConfigError(
                f"{study.place()}--pairs {text!r} is not FIRST:SECOND of two different ones of {', '.join(names)}"
            )
        pairs.append((first, second))
    require(len({frozenset(pair) for pair in pairs}) == len(pairs), "--pairs names each pair once, in one order")
    return tuple(pairs)


def run_folders(study: Study) -> dict[str, str]:
    """What the folders of each variant's runs are called, before the seed; a class without its module where that tells it from
    the others. Raises `ConfigError` where two variants would share them."""
    short = [name.rpartition(":")[2] for name in study.names]
    folders: dict[str, str] = {}
    for name, own in zip(study.names, short, strict=True):
        folder = "".join(
            c if c.isalnum() or c in "-._+" else "-" for c in (own if short.count(own) == 1 else name.replace(":", "."))
        )
        taken = next((other for other, there in folders.items() if there.casefold() == folder.casefold()), None)
        require(taken is None, f"{study.place(name)}its runs would have the folders of {taken}'s: name it otherwise")
        require(
            folder.casefold() != BYTE_MODEL_RUN, f"{study.place(name)}this name is taken by byte models of comparisons"
        )
        folders[name] = folder
    return folders


def runs_of(plan: Plan) -> tuple[list[RunConfig], dict[tuple[str, int], RunConfig]]:
    """The configurations of byte models, where a variant reads the model of another run and names none, and of every run, seed by
    seed, by variant and seed. Raises `ConfigError` where runs side by side, which have one device each, ask for a mesh."""
    first: dict[Path, RunConfig] = {}
    chosen = dict(plan.requested)
    if plan.jobs > 1:
        for name, run in chosen.items():
            require(
                run.mesh.named == 1,
                f"{plan.study.place(name)}its mesh needs {run.mesh.named} devices, and each of --jobs {plan.jobs} has one: take "
                "--jobs 1, or leave out --mesh.data, --mesh.fsdp and --mesh.tensor",
            )
        chosen = {name: dataclasses.replace(run, devices=1) for name, run in chosen.items()}
    for name, run in chosen.items():
        needs = run.first.prerequisite
        if needs is not None and getattr(run.first, needs.setting) is None:
            before = dataclasses.replace(run, estimator=needs.estimator).with_settings(**needs.settings)
            folder = next((path for path, other in first.items() if not differing(other, before, ("seed",))), None)
            folder = folder or plan.out / (BYTE_MODEL_RUN if not first else f"{BYTE_MODEL_RUN}-{len(first) + 1}")
            first[folder] = dataclasses.replace(before, seed=plan.seeds[0], out=folder)
            chosen[name] = run.with_settings(**{run.parts[0].estimator.section: {needs.setting: folder}})
    folders = run_folders(plan.study)
    runs = {
        (name, seed): dataclasses.replace(run, seed=seed, out=plan.out / f"{folders[name]}-{seed}")
        for seed in plan.seeds
        for name, run in chosen.items()
    }
    return list(first.values()), runs
