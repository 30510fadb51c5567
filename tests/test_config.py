"""Settings: refused where they are impossible, and read back from a file with every type checked."""

import json

import pytest

from estimators.fixed import StrideConfig
from estimators.sections import ScoreFunctionSettings
from experiments.config.errors import ConfigError
from experiments.config.files import from_json, from_values, to_json
from experiments.config.presets import PRESETS
from experiments.config.sections import OptimizerConfig

CHANGES = [
    ("batch", "16", "batch: '16' is no whole number"),
    ("batch", 16.5, "batch: 16.5 is no whole number"),
    ("seed", True, "seed: True is no whole number"),
    ("rate", "much", "rate: 'much' is no number"),
    ("rate", 1, "--rate must be a number from 1e-06 to 0.999999; got 1.0"),
    ("resume", 0, "resume: 0 is neither true nor false"),
    ("dataset", 3, "dataset: 3 is no string"),
    ("out", 3, "out: 3 is no string"),
    ("estimator", "magic", "--estimator magic: there are bpe, bpe-distilled, characters"),
    ("estimator", "os:path", "os:path, which is not part of this library: add --plugin os if you trust it"),
    ("chunker", "glue", "--chunker glue: there are attend, deviate, distribute, insert, smooth"),
    ("pool", "lust", "--pool lust: did you mean last? There are"),
    ("inner_rates", [0.5, "x"], "inner_rates[1]: 'x' is no number"),
    ("pool", 3, "pool: 3 is no string"),
    ("settings", [], "settings: it is no JSON object"),
    ("settings.policy", 3, "settings: policy is no JSON object"),
    ("settings.policy.vectors", 2, "--policy: there is no setting vectors"),
    ("settings.hnet", {}, "nothing it names has settings hnet"),
    ("settings.sfe.reductions", ["discount", "os:path"], "os:path, which is not part of this library"),
    ("plugin", ["os"], "there is no setting plugin"),
    ("antique", 2, "there is no setting antique"),
    ("unet.dim", 7, "unet: heads must divide dim"),
    ("unet.width", 7, "unet: there is no setting width"),
    ("settings.policy.window", -1, "--policy: window must be a whole number from 0 to 1024; got -1"),
    ("settings.policy.window", "2", "--policy: window: '2' is no whole number"),
]


@pytest.mark.parametrize(("name", "value", "sentence"), CHANGES)
def test_a_file_with_a_wrong_setting_is_refused_in_one_sentence(name, value, sentence):
    values = json.loads(to_json(PRESETS["tiny"]))
    *sections, last = name.split(".")
    inside = values
    for section in sections:
        inside = inside[section]
    inside[last] = value
    with pytest.raises(ConfigError) as refused:
        from_values(values, "old/config.json")
    text = str(refused.value)
    assert text.startswith("old/config.json ")
    assert sentence in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("text", "sentence"), [("[1]", "no JSON object"), ("{", "Expecting"), ("{}", "unet: it is missing")]
)
def test_a_file_that_is_no_configuration_is_refused(text, sentence):
    with pytest.raises(ConfigError, match=f"^here is not the configuration of a run.*{sentence}"):
        from_json(text, "here")


def test_every_preset_is_read_back_as_it_was_written():
    for preset in PRESETS.values():
        assert from_json(to_json(preset), "here") == preset.resolved


def test_a_setting_that_is_newer_than_the_file_has_its_default():
    values = json.loads(to_json(PRESETS["tiny"]))
    del values["pool"], values["unet"]["ngrams"], values["settings"]["sfe"]["samples"]
    assert from_values(values, "here").resolved == PRESETS["tiny"].resolved


def test_values_that_are_impossible_by_themselves_are_refused_where_they_are_defined():
    with pytest.raises(ValueError, match="sample-centre compares samples"):
        ScoreFunctionSettings(("sample-centre",))
    with pytest.raises(ValueError, match="stride must be a whole number from 1 to 2147483647; got 0"):
        StrideConfig(0)
    with pytest.raises(ConfigError, match=r"--optimizer\.learning-rate must be a number from 1e-30 to 1e\+30; got nan"):
        OptimizerConfig(learning_rate=float("nan"))
