"""The general measurement of a gradient against formulas by hand, and what must be true of it for any estimator."""

import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float

from estimators import (
    AbstractObjective,
    AbstractPositionwiseRouter,
    BatchCentre,
    Bernoulli,
    Boundaries,
    Critic,
    Discount,
    EarlyExit,
    Estimator,
    GeneralisedAdvantage,
    Greedy,
    ImportanceWeight,
    NoObjective,
    ObjectiveInputs,
    ObjectiveOutput,
    OffPolicy,
    SampleCentre,
    ScoreFunctionObjective,
    Spacelike,
    WindowedPolicy,
)
from estimators import equations as eq
from experiments.laboratory.gradients import without_weights
from experiments.laboratory.greedy import at_a_point
from experiments.laboratory.measure import _drawn_with, all_strings, measure
from experiments.laboratory.moments import (
    exact_gradient,
    relaxed_moments,
    returns_by_string,
    sample_moments,
    score_moments,
)
from experiments.laboratory.subjects import Subject, tabulate
from unet import Chunker, Distribute, MeanPool, Select, Smooth, UNet, UNetConfig

DIM = 8
SHAPE = UNetConfig(DIM, 1, 1, 1, 1, window=4)
TEXTS = jnp.asarray([[97, 3, 7, 9], [98, 7, 3, 5]])
KEY = jax.random.key(5)
SELECT = Chunker(Select(), Distribute())


class ByText(AbstractPositionwiseRouter):
    """A router that the laboratory has never heard of: a logit for each position of each text, told by its first byte.

    With a `temperature` its draws are relaxed.
    """

    logits: Float[Array, "texts length"]
    temperature: float | None = eqx.field(static=True, default=None)

    @property
    def rate(self) -> float | None:
        return 0.5

    def boundaries(self, hidden, layout, options) -> Boundaries:
        logits = self.logits[layout.bytes[:, 0] - 97]
        probs = jnp.where(layout.starts, 1.0, jax.nn.sigmoid(logits))
        actions, relaxed = options.bernoulli(probs, layout), None
        if self.temperature is not None:
            uniforms = jnp.full(logits.shape, 0.5) if options.actions is not None else options.uniforms(layout)
            soft = eq.gumbel_sigmoid(logits, uniforms, self.temperature)
            actions = options.bernoulli(probs, layout) if options.actions is not None else (soft > 0.5) | layout.starts
            relaxed = eq.straight_through(actions, jnp.where(layout.free, soft, 0.0))
        return Boundaries(actions, logits, probs, layout.free, layout.starts, relaxed)


class OneOf(AbstractObjective):
    """The objective whose weight is 1: which one it is changes no compiled program."""

    objectives: tuple[AbstractObjective, ...]
    weights: Float[Array, " objectives"]

    @property
    def needs_early_exit(self) -> bool:
        return True

    def __call__(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        losses = jnp.stack([objective(inputs).loss for objective in self.objectives])
        return ObjectiveOutput(self.weights @ losses, {})


def measured(router, chunker, objectives, texts=TEXTS, draws=2**10, **settings):
    """A model, and one report for each of the objectives."""
    choice = OneOf(tuple(objectives), jnp.zeros(len(objectives)))
    model = UNet(SHAPE, Estimator(router, chunker, choice), key=jax.random.key(0))
    # Predictions that differ between strings by much more than rounding.
    model = eqx.tree_at(lambda m: m.embedding, model, 8.0 * model.embedding)

    def chosen(number):
        weights = jnp.arange(len(objectives)) == number
        return eqx.tree_at(lambda m: m.stage.estimator.objective.weights, model, weights.astype(jnp.float32))

    return model, [measure(chosen(number), texts, KEY, draws=draws, **settings) for number in range(len(objectives))]


def score(*reductions):
    return ScoreFunctionObjective(reductions, 0.5, policy_weight=1.0, rate_weight=0.0)


@pytest.fixture(scope="module")
def logits():
    """Those of the texts' decisions, and the router that has them."""
    found = jax.random.normal(jax.random.key(1), (2, 3))
    return found, ByText(jnp.pad(found, ((0, 0), (1, 0))))


def of_decisions(vector):
    """A gradient of the mean over texts, as that of each text's loss with respect to its decisions."""
    return 2 * vector.reshape(2, 4)[:, 1:]


def assert_is(report, moments, exact):
    """The report has these moments, by hand those of each text's loss."""
    tolerance = 2e-5 * float(jnp.max(jnp.abs(exact)))
    np.testing.assert_allclose(of_decisions(report.exact), exact, atol=10 * tolerance)
    np.testing.assert_allclose(of_decisions(report.expected), moments.mean, atol=tolerance)
    assert 4 * report.variance == pytest.approx(float(moments.variance), rel=1e-3)
    assert report.draws == "enumerated"


def opinionated(critic):
    return eqx.tree_at(lambda c: (c.weight, c.bias), critic, (jnp.linspace(-1.0, 1.0, DIM), jnp.asarray(0.3)))


CRITIC = opinionated(Critic(DIM))
ADVANTAGE = eqx.tree_at(lambda g: g.critic, GeneralisedAdvantage(DIM, 0.7, 0.5), CRITIC)
CHAINS = [
    ((), "none"),
    ((EarlyExit(),), "none"),
    ((EarlyExit(), Discount(0.7)), "none"),
    ((EarlyExit(), Discount(0.7), BatchCentre()), "batch"),
    ((EarlyExit(), BatchCentre(leave_one_out=True)), "leave-one-out"),
    ((EarlyExit(), Discount(0.7), CRITIC), "none"),
    ((EarlyExit(), Discount(0.7), CRITIC, BatchCentre()), "batch"),
    ((EarlyExit(), ADVANTAGE), "none"),
]


def test_every_reduction_of_the_score_function_has_the_moments_of_the_formulas(logits):
    """Those that are coupled over the batch included, whose formulas are the only ones for long texts."""
    own, router = logits
    model, reports = measured(router, SELECT, [score(*chain) for chain, _ in CHAINS])
    tables, strings = tabulate(Subject(model, TEXTS), own), all_strings(3)
    exact = exact_gradient(own, tables, strings)
    for (chain, centring), report in zip(CHAINS, reports, strict=True):
        single = tuple(step for step in chain if not isinstance(step, BatchCentre))
        returns = returns_by_string(single, own, strings, tables, hidden=tables.hidden)
        assert_is(report, score_moments(own, strings, returns, centring=centring), exact)
    unbiased = reports[1]
    assert unbiased.scale == pytest.approx(1.0, rel=1e-4)
    assert unbiased.bias < 1e-4
    assert unbiased.snr == pytest.approx(float(np.sum(unbiased.exact**2)) / unbiased.variance, rel=1e-3)
    assert reports[4].scale == pytest.approx(1.0, rel=1e-4)
    assert reports[2].bias > 1e-2, "a discount is biased"


def test_several_samples_have_the_moments_of_the_formula(logits):
    texts, own = TEXTS[:, :3], logits[0][:, :2]
    router = ByText(jnp.pad(own, ((0, 0), (1, 0))))
    chain = EarlyExit(), Discount(0.7)
    model, (report,) = measured(router, SELECT, [score(*chain, SampleCentre())], texts, samples=2)
    tables, strings = tabulate(Subject(model, texts), own), all_strings(2)
    moments = sample_moments(own, strings, returns_by_string(chain, own, strings, tables), 2)
    np.testing.assert_allclose(2 * report.expected.reshape(2, 3)[:, 1:], moments.mean, rtol=1e-4, atol=1e-6)
    assert 4 * report.variance == pytest.approx(float(moments.variance), rel=1e-3)


def test_relaxed_draws_are_sampled_and_agree_with_quadrature(logits):
    own, router = logits
    chunker = Chunker(MeanPool(DIM, key=jax.random.key(2)), Distribute())
    model, (report,) = measured(dataclasses.replace(router, temperature=0.5), chunker, [NoObjective()], draws=2**13)
    tables, strings = tabulate(Subject(model, TEXTS), own), all_strings(3)
    moments = relaxed_moments(own, strings, tables, 0.5)
    assert report.draws == "sampled"
    assert 0.0 < report.error < 0.1 * np.linalg.norm(report.task)
    assert np.linalg.norm(of_decisions(report.expected) - moments.mean) < 2 * 2 * report.error
    assert 4 * report.variance == pytest.approx(float(moments.variance), rel=0.05)
    exact = exact_gradient(own, tables, strings)
    np.testing.assert_allclose(of_decisions(report.exact), exact, rtol=1e-3, atol=1e-5)


def test_greedy_boundaries_have_no_noise_and_straight_through_gradients_are_not_taken_for_derivatives(logits):
    own, router = logits
    model, (report,) = measured(Greedy(router), Chunker(Select(), Smooth()), [NoObjective()])
    subject = Subject(model, TEXTS)
    assert (report.draws, report.variance, report.error) == ("fixed", 0.0, 0.0)
    assert math.isnan(report.snr)
    np.testing.assert_allclose(of_decisions(report.expected), at_a_point(subject, own), rtol=1e-4, atol=1e-6)
    exact = exact_gradient(own, tabulate(without_weights(subject), own), all_strings(3))
    np.testing.assert_allclose(of_decisions(report.exact), exact, rtol=5e-3, atol=1e-4)


def policy(seed):
    """One that remembers its last two actions."""
    router = WindowedPolicy(DIM, window=2, target_rate=0.4, scale=1.0)
    return eqx.tree_at(lambda r: r.weight, router, jax.random.normal(jax.random.key(seed), (3, DIM)))


def test_a_policy_with_memory_a_chunker_that_reads_probabilities_and_a_rate_loss_are_told_apart():
    """The whole gradient is that through the draws and that through the probabilities; the rate's is neither."""
    objectives = [score(EarlyExit()), dataclasses.replace(score(EarlyExit()), rate_weight=1.0)]
    _, (plain, regular) = measured(policy(3), Chunker(Select(), Smooth(weighting="none")), objectives)
    for report in (plain, regular):
        assert report.scale == pytest.approx(1.0, rel=2e-3)
        assert report.bias < 5e-3
        assert report.draws == "enumerated"
    assert not np.any(plain.regulariser)
    assert np.linalg.norm(regular.regulariser) > 0.01 * np.linalg.norm(regular.task)
    assert not np.allclose(regular.expected, regular.exact, rtol=0.01)


def test_another_behaviour_draws_and_clipped_weights_are_biased():
    router = OffPolicy(policy(3), Bernoulli(0.6))
    clips = [score(EarlyExit(), ImportanceWeight(clip), CRITIC) for clip in (None, 1.0)]
    _, (unbiased, clipped) = measured(router, SELECT, clips)
    assert unbiased.rate == pytest.approx((1 + 3 * 0.6) / 4)
    assert unbiased.scale == pytest.approx(1.0, rel=1e-3)
    assert unbiased.bias < 1e-3
    assert clipped.bias > 0.05


def test_a_rule_has_nothing_to_train():
    model = UNet(SHAPE, Spacelike(chunker=SELECT), key=jax.random.key(0))
    report = measure(model, jnp.asarray([list(b"ab c")]), KEY, draws=16)
    assert report.parameters == 0
    assert report.rate == 0.5
    assert all(math.isnan(number) for number in (report.scale, report.cosine, report.bias, report.snr))


def test_draws_are_compared_with_the_probabilities_that_a_router_states():
    """Sequences that are drawn alike have the right probabilities each, and are not independent."""
    probs, rng = np.array([[0.1, 0.2, 0.3, 0.4]] * 2), np.random.default_rng(0)
    places = rng.choice(4, (4096, 2), p=probs[0])

    def drawn(places):
        return np.stack([np.ones(places.shape, bool), places >= 2, places % 2 == 1], axis=2)

    assert _drawn_with(probs, drawn(places))
    assert not _drawn_with(probs[:, ::-1], drawn(places))
    assert not _drawn_with(probs, drawn(places[:, [0, 0]]))


@pytest.mark.parametrize(("texts", "estimator"), [((2, 9), True), ((1, 3), False)])
def test_what_cannot_be_measured_is_said(texts, estimator):
    given = Estimator(policy(3), SELECT, NoObjective()) if estimator else None
    shape = SHAPE if estimator else dataclasses.replace(SHAPE, main_layers=0, decoder_layers=0)
    model = UNet(shape, given, key=jax.random.key(0))
    with pytest.raises(ValueError, match="outcomes" if estimator else "one level of tokens"):
        measure(model, jnp.full(texts, 97), KEY, draws=16)
