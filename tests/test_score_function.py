"""The score-function estimator against exact answers: every boundary string enumerated, every expectation summed."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from estimators import BatchCentre, Discount, EarlyExit, ObjectiveInputs, SamplingOptions, ScoreFunctionObjective
from estimators import equations as eq
from tests.conftest import predict, small_model, small_score_function, text_bytes
from unet.likelihood import continues, next_logprobs, plain_layout
from unet.ops import boundary_scan

LENGTH = 4
BATCH = 2
DISCOUNT = 0.7


def strings(length):
    """All boundary strings that start with the forced boundary."""
    rest = np.array(list(itertools.product([False, True], repeat=length - 1)))
    return jnp.asarray(np.concatenate([np.ones((len(rest), 1), bool), rest], axis=1))


def joint_strings():
    """All ways for two sequences to draw their boundaries independently, `outcomes batch length`."""
    each = strings(LENGTH)
    return jnp.stack([jnp.stack([a, b]) for a in each for b in each])


@pytest.fixture(scope="module")
def model():
    # Weights three times as large make boundaries matter more than they would in a fresh model.
    model = small_model(small_score_function(), window=3)
    return jax.tree.map(lambda leaf: 3.0 * leaf if eqx.is_inexact_array(leaf) else leaf, model)


@pytest.fixture(scope="module")
def bytes():
    return text_bytes(BATCH, LENGTH, seed=5)


def policy_of(model):
    return model.stage.estimators[0].router


def with_policy(model, weight):
    return eqx.tree_at(lambda m: policy_of(m).weight, model, weight)


def signal_of(model, bytes, actions):
    """What the objective sees when the boundaries are `actions`."""
    layout = plain_layout(bytes)
    prediction = predict(model, bytes, actions=(actions,), training=True)
    log_prob = next_logprobs(prediction.logits, bytes)
    assert prediction.early_logits is not None
    early = next_logprobs(prediction.early_logits, bytes)
    mask = continues(layout)
    level = prediction.levels[0]
    return ObjectiveInputs(level.boundaries, level.hidden, log_prob, early, mask, mask)


def log_prob_of(inputs):
    """log π of the whole joint string."""
    log_prob = eq.action_log_prob(inputs.boundaries.logits, inputs.boundaries.actions)
    return jnp.sum(jnp.where(inputs.boundaries.decided, log_prob, 0.0))


@pytest.fixture(scope="module")
def outcomes(model, bytes):
    """The signals of all joint strings, stacked."""
    return jax.jit(jax.vmap(lambda actions: signal_of(model, bytes, actions)))(joint_strings())


def expected_policy_gradient(model, bytes, outcomes, objective):
    """E over joint strings of the gradient of the policy loss with respect to the policy's weights, and its variance.

    Gradients reach the weights through the logits alone, so the encoder runs once and the rest of the model not at all.
    """
    layout = plain_layout(bytes)
    hidden = model.stage.encoder(model.embed(layout), layout).hidden
    router = policy_of(model)

    def one(inputs):
        def loss(weight):
            changed = eqx.tree_at(lambda r: r.weight, router, weight)
            actions = inputs.boundaries.actions
            boundaries = changed(hidden, layout, SamplingOptions(boundary_scan, actions=actions, training=True))
            seen = eqx.tree_at(lambda s: s.boundaries, inputs, boundaries)
            return objective(seen).metrics["policy_loss"]

        return jnp.exp(log_prob_of(inputs)), jax.grad(loss)(router.weight)

    prob, gradients = jax.jit(jax.vmap(one))(outcomes)
    np.testing.assert_allclose(jnp.sum(prob), 1.0, rtol=1e-5)
    mean = jnp.tensordot(prob, gradients, 1)
    return mean, float(jnp.sum(prob[:, None, None] * (gradients - mean) ** 2))


def exact_credit(model, bytes):
    """`d E[log_prob_k] / d` (the policy's weights as used at row i), for all i and k, by differentiating the enumeration.

    No score function is involved: each row gets its own copy of the weights, and the expectation itself is differentiated.
    """
    layout = plain_layout(bytes)
    router, each = policy_of(model), strings(LENGTH)

    def expectation(copies, b):
        row, row_layout = bytes[b : b + 1], jax.tree.map(lambda leaf: leaf[b : b + 1], layout)
        hidden = model.stage.encoder(model.embed(row_layout), row_layout).hidden

        def outcome(actions):
            rewards = next_logprobs(model(row, actions=(actions[None],), training=True).logits, row)[0]
            raw = jnp.stack([copies[i] @ hidden[0, i] for i in range(LENGTH)]) / router.scale
            raw = raw.at[:, 0].add(eq.logit(router.target_rate))
            logits = eq.soft_cap(eq.windowed_logits(raw[None], actions[None], row_layout.starts), router.cap)
            log_prob = jnp.sum(eq.action_log_prob(logits, actions[None])[0, 1:])
            return jnp.exp(log_prob) * jax.lax.stop_gradient(rewards)

        return jnp.sum(jax.vmap(outcome)(each), axis=0)

    copies = jnp.broadcast_to(router.weight, (LENGTH, *router.weight.shape))
    # rows k of the likelihood, rows i of the policy: `batch length length lags dim`
    return jnp.stack([jax.jacobian(expectation)(copies, b) for b in range(BATCH)])


@pytest.fixture(scope="module")
def credit(model, bytes):
    return jax.jit(exact_credit)(model, bytes)


CENTRES = {"none": (), "batch": (BatchCentre(),), "leave-one-out": (BatchCentre(leave_one_out=True),)}


@pytest.mark.parametrize("centre", CENTRES)
@pytest.mark.parametrize("discount", [None, 1.0, DISCOUNT])
@pytest.mark.parametrize("early", [False, True])
def test_the_expected_policy_gradient_is_exactly_what_theory_says(
    model, bytes, outcomes, credit, early, discount, centre
):
    """Unbiased without discounting, early exit or not; discounted credit is weighted by γ^(k-i); batch centring scales by
    (B-1)/B and leave-one-out by 1."""
    reductions = (
        *((EarlyExit(),) if early else ()),
        *((Discount(discount),) if discount is not None else ()),
        *CENTRES[centre],
    )
    got, _ = expected_policy_gradient(model, bytes, outcomes, ScoreFunctionObjective(reductions, 0.3))
    gamma = 1.0 if discount is None else discount
    k, i = np.meshgrid(np.arange(LENGTH), np.arange(LENGTH), indexing="ij")
    weights = np.where(k >= i, gamma ** np.maximum(k - i, 0), 0.0)
    factor = (BATCH - 1) / BATCH if centre == "batch" else 1.0
    decided = BATCH * (LENGTH - 1)
    expected = -factor / decided * jnp.einsum("ki,bkitd->td", jnp.asarray(weights, jnp.float32), credit)
    scale = float(jnp.max(jnp.abs(expected)))
    assert scale > 1e-4, "the model must care about its boundaries for this to test anything"
    np.testing.assert_allclose(got, expected, atol=2e-4 * scale + 1e-6)


def test_a_decision_earns_nothing_from_predictions_made_before_it(credit):
    k, i = np.meshgrid(np.arange(LENGTH), np.arange(LENGTH), indexing="ij")
    # Zeros are what is left of sums of log-likelihoods of either sign.
    np.testing.assert_allclose(credit[:, k < i], 0.0, atol=5e-5 * float(jnp.max(jnp.abs(credit))))


def test_discounting_biases_the_gradient(model, bytes, outcomes):
    objectives = [ScoreFunctionObjective((Discount(gamma),), 0.3) for gamma in (1.0, DISCOUNT)]
    unbiased, biased = (expected_policy_gradient(model, bytes, outcomes, o)[0] for o in objectives)
    assert float(jnp.linalg.norm(biased - unbiased)) > 1e-3 * float(jnp.linalg.norm(unbiased))


def test_likelihood_and_policy_gradient_add_up_to_the_gradient_of_the_expected_likelihood():
    """∇ E[Σ log_prob] = E[∇ Σ log_prob + Σ log_prob ∇ log π] for all parameters at once (appendix A.1), N = 6."""
    length = 6
    estimator = small_score_function((), dim=8, window=2, policy_weight=1.0, rate_weight=0.0)
    model = small_model(estimator, dim=8, window=3)
    model = jax.tree.map(lambda leaf: 2.0 * leaf if eqx.is_inexact_array(leaf) else leaf, model)
    bytes, each = text_bytes(1, length, seed=2), strings(length)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    layout = plain_layout(bytes)

    def probability(model, actions):
        boundaries = model(bytes, actions=(actions[None],), training=True).levels[0].boundaries
        log_prob = eq.action_log_prob(boundaries.logits, boundaries.actions)
        return jnp.exp(jnp.sum(jnp.where(boundaries.decided, log_prob, 0.0)))

    def exact(params):
        model = eqx.combine(params, static)

        def outcome(actions):
            prediction = model(bytes, actions=(actions[None],), training=True)
            return probability(model, actions) * jnp.sum(next_logprobs(prediction.logits, bytes))

        return -jnp.sum(jax.vmap(outcome)(each)) / (length - 1)

    def estimated(params):
        model = eqx.combine(params, static)

        def outcome(actions):
            prediction = model(bytes, actions=(actions[None],), training=True)
            weight = jax.lax.stop_gradient(probability(model, actions))
            return weight * model.losses(prediction, layout).loss

        return jnp.sum(jax.vmap(outcome)(each))

    expected, got = jax.jit(jax.grad(exact))(params), jax.jit(jax.grad(estimated))(params)
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(got), strict=True):
        scale = float(jnp.max(jnp.abs(leaf)))
        np.testing.assert_allclose(other, leaf, atol=5e-4 * scale + 1e-6, err_msg=jax.tree_util.keystr(path))


def test_each_reduction_lowers_the_variance(model, bytes, outcomes):
    ladder = [(), (EarlyExit(),), (EarlyExit(), Discount(DISCOUNT)), (EarlyExit(), Discount(DISCOUNT), BatchCentre())]
    variances = []
    for reductions in ladder:
        objective = ScoreFunctionObjective(reductions, 0.3)
        variances.append(expected_policy_gradient(model, bytes, outcomes, objective)[1])
    assert all(later < earlier for earlier, later in itertools.pairwise(variances)), variances


def test_the_order_of_reductions_is_checked(model, bytes):
    inputs = signal_of(model, bytes, jnp.ones((BATCH, LENGTH), bool))
    for reductions in [(Discount(), EarlyExit()), (BatchCentre(), EarlyExit()), (BatchCentre(), Discount())]:
        with pytest.raises(ValueError, match="must stand before"):
            ScoreFunctionObjective(reductions, 0.3)(inputs)


def test_the_early_head_learns_only_its_own_weighted_loss(model, bytes):
    """The early exit adds λ times the early head's mean negative log-likelihood and nothing else to the early head."""

    def losses(head, weight):
        changed = eqx.tree_at(lambda m: m.early_head.weight, model, head)
        inputs = signal_of(changed, bytes, jnp.ones((BATCH, LENGTH), bool))
        return ScoreFunctionObjective((EarlyExit(weight), Discount(0.9)), 0.3)(inputs).loss

    head = model.early_head.weight
    hidden = signal_of(model, bytes, jnp.ones((BATCH, LENGTH), bool))
    assert hidden.early_log_prob is not None
    plain = -float(eq.masked_mean(hidden.early_log_prob, hidden.mask))
    assert float(losses(head, 0.5) - losses(head, 0.0)) == pytest.approx(0.5 * plain, rel=1e-4)
    assert not jnp.any(jax.grad(losses)(head, 0.0))
    assert jnp.any(jax.grad(losses)(head, 0.5))


def test_suppressed_rows_are_in_no_policy_term():
    model = small_model(small_score_function())
    bytes = text_bytes(2, 12)
    everywhere = jnp.ones((2, 12), bool)
    boundaries = predict(model, bytes, actions=(everywhere,), capacities=(5,)).levels[0].boundaries
    np.testing.assert_array_equal(jnp.sum(boundaries.actions, axis=1), [5, 5])
    np.testing.assert_array_equal(boundaries.decided[0], [False] + [True] * 4 + [False] * 7)


def test_the_policy_remembers_exactly_its_window():
    router = policy_of(small_model(small_score_function(window=2)))
    layout = plain_layout(text_bytes(1, 8))
    hidden = jax.random.normal(jax.random.key(0), (1, 8, 16))

    def logits(actions):
        return router(hidden, layout, SamplingOptions(boundary_scan, actions=actions)).logits[0]

    base = jnp.zeros((1, 8), bool)
    changed = logits(base.at[0, 3].set(True)) != logits(base)
    np.testing.assert_array_equal(np.flatnonzero(changed), [4, 5])
