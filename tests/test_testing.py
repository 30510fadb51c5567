"""Estimators, chunkers and reductions that are broken in one way each, and the sentence that says so."""

import dataclasses
import re
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from estimators import (
    AbstractChunker,
    AbstractConstraint,
    AbstractPositionwiseRouter,
    AbstractReduction,
    AbstractRouter,
    BatchCentre,
    Boundaries,
    Constrained,
    Critic,
    Discount,
    EarlyExit,
    Estimator,
    GeneralisedAdvantage,
    ImportanceWeight,
    Limits,
    MaxLength,
    MinLength,
    NoObjective,
    RuleRouter,
    SampleCentre,
    ScoreFunctionObjective,
    Spacelike,
)
from estimators.base import Routed
from estimators.equations import NEVER, discounted_returns, windowed_logits
from estimators.settings import EstimatorConfig
from estimators.testing import (
    CHECKS,
    ContractError,
    Setup,
    check_batch,
    check_boundaries,
    check_causality,
    check_causality_of_gradients,
    check_chunker,
    check_chunking,
    check_constraints,
    check_decoding,
    check_estimator,
    check_extremes,
    check_gradients,
    check_packing,
    check_reduction,
    check_saving,
    check_shapes,
)
from unet import AttentionPool, Chunker, Distribute, Select, Smooth, UNet, UNetConfig

DIM = 8
SELECT = Chunker(Select(), Distribute())
TRAINED = ScoreFunctionObjective((Discount(0.9),), 0.3)


def drawn(logits, layout, options):
    return Boundaries(
        options.bernoulli(jax.nn.sigmoid(logits), layout), logits, jax.nn.sigmoid(logits), layout.free, layout.starts
    )


class Linear(AbstractPositionwiseRouter):
    """Log-odds that are linear in the state, and a fault."""

    weight: jax.Array
    fault: Callable = eqx.field(static=True)

    @property
    def rate(self):
        return 0.3

    def boundaries(self, hidden, layout, options):
        return self.fault(hidden.astype(jnp.float32) @ self.weight, layout, options, hidden)


class Falling(AbstractRouter):
    """A boundary where the state is below the one before, which decoding forgets."""

    @property
    def rate(self):
        return 0.5

    def init_state(self, batch):
        return jnp.zeros((batch, 1), jnp.float32)

    def route(self, hidden, layout, options, state=None):
        here = hidden[..., 0].astype(jnp.float32)
        before = jnp.pad(here[:, :-1], ((0, 0), (1, 0)))
        logits = jnp.where(layout.starts, 0.0, before - here)
        return Routed(drawn(logits, layout, options), state)


def good(logits, layout, options, hidden):
    return drawn(logits, layout, options)


def ahead(logits, layout, options, hidden):
    return drawn(jnp.roll(logits, -1, axis=1), layout, options)


def ahead_by_gradient(logits, layout, options, hidden):
    following = jnp.roll(logits, -1, axis=1)
    return drawn(logits + (following - jax.lax.stop_gradient(following)), layout, options)


def among_the_batch(logits, layout, options, hidden):
    return drawn(logits - logits.mean(axis=0), layout, options)


def through_documents(logits, layout, options, hidden):
    return drawn(jnp.cumsum(logits, axis=1), layout, options)


def of_its_own_action(logits, layout, options, hidden):
    found = drawn(logits, layout, options)
    return drawn(
        logits + found.actions.astype(jnp.float32), layout, dataclasses.replace(options, actions=found.actions)
    )


def changed(field, change):
    """A fault in one field, made so that no check of types at construction finds it first."""

    def fault(logits, layout, options, hidden):
        found = drawn(logits, layout, options)
        return eqx.tree_at(lambda one: getattr(one, field), found, change(getattr(found, field), layout))

    return fault


def deaf(logits, layout, options, hidden):
    return drawn(logits, layout, dataclasses.replace(options, actions=None))


def never_above_half(logits, layout, options, hidden):
    found = drawn(logits, layout, options)
    return (
        found
        if options.key is not None or options.actions is not None
        else dataclasses.replace(found, actions=layout.starts)
    )


def of_length(logits, layout, options, hidden):
    length = jnp.sqrt(jnp.sum(hidden.astype(jnp.float32) ** 2, axis=-1))
    return drawn(logits - length + 2.0, layout, options)


def learned(fault, objective=TRAINED, chunker=SELECT):
    weight = jax.random.normal(jax.random.key(0), (DIM,), jnp.float32)
    return Estimator(Linear(weight, fault), chunker, objective)


FAULTS = {
    "looks ahead": (learned(ahead), check_causality, "up to it only. Other bytes from position 1 on moved"),
    "looks ahead by gradient": (
        learned(ahead_by_gradient),
        check_causality_of_gradients,
        "to a later one, .* From pos",
    ),
    "reads its own action": (learned(of_its_own_action), check_causality, "actions before it only. Another action at"),
    "mixes the batch": (learned(among_the_batch), check_batch, "Rows of a batch do not depend on each other. The"),
    "reads other documents": (learned(through_documents), check_packing, "packed into one row do not depend on each"),
    "forgets": (Estimator(Falling(), SELECT, NoObjective()), check_decoding, "what one pass over the text gives. The"),
    "integer actions": (
        learned(changed("actions", lambda a, layout: a.astype(jnp.int32))),
        check_shapes,
        r"Its actions from bfloat16 states are int32 \(3, 24\), not bool \(3, 24\)",
    ),
    "too few actions": (
        learned(changed("actions", lambda a, layout: a[:, 1:])),
        check_shapes,
        r"are bool \(3, 23\), not bool \(3, 24\)",
    ),
    "half precision": (
        learned(changed("probs", lambda p, layout: p.astype(jnp.bfloat16))),
        check_shapes,
        "float32 others. Its probs",
    ),
    "probabilities above 1": (
        learned(changed("probs", lambda p, layout: p + 1)),
        check_boundaries,
        "between 0 and 1. One does not in training in row 0",
    ),
    "another probability": (learned(changed("probs", lambda p, layout: p / 2)), check_boundaries, "sigmoid of the log"),
    "boundaries on padding": (
        learned(changed("actions", lambda a, layout: a | ~layout.mask)),
        check_boundaries,
        "No boundary stands on padding. There is one in training in row 2 at position 15",
    ),
    "no boundary at a start": (
        learned(changed("actions", lambda a, layout: a & ~layout.starts)),
        check_boundaries,
        "forced where a document starts. There is none in training in row 0 at position 0",
    ),
    "decides everywhere": (
        learned(changed("decided", lambda d, layout: layout.mask)),
        check_boundaries,
        "Nothing is `decided` on padding or where",
    ),
    "deaf to given actions": (learned(deaf), check_boundaries, "Given actions are taken as they are"),
    "never above one half": (learned(never_above_half), check_boundaries, "Without a key a boundary is drawn exactly"),
    "no name": (
        Estimator(RuleRouter(lambda layout: layout.mask, 0), SELECT, NoObjective()),
        check_saving,
        "named functions, and comes back the same. Here model.*rule is a function, which cannot be saved",
    ),
    "no gradient": (
        learned(good, NoObjective()),
        check_gradients,
        r"model.stage.estimator.router.weight gets no gradient: freeze it, or",
    ),
    "no number": (learned(of_length), check_extremes, "With states that are zero, that of hidden states is not"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_of_an_estimator_is_told_in_its_own_sentence(name):
    estimator, check, sentence = FAULTS[name]
    with pytest.raises(ContractError, match=sentence):
        check(estimator, Setup(dim=DIM))


@dataclasses.dataclass(frozen=True)
class LinearConfig(EstimatorConfig):
    """Settings, as those of anybody's estimator."""

    fault: Callable = good

    def build(self, context):
        weight = jnp.zeros(context.dim)
        return Estimator(Linear(weight, self.fault), context.chunker, TRAINED)


def test_settings_a_function_and_a_model_are_checked_alike():
    def made(dim, key):
        return Estimator(Linear(jnp.zeros(dim), good), SELECT, TRAINED)

    check_estimator(LinearConfig(), dim=DIM)
    for subject in (made, made(DIM, None)):
        check_boundaries(subject, Setup(dim=DIM))
    with pytest.raises(ContractError, match="up to it only"):
        check_estimator(LinearConfig(ahead), dim=DIM)
    model = UNet(UNetConfig(DIM, 2, 1, 1, 1, window=4), learned(ahead), key=jax.random.key(0))
    with pytest.raises(ContractError, match="up to it only"):
        check_causality(model)


def test_what_is_no_estimator_is_refused():
    with pytest.raises(TypeError, match="must be or build an AbstractEstimator; got a Select"):
        check_estimator(lambda dim, key: Select(), dim=DIM)  # pyrefly: ignore[bad-argument-type]: that is refused
    with pytest.raises(TypeError, match="no token level"):
        check_shapes(UNet(UNetConfig(DIM, 2, 1, 1, 1), None, key=jax.random.key(0)))


def test_nothing_is_called_decoding_where_no_boundary_was_drawn():
    estimator = Spacelike(chunker=SELECT)
    with pytest.raises(ContractError, match=r"no boundary was drawn in the text\. Give a text"):
        check_decoding(estimator, Setup(dim=DIM, text="abcdefgh" * 5))
    with pytest.raises(ValueError, match="at least 24 bytes; got 2"):
        check_decoding(estimator, Setup(dim=DIM, text="so"))


def test_every_public_check_is_among_those_of_an_estimator():
    import estimators.testing as contract

    named = {name for name in contract.__all__ if name.startswith("check_")}
    assert named - {check.__name__ for check in CHECKS} == {
        "check_estimator",
        "check_chunker",
        "check_constraint",
        "check_reduction",
    }
    assert all(check.__doc__ for check in CHECKS)


class Alternating(AbstractRouter):
    """Log-odds that fall after a boundary, drawn without regard to `options.limits`, or with it."""

    weight: jax.Array
    heeds: bool = eqx.field(static=True)

    @property
    def rate(self):
        return 0.3

    def init_state(self, batch):
        return None

    def route(self, hidden, layout, options, state=None):
        own = hidden.astype(jnp.float32) @ self.weight
        projections, actions = jnp.stack([own, jnp.full_like(own, -2.0)], axis=-1), options.actions
        if actions is None:
            limits = options.limits if self.heeds else None
            actions = options.sampler(projections, options.uniforms(layout), layout.starts, None, limits).actions
        actions = (actions | layout.starts) & layout.mask
        logits = windowed_logits(projections, actions, layout.starts)
        return Routed(Boundaries(actions, logits, jax.nn.sigmoid(logits), layout.free, layout.starts), None)


class Spoiled(AbstractRouter):
    """A constrained router, and what somebody makes of its boundaries."""

    router: Constrained
    fault: Callable = eqx.field(static=True)

    @property
    def rate(self):
        return self.router.rate

    def init_state(self, batch):
        return self.router.init_state(batch)

    def route(self, hidden, layout, options, state=None):
        routed = self.router.route(hidden, layout, options, state)
        return dataclasses.replace(routed, boundaries=self.fault(routed.boundaries, layout))


class Odd(AbstractConstraint):
    """No boundary after a space, and a fault."""

    fault: Callable = eqx.field(static=True)
    sized: bool = eqx.field(static=True, default=False)

    def limits(self, layout):
        least = jnp.where(self.fault(layout) == 32, NEVER, 1)
        return Limits(least, jnp.full_like(least, NEVER), self.sized)


def before(layout):
    return jnp.pad(layout.bytes, ((0, 0), (1, 0)))[:, :-1]


class Slow(AbstractConstraint):
    """Sizes that are said not to be."""

    def limits(self, layout):
        return Limits(jnp.full_like(layout.bytes, 2), jnp.full_like(layout.bytes, 9), False)


CONSTRAINED = {
    "looks ahead": (
        Odd(lambda layout: jnp.roll(layout.bytes, -1, axis=1)),
        "Limits depend on the byte at the position",
    ),
    "looks back too far": (Odd(before), "the 0 before it in its document .* only. Another byte"),
    "says it has no sizes": (Slow(), "Limits that are not `sized` are 1 or NEVER. One of Slow is"),
    "of another kind": (
        Odd(lambda layout: layout.bytes[:, 1:]),
        r"int32 arrays, rows x positions. The least of Odd is",
    ),
}


@pytest.mark.parametrize("name", CONSTRAINED)
def test_every_fault_of_a_constraint_is_told_in_its_own_sentence(name):
    constraint, sentence = CONSTRAINED[name]
    with pytest.raises(ContractError, match=sentence):
        check_constraints(learned(good), Setup(dim=DIM, constraints=(constraint,)))


def test_a_good_constraint_is_found_good():
    check_constraints(learned(good), Setup(dim=DIM, constraints=(Odd(lambda layout: layout.bytes),)))


def test_a_router_that_forgets_limits_while_it_remembers_actions_is_found():
    weight = jax.random.normal(jax.random.key(0), (DIM,), jnp.float32)
    check_constraints(Estimator(Alternating(weight, True), SELECT, TRAINED), Setup(dim=DIM))
    with pytest.raises(
        ContractError, match="after constraints: a router whose log-odds depend on earlier actions draws with"
    ):
        check_constraints(Estimator(Alternating(weight, False), SELECT, TRAINED), Setup(dim=DIM))


BROKEN = {
    "draws where it is forbidden": (
        lambda found, layout: eqx.tree_at(lambda one: one.actions, found, layout.mask),
        "No boundary stands where a constraint forbids it. One does in training",
    ),
    "draws none where it is forced": (
        lambda found, layout: eqx.tree_at(lambda one: one.actions, found, layout.starts),
        "A boundary stands wherever a constraint forces it. None does in training",
    ),
    "decides what was forced": (
        lambda found, layout: eqx.tree_at(lambda one: one.decided, found, layout.free),
        "Nothing is `decided` where a constraint did it. It is in training",
    ),
    "is not sure": (
        lambda found, layout: eqx.tree_at(lambda one: one.probs, found, jnp.full_like(found.probs, 0.5)),
        "What a constraint did is certain: its probability is 0 or 1. It is not in training",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_constraint_that_is_broken_on_the_way_is_found(name):
    fault, sentence = BROKEN[name]
    weight = jax.random.normal(jax.random.key(0), (DIM,), jnp.float32)
    limited = Constrained(Linear(weight, good), (MaxLength(4), MinLength(2)))
    with pytest.raises(ContractError, match=sentence):
        check_constraints(Estimator(Spoiled(limited, fault), SELECT, TRAINED), Setup(dim=DIM))


class Faulty(AbstractChunker):
    """Select and distribute, and a fault."""

    inner: Chunker
    tokens: Callable = eqx.field(static=True)
    back: Callable = eqx.field(static=True)
    forgets: bool = eqx.field(static=True, default=False)

    def init_state(self, batch, dim):
        return self.inner.init_state(batch, dim)

    def down(self, hidden, boundaries, *, capacity, mask=None, state=None):
        found = self.inner.down(hidden, boundaries, capacity=capacity, mask=mask, state=state)
        return dataclasses.replace(found, tokens=self.tokens(found.tokens))

    def up(self, outputs, tokens, hidden, boundaries, *, state=None):
        kept = jnp.zeros_like(state) if self.forgets and state is not None else state
        found = self.inner.up(outputs, tokens, hidden, boundaries, state=kept)
        return dataclasses.replace(found, hidden=self.back(found.hidden))


def same(value):
    return value


def of_tokens(**changes):
    return lambda tokens: dataclasses.replace(
        tokens, **{name: change(getattr(tokens, name)) for name, change in changes.items()}
    )


CHUNKERS = {
    "drops": (
        of_tokens(lengths=lambda n: n - 1),
        same,
        "Every boundary becomes a token, .* Of .* boundaries with room",
    ),
    "miscounts": (
        of_tokens(overflow=jnp.zeros_like),
        same,
        "those beyond it are counted as overflow. Of .* room for 3",
    ),
    "misplaces": (of_tokens(positions=lambda p: p + 1), same, "The position of a token is that of its boundary"),
    "leaves padding": (of_tokens(values=lambda v: v + 1), same, "Tokens that are not there are zero"),
    "widens": (same, lambda h: h.astype(jnp.float32), "the dtype of the positions. From bfloat16"),
    "looks ahead": (same, lambda h: h + jnp.roll(h, -1, axis=1), "Other states from 1 on moved it"),
    "looks ahead by gradient": (
        same,
        lambda h: h + (jnp.roll(h, -1, axis=1) - jax.lax.stop_gradient(jnp.roll(h, -1, axis=1))),
        "The gradient of position 0 in row 0 reached one in row 0 at position 1",
    ),
    "mixes the batch": (same, lambda h: h + h.mean(axis=0), "The gradient of position 0 in row 0 reached one in row 1"),
}


@pytest.mark.parametrize("name", CHUNKERS)
def test_every_fault_of_a_chunker_is_told_in_its_own_sentence(name):
    tokens, back, sentence = CHUNKERS[name]
    with pytest.raises(ContractError, match=sentence):
        check_chunker(Faulty(SELECT, tokens, back), dim=4)


def test_a_chunker_that_forgets_is_found_alone_and_in_an_estimator():
    chunker = Faulty(SELECT, same, same, forgets=True)
    with pytest.raises(ContractError, match="Pieces of a text, with the decode state, come up as the whole text does"):
        check_chunker(chunker, dim=4)
    with pytest.raises(ContractError, match="Pieces of a text"):
        check_chunking(learned(good, chunker=chunker), Setup(dim=DIM))


def test_a_chunker_of_the_house_keeps_its_contract():
    """One with a cache for its decode state; others are checked with their estimators."""
    check_chunker(Chunker(AttentionPool(4, 2, key=jax.random.key(0)), Smooth()), dim=4)


class Step(AbstractReduction):
    """Discounted returns, and a fault."""

    fault: Callable = eqx.field(static=True)
    weight: jax.Array | None = None

    @property
    def needs_early_exit(self):
        return False

    def __call__(self, credit, inputs):
        return self.fault(credit, inputs)


REDUCTIONS = {
    "reads the past": (
        lambda c, i: dataclasses.replace(c, returns=jnp.cumsum(c.rewards, axis=1)),
        "depends on no reward before it",
    ),
    "reads other documents": (
        lambda c, i: dataclasses.replace(c, returns=discounted_returns(c.rewards, 0.9, jnp.ones_like(i.continues))),
        "depends on no other document of its row. Rewards of the document behind it moved that",
    ),
    "loses losses": (
        lambda c, i: dataclasses.replace(c, loss=jnp.zeros(())),
        "adds its loss to that of the steps before",
    ),
    "loses weights": (lambda c, i: dataclasses.replace(c, weights=None), "keeps the importance weights"),
    "half precision": (
        lambda c, i: dataclasses.replace(c, returns=c.rewards.astype(jnp.bfloat16)),
        "are finite float32.* returns: bfloat16",
    ),
    "no number": (lambda c, i: dataclasses.replace(c, returns=jnp.log(c.rewards)), "finite float32.* returns are not"),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_every_fault_of_a_reduction_is_told_in_its_own_sentence(name):
    fault, sentence = REDUCTIONS[name]
    with pytest.raises(ContractError, match=sentence):
        check_reduction(Step(fault), dim=4)


def test_a_reduction_trains_its_parameters():
    step = Step(lambda credit, inputs: credit, jnp.zeros(3))
    with pytest.raises(ContractError, match=re.escape("by its own loss. .weight gets no gradient")):
        check_reduction(step, dim=4)


@pytest.mark.parametrize(
    "step",
    [EarlyExit(), Discount(), BatchCentre(), SampleCentre(), Critic(4), GeneralisedAdvantage(4), ImportanceWeight()],
    ids=lambda step: type(step).__name__,
)
def test_reductions_of_the_house_keep_their_contract(step):
    check_reduction(step, dim=4, samples=2)
