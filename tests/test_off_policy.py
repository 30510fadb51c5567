"""Boundaries that another policy drew: every chain of reductions against the exact gradient, every string enumerated."""

import dataclasses
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from estimators import (
    BatchCentre,
    Critic,
    Discount,
    EarlyExit,
    GeneralisedAdvantage,
    ImportanceWeight,
    SampleCentre,
    ScoreFunctionObjective,
)
from estimators import equations as eq
from estimators.settings import Context
from experiments.config.presets import PRESETS
from tests.enumeration import BEHAVIOUR, DIM, world
from unet import Chunker, Distribute, Select

DISCOUNT = 0.7


def lively(step):
    """A critic starts by expecting nothing; with opinions it shows whether they are subtracted rightly."""
    if isinstance(step, GeneralisedAdvantage):
        return eqx.tree_at(lambda g: g.critic, step, lively(step.critic))
    if isinstance(step, Critic):
        weight = jax.random.normal(jax.random.key(3), (DIM,))
        return eqx.tree_at(lambda c: (c.weight, c.bias), step, (weight, jnp.asarray(-9.0)))
    return step


STEPS = {
    "early": EarlyExit(),
    "weight": ImportanceWeight(),
    "discount": Discount(DISCOUNT),
    "gae(1)": lively(GeneralisedAdvantage(DIM, DISCOUNT, 1.0)),
    "gae(.5)": lively(GeneralisedAdvantage(DIM, DISCOUNT, 0.5)),
    "critic": lively(Critic(DIM)),
    "batch": BatchCentre(),
    "leave-one-out": BatchCentre(leave_one_out=True),
    "samples": SampleCentre(),
}
SUMS, CENTRES = ("discount", "gae(1)", "gae(.5)"), ("batch", "leave-one-out", "samples")


def chain(names):
    return tuple(STEPS[name] for name in names)


def expected_of(names, here):
    """What theory says that a chain gives: the exact gradient, discounted; a decay below 1 has a bias of its own, that of the
    same chain where the policy draws."""
    if "gae(.5)" in names:
        return here.expected_on_policy(chain(name for name in names if name != "weight"))
    return here.exact(DISCOUNT if {"discount", "gae(1)"} & {*names} else 1.0, "batch" in names)


def error_of(names, here, exact):
    found = here.expected(chain(names))
    return float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact))


@pytest.fixture(scope="module")
def two():
    """Two sequences of five bytes, each boundary drawn with probability 0.2."""
    return world()


def has_sense(names):
    """Rewards are changed before they are summed, and summed once, before anything works on returns."""
    stages = [0 if name in ("early", "weight") else 1 if name in SUMS else 2 for name in names]
    return stages == sorted(stages)


@pytest.mark.parametrize("summing", [None, *SUMS])
def test_every_order_of_every_combination_is_unbiased_or_refused(two, summing):
    """Relative errors of the expected gradient; before weights went with the credit some were above 20."""
    single = jax.tree.map(lambda leaf: leaf[0], two.signals)
    parts = [("early",), ("critic",), ("batch", "leave-one-out")]
    combinations = itertools.product(*[(None, *names) for names in parts])
    exact, errors, refused = {}, {}, set()
    for others in combinations:
        names = [name for name in ("weight", summing, *others) if name is not None]
        for order in itertools.permutations(names):
            if not has_sense(order):
                # It is refused at the first step that comes too late, whatever stands behind it.
                order = next(order[:n] for n in range(len(order) + 1) if not has_sense(order[:n]))
                if order in refused:
                    continue
                refused.add(order)
                with pytest.raises(ValueError, match="must stand before"):
                    ScoreFunctionObjective(chain(order), BEHAVIOUR).advantages(single)
                continue
            key = "batch" in order if summing != "gae(.5)" else order
            if key not in exact:
                exact[key] = expected_of(order, two)
            errors[order] = error_of(order, two, exact[key])
    assert len(errors) == 24
    assert max(errors.values()) < 2e-4, {order: error for order, error in errors.items() if error >= 2e-4}


SEGMENTS = np.array([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]])
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]], bool)
WORLDS = {
    "three sequences": lambda: world(3, 4),
    "a behaviour with memory": lambda: world(behaviour=None),
    "packed and padded": lambda: world(segments=SEGMENTS, mask=MASK),
    "suppressed boundaries": lambda: world(capacity=3),
    "several samples": lambda: world(1, samples=2),
}


@pytest.mark.parametrize("name", WORLDS)
def test_reductions_are_unbiased_in_rows_of_every_kind(name):
    here = WORLDS[name]()
    if name == "suppressed boundaries":
        decided = here.signals.boundaries.decided
        assert jnp.any(decided != decided[:1]), "some strings must run out of rows for this to test anything"
    chains = [
        ("weight",),
        ("weight", "discount", "critic"),
        ("weight", "gae(1)", "leave-one-out"),
        ("weight", "early", "discount", "batch"),
        ("early", "weight", "discount", "leave-one-out", "critic"),
        *([("weight", "early", "discount", "critic", "samples")] if here.signals.samples > 1 else []),
    ]
    errors = {names: error_of(names, here, expected_of(names, here)) for names in chains}
    assert max(errors.values()) < 2e-4, errors


@pytest.mark.parametrize("centring", ["none", "batch", "leave-one-out", "samples"])
def test_what_can_be_configured_is_unbiased(two, centring):
    here = world(1, samples=2) if centring == "samples" else two
    exact = here.exact(DISCOUNT, centring == "batch")
    last = {"none": [], "batch": ["batch-centre"], "leave-one-out": ["batch-centre"], "samples": ["sample-centre"]}
    for early, summed in itertools.product(
        [[], ["early-exit"]], [["discount"], ["discount", "critic"], ["generalised-advantage"]]
    ):
        names = [*early, *summed, *last[centring]]
        settings = {
            "sfe": {"reductions": names, "samples": here.signals.samples},
            "offpolicy": {"clip": None},
            "discount": {"factor": DISCOUNT},
            "generalised_advantage": {"discount": DISCOUNT, "decay": 1.0},
            "batch_centre": {"leave_one_out": centring == "leave-one-out"},
        }
        config = dataclasses.replace(PRESETS["tiny"], estimator="sfe-offpolicy", settings=settings)
        context = Context(DIM, 0.2, Chunker(Select(), Distribute()), jax.random.key(0), None, config.sections)
        objective = config.first.build(context).objective
        assert isinstance(objective, ScoreFunctionObjective)
        found = here.expected([lively(step) for step in objective.reductions])
        assert float(jnp.linalg.norm(found - exact)) < 2e-4 * float(jnp.linalg.norm(exact)), names


def test_samples_are_compared_within_their_sequence_only():
    rng = np.random.default_rng(1)
    inputs = jax.tree.map(lambda leaf: leaf[93], world(1, samples=2).signals)
    actions = jnp.asarray(rng.random((6, 5)) < 0.4).at[:, 0].set(True)
    behaviour = jnp.asarray(-rng.exponential(size=(6, 5)), jnp.float32)
    rows = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * 3), inputs)
    rows = dataclasses.replace(
        rows,
        boundaries=dataclasses.replace(rows.boundaries, actions=actions, behaviour_log_prob=behaviour),
        log_prob=jnp.where(rows.mask, jnp.asarray(rng.normal(size=(6, 5)), jnp.float32), 0.0),
    )

    def advantages(names, seen):
        return ScoreFunctionObjective(chain(names), BEHAVIOUR).advantages(seen)

    found = advantages(("weight", "discount", "samples"), rows)
    for first in (0, 2, 4):
        pair = jax.tree.map(lambda leaf, first=first: leaf[first : first + 2], rows)
        alone = advantages(("weight", "discount", "leave-one-out"), pair)
        np.testing.assert_allclose(found[first : first + 2], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("step", ["critic", "gae(1)"])
def test_a_critic_learns_the_return_that_the_policy_itself_would_expect(two, step):
    """Its expected gradient under the behaviour's draws is that under the policy's own."""

    def gradients(names, signals):
        def loss(moved, inputs):
            return ScoreFunctionObjective((*chain(names[:-1]), moved), BEHAVIOUR).credit(inputs).loss

        return eqx.filter_vmap(eqx.filter_grad(loss), in_axes=(None, 0))(STEPS[step], signals)

    before = ("early", "discount") if step == "critic" else ("early",)
    on = gradients((*before, step), two.signals)
    off = gradients(("weight", *before, step), two.signals)
    for own, weighted in zip(jax.tree.leaves(on), jax.tree.leaves(off), strict=True):
        expected = jnp.tensordot(two.on, own, 1)
        np.testing.assert_allclose(jnp.tensordot(two.off, weighted, 1), expected, rtol=1e-4)
        assert not np.allclose(jnp.tensordot(two.off, own, 1), expected, rtol=1e-2)


def test_a_behaviour_that_is_the_policy_changes_nothing(two):
    """Weights of 1, whatever the chain: today's advantages and losses."""
    inputs = jax.tree.map(lambda leaf: leaf[37], two.signals)
    own = eq.action_log_prob(inputs.boundaries.logits, inputs.boundaries.actions)
    inputs = dataclasses.replace(inputs, boundaries=dataclasses.replace(inputs.boundaries, behaviour_log_prob=own))
    for names in [("discount", "critic", "batch"), ("gae(.5)", "leave-one-out"), ("early", "leave-one-out", "critic")]:
        plain = ScoreFunctionObjective(chain(names), BEHAVIOUR)
        weighted = ScoreFunctionObjective(chain(("weight", *names)), BEHAVIOUR)
        np.testing.assert_allclose(weighted.advantages(inputs), plain.advantages(inputs), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(weighted(inputs).loss, plain(inputs).loss, rtol=1e-5)


def test_clipped_weights_are_the_same_wherever_they_are_used(two):
    """In rewards and in baselines; and whatever the bound, it biases."""
    inputs = jax.tree.map(lambda leaf: leaf[93], two.signals)

    def advantages(*steps):
        return np.asarray(ScoreFunctionObjective(steps, BEHAVIOUR).advantages(inputs))

    boundaries = inputs.boundaries
    weights = np.minimum(
        eq.importance_weights(
            boundaries.logits,
            boundaries.actions,
            boundaries.behaviour_log_prob,
            boundaries.decided,
            boundaries.starts,
        ),
        1.5,
    )
    assert np.any(weights == 1.5)
    assert np.any(weights[:, 1:] < 1.5)
    clip, critic = ImportanceWeight(1.5), STEPS["critic"]
    returns = advantages(clip, Discount(DISCOUNT))
    rewards = jnp.asarray(weights) * inputs.log_prob
    np.testing.assert_allclose(returns, eq.discounted_returns(rewards, DISCOUNT, inputs.continues), rtol=1e-5)
    valued = returns - weights * np.asarray(critic.values(inputs))
    np.testing.assert_allclose(advantages(clip, Discount(DISCOUNT), critic), valued, rtol=1e-4, atol=1e-5)
    centred = (returns - weights * (returns / weights)[::-1])[:, :-1]
    found = advantages(clip, Discount(DISCOUNT), BatchCentre(leave_one_out=True))[:, :-1]
    np.testing.assert_allclose(found, centred, rtol=1e-4, atol=1e-4)
    exact = two.exact(DISCOUNT)
    for bound, least in [(1.0, 0.3), (2.0, 0.3), (5.0, 0.1)]:
        steps = (ImportanceWeight(bound), Discount(DISCOUNT), BatchCentre(leave_one_out=True))
        assert float(jnp.linalg.norm(two.expected(steps) - exact)) > least * float(jnp.linalg.norm(exact))


def test_where_the_critic_is_right_about_all_that_follows_nothing_is_left_of_any_weight(two):
    """Rewards that no action changes, and a critic that knows them: generalised advantages are 0, clipped or not."""
    inputs = jax.tree.map(lambda leaf: leaf[93], two.signals)
    # v_i = w·x_i with rewards made to fit: r_i = v_i - γ v_{i+1}.
    gae = STEPS["gae(1)"]
    values = gae.critic.values(inputs)
    after = jnp.where(inputs.continues, jnp.roll(values, -1, axis=1), 0.0)
    fitting = dataclasses.replace(inputs, log_prob=jnp.where(inputs.mask, values - DISCOUNT * after, 0.0))
    for clip in (None, 1.0):
        found = ScoreFunctionObjective((ImportanceWeight(clip), gae), BEHAVIOUR).advantages(fitting)
        np.testing.assert_allclose(found, 0.0, atol=1e-4)


def test_the_weighted_mean_is_that_of_the_other_valid_sequences():
    rng = np.random.default_rng(0)
    returns, weights = rng.normal(size=(4, 6)), rng.lognormal(0.0, 2.0, (4, 6))
    mask = rng.random((4, 6)) > 0.3
    mask[:, 0] = [True, False, False, False]
    arrays = jnp.asarray(returns, jnp.float32), jnp.asarray(weights, jnp.float32), jnp.asarray(mask)
    found, batch = (eq.weighted_batch_centred(*arrays, leave_one_out=one) for one in (True, False))
    for b, i in itertools.product(range(4), range(6)):
        others = [c for c in range(4) if c != b and mask[c, i]]
        mean = returns[others, i].sum() / weights[others, i].sum() if others else 0.0
        expected = (returns[b, i] - weights[b, i] * mean) * mask[b, i]
        assert float(found[b, i]) == pytest.approx(expected, rel=1e-4, abs=1e-5)
        share = len(others) / (len(others) + 1)
        assert float(batch[b, i]) == pytest.approx(share * expected, rel=1e-4, abs=1e-5)


def test_a_large_weight_of_its_own_changes_nothing_in_the_mean_of_the_others():
    returns, weights = jnp.array([[3e8], [2.0], [4.0]]), jnp.array([[1e8], [1.0], [1.0]])
    found = eq.weighted_batch_centred(returns, weights, jnp.ones((3, 1), bool), leave_one_out=True)
    assert float(found[0, 0]) == 0.0
    nothing = jnp.zeros((3, 1))
    assert not jnp.any(eq.weighted_batch_centred(nothing, nothing, jnp.ones((3, 1), bool), leave_one_out=True))


def test_weights_that_have_vanished_leave_the_critic_finite():
    weights, returns = jnp.array([[0.0, 1e-30, 1.0]]), jnp.array([[5.0, 5.0, 5.0]])
    gradient = jax.grad(lambda v: eq.value_loss(v, returns, jnp.ones((1, 3), bool), weights))(jnp.ones((1, 3)))
    np.testing.assert_allclose(gradient, [[0.0, 0.0, -8.0 / 3]], atol=1e-5)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (("weight", "early", "weight"), "ImportanceWeight is listed twice"),
        (("weight", "batch", "leave-one-out"), "BatchCentre after BatchCentre"),
        (("leave-one-out", "critic", "batch"), "BatchCentre after BatchCentre"),
    ],
)
def test_what_would_count_twice_is_refused(two, names, sentence):
    with pytest.raises(ValueError, match=sentence):
        ScoreFunctionObjective(chain(names), BEHAVIOUR).advantages(jax.tree.map(lambda leaf: leaf[0], two.signals))


def test_centring_samples_after_the_batch_is_refused():
    inputs = jax.tree.map(lambda leaf: leaf[0], world(1, samples=2).signals)
    for names in itertools.permutations(["samples", "batch"]):
        with pytest.raises(ValueError, match=r"Centre after .*leave one of the two out"):
            ScoreFunctionObjective(chain(names), BEHAVIOUR).advantages(inputs)
