"""The laboratory against itself: unbiased estimators come out unbiased, sampling agrees with enumeration."""

import dataclasses
import itertools
import json
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from estimators import Discount, EarlyExit, Estimator, NoObjective
from estimators import equations as eq
from experiments import lab
from experiments.comparison.intervals import Interval
from experiments.config.presets import PRESETS
from experiments.config.settings import transformer_shape
from experiments.laboratory import greedy
from experiments.laboratory.fields import drawn_loss, exact, expected_score, sampled_score, string_index, string_losses
from experiments.laboratory.gradients import given_critic
from experiments.laboratory.greedy import fixed_gradient, jumps
from experiments.laboratory.moments import (
    disarm_moments,
    exact_gradient,
    relaxed_moments,
    returns_by_string,
    sample_moments,
    score_moments,
    string_probs,
)
from experiments.laboratory.results import Flow, Noise, summarise_flows, summarise_noise
from experiments.laboratory.scale import noise
from experiments.laboratory.subjects import SHAPE, Subject, Tables, TabularRouter
from tests.conftest import needs
from tests.test_run import corpus as corpus
from unet import Chunker, Distribute, Select, UNet

TEXTS, DECISIONS = 3, 4
STRINGS = jnp.asarray([[True, *rest] for rest in itertools.product([False, True], repeat=DECISIONS)])
CLOSE = {"rtol": 2e-4, "atol": 2e-6}


@pytest.fixture(scope="module")
def logits():
    return jax.random.normal(jax.random.key(0), (TEXTS, DECISIONS))


@pytest.fixture(scope="module")
def tables():
    """Likelihoods that depend on the past actions only, as a causal model's do."""
    keys = jax.random.split(jax.random.key(1), 4)
    count = len(STRINGS)
    noise = jax.random.normal(keys[0], (TEXTS, DECISIONS, count))
    number = jnp.cumsum(jnp.where(STRINGS, 2 ** jnp.arange(DECISIONS + 1), 0), axis=1)
    log_prob = jnp.stack([noise[:, i][:, number[:, i] % count] for i in range(DECISIONS)], axis=-1)
    return Tables(
        log_prob,
        jax.random.normal(keys[1], (TEXTS, DECISIONS)),
        jax.random.normal(keys[2], (TEXTS, DECISIONS, 3)),
        jax.random.normal(keys[3], (TEXTS, count, DECISIONS)),
        jnp.zeros((TEXTS, count, DECISIONS)),
    )


def returns_of(logits, tables, *reductions):
    return returns_by_string(reductions, logits, STRINGS, tables)


def valued(logits, tables, *reductions):
    """Returns relative to a critic that expects what the states of width 1 say."""
    values = jax.random.normal(jax.random.key(5), (TEXTS, DECISIONS, 1))
    return returns_by_string((*reductions, given_critic()), logits, STRINGS, tables, hidden=values)


def test_unbiased_estimators_have_the_exact_gradient(logits, tables):
    exact = exact_gradient(logits, tables, STRINGS)
    returns = returns_of(logits, tables, EarlyExit())
    for moments in (
        score_moments(logits, STRINGS, returns_of(logits, tables)),
        score_moments(logits, STRINGS, returns),
        score_moments(logits, STRINGS, valued(logits, tables, EarlyExit())),
        score_moments(logits, STRINGS, returns, centring="leave-one-out"),
        sample_moments(logits, STRINGS, returns, 3),
        disarm_moments(logits, STRINGS, tables),
    ):
        np.testing.assert_allclose(moments.mean, exact, **CLOSE)
    batch = score_moments(logits, STRINGS, returns, centring="batch")
    np.testing.assert_allclose(batch.mean, exact * (TEXTS - 1) / TEXTS, **CLOSE)


def test_probabilities_of_strings_sum_to_one(logits):
    np.testing.assert_allclose(jnp.sum(string_probs(logits, STRINGS), axis=1), 1.0, rtol=1e-5)


def drawn(logits, key, count):
    """Strings drawn by sampling, as indices."""
    actions = jax.random.uniform(key, (count, *logits.shape)) < jax.nn.sigmoid(logits)
    return actions.astype(jnp.float32), string_index(actions)


def variance_of(samples):
    return float(jnp.sum(jnp.var(samples, axis=0)))


@pytest.mark.parametrize("centring", ["none", "leave-one-out", "batch"])
def test_exact_variances_are_those_of_samples(logits, tables, centring):
    returns = returns_of(logits, tables, Discount(0.9))
    actions, index = drawn(logits, jax.random.key(2), 40_000)
    chosen = jnp.take_along_axis(returns[None], index[..., None, None], axis=2)[:, :, 0]
    if centring != "none":
        chosen = jax.vmap(lambda r: eq.batch_centred(r, None, centring == "leave-one-out"))(chosen)
    samples = -(actions - jax.nn.sigmoid(logits)) * chosen / DECISIONS
    exact = score_moments(logits, STRINGS, returns, centring=centring)
    assert variance_of(samples) == pytest.approx(float(exact.variance), rel=0.05)


@pytest.mark.parametrize("count", [2, 4])
def test_the_variance_of_several_samples_is_that_of_samples(logits, tables, count):
    returns = returns_of(logits, tables)
    actions, index = drawn(logits, jax.random.key(3), 40_000)
    chosen = jnp.take_along_axis(returns[None], index[..., None, None], axis=2)[:, :, 0]
    score = actions - jax.nn.sigmoid(logits)
    grouped, scores = (part.reshape(-1, count, TEXTS, DECISIONS) for part in (chosen, score))
    others = (jnp.sum(grouped, axis=1, keepdims=True) - grouped) / (count - 1)
    samples = -jnp.mean(scores * (grouped - others), axis=1) / DECISIONS
    assert variance_of(samples) == pytest.approx(
        float(sample_moments(logits, STRINGS, returns, count).variance), rel=0.05
    )


def test_relaxed_moments_are_those_of_samples(logits, tables):
    """Noise drawn, the slope of the relaxed draw by automatic differentiation."""
    uniforms = jax.random.uniform(jax.random.key(4), (40_000, *logits.shape))

    def soft(logits, uniforms):
        return eq.gumbel_sigmoid(logits, uniforms, 0.5)

    slope = jax.vmap(jax.grad(lambda row, noise: jnp.sum(soft(row, noise))), (None, 0))(logits, uniforms)
    actions = jax.vmap(lambda u: soft(logits, u) > 0.5)(uniforms)
    index = string_index(actions)
    chosen = jnp.take_along_axis(tables.by_actions[None], index[..., None, None], axis=2)[:, :, 0]
    samples = -chosen * slope / DECISIONS
    exact = relaxed_moments(logits, STRINGS, tables, 0.5)
    np.testing.assert_allclose(jnp.mean(samples, axis=0), exact.mean, atol=5e-3)
    assert variance_of(samples) == pytest.approx(float(exact.variance), rel=0.05)


@pytest.mark.parametrize("centred", [False, True])
def test_gradient_descent_follows_the_mean_of_its_estimator(logits, tables, centred):
    returns = valued(logits, tables, Discount(0.9))
    field = eqx.Partial(sampled_score, returns, centred)
    samples = jax.vmap(field, (None, 0))(logits, jax.random.split(jax.random.key(6), 40_000))
    exact = score_moments(logits, STRINGS, returns, centring="batch" if centred else "none")
    np.testing.assert_allclose(jnp.mean(samples, axis=0), exact.mean, atol=1e-2)
    assert variance_of(samples) == pytest.approx(float(exact.variance), rel=0.05)


def test_what_gradients_at_fixed_boundaries_leave_out_of_the_greedy_loss():
    """Two decisions, a loss that depends on boundaries and, where there are some, on their logits."""
    table = jnp.asarray([0.3, -1.0, 0.7, 2.0])
    logits, scale, count = jnp.asarray([0.4, -0.9]), jnp.asarray(0.6), 20_000

    def loss(logits, actions):
        return table[string_index(actions)] + jnp.sum(jnp.where(actions, jnp.tanh(logits), 0.0), axis=1)

    # The noise of either decision is spread evenly, and the two in no relation.
    quantiles = (jnp.arange(float(count)) + 0.5) / count
    shuffled = jax.random.permutation(jax.random.key(0), quantiles)
    noise = jax.scipy.special.logit(jnp.stack([quantiles, shuffled], axis=1))
    fixed = jnp.mean(fixed_gradient(loss, logits + scale * noise), axis=0)

    def averaged(logits):
        """The averaged loss: boundaries by enumeration, tanh by quadrature over the noise."""
        on = jax.nn.sigmoid(logits / scale)
        probs = jnp.stack([1 - on, on])
        strings = jnp.sum(table.reshape(2, 2) * probs[:, 0, None] * probs[None, :, 1])
        positive = jnp.linspace(0.0, 12.0, 24_001)[:, None]
        shifted = (positive - logits) / scale
        density = jax.nn.sigmoid(shifted) * jax.nn.sigmoid(-shifted) / scale
        return strings + jnp.sum(jnp.trapezoid(jnp.tanh(positive) * density, positive, axis=0))

    exact = jax.grad(averaged)(logits)
    np.testing.assert_allclose(fixed + jumps(loss, logits, noise, scale), exact, atol=5e-3)
    assert float(jnp.max(jnp.abs(fixed - exact))) > 0.1


def test_paths_start_together_part_by_their_keys_and_lead_downhill(logits, tables):
    needs("lab", "diffrax")
    from experiments.laboratory.flow import DescentSteps, descend, integrate, losses_along

    by_string = string_losses(tables.log_prob, STRINGS)
    keys = jax.random.key(0), jax.random.key(0), jax.random.key(1)
    field = eqx.Partial(sampled_score, returns_of(logits, tables), False)
    schedule = DescentSteps.of(0.5, 100.0)
    times, (one, again, other) = descend(field, by_string, logits, schedule, jnp.stack(keys))
    np.testing.assert_array_equal(one, again)
    np.testing.assert_array_equal(one[0], logits)
    np.testing.assert_array_equal(one[0], other[0])
    assert float(jnp.max(jnp.abs(one[-1] - other[-1]))) > 1e-3
    assert float(times[-1]) == 100.0
    # As small steps along the expectation the same field is the flow of the exact gradient.
    with jax.numpy_dtype_promotion("standard"):
        _, path = integrate(eqx.Partial(expected_score, returns_of(logits, tables), STRINGS), by_string, logits, 20.0)
    _, (small,) = descend(
        eqx.Partial(exact, tables, STRINGS), by_string, logits, DescentSteps.of(0.02, 20.0), jnp.stack(keys[:1])
    )
    np.testing.assert_allclose(path[-1], small[-1], rtol=0.02, atol=0.02)
    losses, rate, greedy = losses_along(eqx.Partial(drawn_loss, None), by_string, path)
    assert losses[-1] < losses[0]
    assert 0.0 < float(rate) < 1.0
    assert float(greedy) >= float(jnp.mean(by_string.best))


def test_models_share_compiled_programs():
    """Another model of the same shape traces nothing anew: its weights are arguments."""
    traced = []

    class Counting(Chunker):
        def down(self, hidden, boundaries, **given):
            traced.append(hidden.shape)
            return super().down(hidden, boundaries, **given)

    def subject(seed):
        estimator = Estimator(TabularRouter(jnp.zeros((1, 3))), Counting(Select(), Distribute()), NoObjective())
        model = UNet(dataclasses.replace(SHAPE, dim=8), estimator, key=jax.random.key(seed))
        return Subject(model, jnp.full((1, 3), 97 + seed))

    greedy.at_a_point(subject(0), jnp.ones((1, 2)))
    once = len(traced)
    greedy.at_a_point(subject(1), jnp.ones((1, 2)))
    assert len(traced) == once > 0


def test_noise_is_told_for_every_model_and_compared_with_the_papers():
    tiny = PRESETS["tiny"]
    unet = dataclasses.replace(transformer_shape(tiny), dim=16, heads=2, main_layers=1, window=4)
    small = dataclasses.replace(tiny, unet=unet, length=32, batch=4)
    names = "early exit, γ = .99, batch centring (the paper)", "none of the three", "γ = .8"
    with jax.numpy_dtype_promotion("standard"):
        noises = noise(small, after=(0, 1), draws=8, models=2, names=names)
    assert [len(models) for models in noises.values()] == [2, 2]
    for models in noises.values():
        paper, nothing, near = summarise_noise(models)
        assert (paper.variance.low, paper.variance.high) == (1.0, 1.0)
        assert near.variance.mean < 1.0 < nothing.variance.mean
    assert noises[0][0] != noises[0][1]
    assert noises[0][0] != noises[1][0]


def two_estimators(signals):
    return [[Noise("the paper", 1.0, paper, 1.0), Noise("other", 2.0, other, 2.0)] for paper, other in signals]


def test_a_signal_that_could_be_zero_has_no_ratio_to_it():
    paper, other = summarise_noise(two_estimators([(0.1, 4.0), (-0.05, 4.0), (0.02, 4.0)]))
    assert paper.gain is None
    assert other.gain is None
    assert other.snr == Interval(2.0, 2.0, 2.0)
    assert other.variance.mean == pytest.approx(2.0)
    _, other = summarise_noise(two_estimators([(1.0, 8.0), (1.1, 8.8), (0.9, 7.2)]))
    assert other.gain is not None
    assert (other.gain.mean, other.gain.low, other.gain.high) == pytest.approx((2.0, 2.0, 2.0))


def test_leads_are_paired_by_model():
    """Models differ more than flows do on one model."""
    flow = Flow("", "mean", "drawn", (), (), *([0.0] * 6))
    models = [
        [
            dataclasses.replace(flow, name=name, closed=closed)
            for name, closed in (("exact", base), ("other", base + lead))
        ]
        for base, lead in ((0.2, 0.11), (0.9, 0.10), (0.5, 0.09))
    ]
    exact, other = summarise_flows(models, (0, 0))
    assert exact.lead == Interval(0.0, 0.0, 0.0)
    assert other.against == "exact"
    assert other.closed.holds(exact.closed.mean)
    assert other.lead.mean == pytest.approx(0.1)
    assert not other.lead.holds(0.0)


def test_the_command_leaves_tables_and_a_figure(corpus, tmp_path):
    needs("lab", "diffrax")
    out = tmp_path / "lab"
    settings = (
        *("--length", 4, "--models", 2, "--sets", 2, "--texts", 2, "--steps", 1),
        *("--time", 10, "--learning-rates", 1, "--paths", 2, "--after"),
    )
    arguments = [str(argument) for argument in ("--dataset", corpus, "--out", out, *settings)]
    with jax.numpy_dtype_promotion("standard"):
        assert lab.main(arguments) == 0
    found = json.loads((out / "lab.json").read_text())
    by_name = {(one["model"], one["objective"], one["name"]): one for one in found["gradients"]}
    for name in ("score function: nothing", "score function: early exit", "DisARM"):
        assert by_name["distribute", "drawn", name]["bias"]["high"] < 1e-3
    assert {kind for model, kind, _ in by_name if model == "smooth"} == {
        *("drawn", "greedy, boundaries fixed", "greedy, s = 0.25", "greedy, s = 1"),
    }
    first, second = ({one["name"]: one["closed"] for one in model["flows"]} for model in found["models"])
    assert first != second
    flows = {(one["model"], one["objective"], one["name"]): one for one in found["flows"]}
    score = flows["distribute", "drawn", "score function, γ = 1"]
    assert score["against"] == "exact gradient"
    assert score["lead"]["mean"] == pytest.approx(0.0, abs=1e-4)
    assert flows["smooth", "greedy", "dynamic chunking, greedy"]["against"] == "gradient averaged over s = 1"
    assert (out / "lab.png").read_bytes().startswith(b"\x89PNG")
    assert "±" in (out / "lab.md").read_text()
    assert lab.main(arguments) == 2


def test_the_command_measures_estimators_by_name(corpus, tmp_path, capsys, monkeypatch):
    """Those of somebody else's package as well."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "outside"))
    outside = "my_tokens.router:NormRouter"
    out = tmp_path / "named"
    settings = ("--length", 3, "--models", 2, "--sets", 1, "--steps", 1)
    arguments = [str(argument) for argument in ("--dataset", corpus, "--out", out, *settings, "--estimators")]
    with jax.numpy_dtype_promotion("standard"):
        assert lab.main([*arguments, outside, "whitespace"]) == 0
    found = json.loads((out / "estimators.json").read_text())
    policy, rule = found["estimators"]
    assert (policy["name"], policy["draws"], rule["name"], rule["parameters"]) == (
        outside,
        "enumerated",
        "whitespace",
        0,
    )
    assert policy["cosine"]["mean"] > 0.9
    assert policy["variance"]["mean"] > 0.0
    assert policy["error"]["mean"] == 0.0
    assert rule["cosine"]["mean"] is None
    assert [len(models) for models in found["models"]] == [2, 2]
    assert "| whitespace | 0 |" in (page := (out / "estimators.md").read_text())
    assert "no parameters to train" in page
    assert lab.main([*arguments, "sfe"]) == 2, "results are not written over"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("nothing-of-the-sort",), "--estimator nothing-of-the-sort: there are bpe, "),
        (("sfe", "--length", "9"), "have 65536 outcomes, and at most 16384 are tried: lower --length or --texts"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_sentence(corpus, tmp_path, capsys, arguments, sentence):
    settings = ("--dataset", corpus, "--out", tmp_path / "out", "--models", 2, "--sets", 1, "--estimators")
    assert lab.main([*map(str, settings), *arguments]) == 2
    assert sentence in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--length", "13"),
        ("--texts", "1"),
        ("--models", "1"),
        ("--sets", "0"),
        ("--paths", "0"),
        ("--draws", "9"),
        ("--time", "0"),
        ("--after", "-1"),
    ],
    ids=lambda a: a[0],
)
def test_impossible_settings_are_refused(tmp_path, arguments):
    assert lab.main(["--out", str(tmp_path / "out"), *arguments]) == 2
    assert not (tmp_path / "out").exists()
