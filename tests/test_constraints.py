"""Constraints: against loops over the text, exact answers over every boundary string, and what commands make of them."""

import dataclasses
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from estimators import (
    BatchCentre,
    Bernoulli,
    EarlyExit,
    ObjectiveInputs,
    RatioObjective,
    SamplingOptions,
    ScoreFunctionObjective,
    Uniform,
    UniformRouter,
    WindowedPolicy,
    update_state,
)
from estimators import equations as eq
from estimators.base import Limits
from estimators.constraints import Constrained, MaxLength, MinLength, WholeCharacters, constrained
from estimators.equations import NEVER
from estimators.routers.rules import bytes_missing
from experiments.config.build import build_byte_model
from experiments.config.errors import ConfigError
from experiments.config.files import from_json, to_json
from experiments.run import parse
from experiments.training.capacity import constrained_capacities
from tests.compositions import registered, under
from tests.conftest import losses, predict, text_bytes
from unet import Chunker, Distribute, Select, UNet
from unet.decoding.kv_cache import with_room
from unet.files.saving import load, save
from unet.hnet import HNetConfig
from unet.likelihood import continues, plain_layout
from unet.ops import boundary_scan

TEXT = "\N{CJK UNIFIED IDEOGRAPH-6F22}a \N{LATIN SMALL LETTER E WITH ACUTE}bc\N{GRINNING FACE}d"
ALL = (WholeCharacters(), MaxLength(4), MinLength(2))


def layout_of(*texts):
    """One document a row, behind BOS, padded."""
    encoded = [bytes([254]) + (one.encode() if isinstance(one, str) else one) for one in texts]
    length = max(map(len, encoded))
    rows = np.stack([np.frombuffer(one.ljust(length, b"\0"), np.uint8) for one in encoded]).astype(np.int32)
    mask = np.arange(length) < np.array([len(one) for one in encoded])[:, None]
    return plain_layout(jnp.asarray(rows), None, jnp.asarray(mask))


def held(actions, least, most, starts):
    """Forced and forbidden positions of one row, by a loop."""
    size, forced, forbidden = 0, [], []
    for place, action in enumerate(actions):
        size = 1 if starts[place] else size + 1
        forbidden.append(size < least[place] and not starts[place])
        forced.append(size >= max(most[place], least[place]) and not starts[place])
        size = 0 if action else size
    return np.array(forced), np.array(forbidden)


def test_sizes_of_chunks_by_hand():
    actions = jnp.asarray([[1, 0, 0, 1, 1, 0, 0, 0]], bool)
    starts = jnp.asarray([[1, 0, 0, 0, 0, 0, 1, 0]], bool)
    np.testing.assert_array_equal(eq.chunk_sizes(actions, starts)[0], [1, 1, 2, 3, 1, 1, 1, 2])
    none = jnp.zeros((2, 3), bool)
    np.testing.assert_array_equal(eq.chunk_sizes(none, none, jnp.asarray([0, 5])), [[1, 2, 3], [6, 7, 8]])


def test_rates_of_limited_chunks_are_those_of_their_mean_length():
    rate, longest, shortest = 0.3, 4, 3
    lengths = np.arange(1, 200)
    geometric = rate * (1 - rate) ** (lengths - 1)
    cut = float(np.sum(geometric * np.minimum(lengths, longest)))
    assert eq.rate_with_longest(rate, longest) == pytest.approx(1 / cut)
    assert eq.rate_with_shortest(rate, shortest) == pytest.approx(1 / np.sum(geometric * (lengths + shortest - 1)))
    assert eq.rate_with_longest(1.0, longest) == 1.0


def test_bytes_missing_says_where_characters_end_and_what_is_none():
    missing = np.asarray(bytes_missing(layout_of(TEXT)))[0, 1:]
    ends = np.cumsum([len(one.encode()) for one in TEXT]) - 1
    np.testing.assert_array_equal(np.flatnonzero(missing == 0), ends)
    # A continuation byte of nothing, one too many, and a character cut short.
    np.testing.assert_array_equal(bytes_missing(layout_of(b"\x80\xc3\xa9\x80\xe6a"))[0], [0, -1, 1, 0, -1, 2, 0])


def test_characters_leave_free_what_is_no_utf8():
    limits = WholeCharacters().limits(layout_of(b"\x80\x80\xe6a\xf0\x9f"))
    np.testing.assert_array_equal(limits.possible[0], [True, True, True, False, True, False, False])


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_the_scan_keeps_limits_on_sizes(window, implementation):
    rng, shape = np.random.default_rng(3), (3, 21)
    projections = jnp.asarray(rng.normal(size=(*shape, window + 1)), jnp.float32)
    uniforms = jnp.asarray(rng.random(shape), jnp.float32)
    starts = jnp.zeros(shape, bool).at[:2, 0].set(True).at[1, 7].set(True)
    least, most = rng.integers(1, 4, shape), rng.integers(3, 6, shape)
    least[:, 12], most[:, 5] = NEVER, 1
    limits = Limits(jnp.asarray(least, jnp.int32), jnp.asarray(most, jnp.int32), True, jnp.asarray([0, 0, 4]))
    drawn = boundary_scan(projections, uniforms, starts, 2.0, limits, implementation=implementation)
    logits = eq.soft_cap(eq.windowed_logits(projections, drawn.actions, starts), 2.0)
    np.testing.assert_allclose(drawn.logits, logits, rtol=1e-5, atol=1e-5)
    for row, opened in enumerate((0, 0, 4)):
        # An open chunk of 4 is a document that began 4 positions earlier.
        fill = np.zeros(opened, int)
        actions = np.concatenate([fill, np.asarray(drawn.actions)[row]])
        lowest, highest = (np.concatenate([fill + 1, one[row]]) for one in (least, most))
        began = np.concatenate([fill, np.asarray(starts)[row]])
        forced, forbidden = (one[opened:] for one in held(actions, lowest, highest, began))
        own = np.asarray(uniforms)[row] < jax.nn.sigmoid(logits[row])
        expected = np.where(forbidden, False, forced | own) | np.asarray(starts)[row]
        np.testing.assert_array_equal(np.asarray(drawn.actions)[row], expected)
        assert forced.any()
        assert forbidden.any()


def test_uniform_boundaries_are_exactly_their_share_of_the_characters():
    layout = layout_of("\N{CJK UNIFIED IDEOGRAPH-6F22}" * 19 + "a")
    router = Constrained(UniformRouter(0.25), (WholeCharacters(),))
    drawn = router(jnp.zeros((1, 59, 1)), layout, SamplingOptions(boundary_scan, jax.random.key(0)))
    # BOS and 20 characters.
    assert int(jnp.sum(drawn.actions)) == round(0.25 * 21)
    np.testing.assert_array_equal(
        np.asarray(drawn.actions)[0] & ~np.asarray(WholeCharacters().limits(layout).possible)[0], 0
    )


# Exact answers.


DIM = 3


def policy():
    router = WindowedPolicy(DIM, window=2, target_rate=0.4, scale=1.0)
    return eqx.tree_at(lambda r: r.weight, router, jax.random.normal(jax.random.key(1), (3, DIM)))


@pytest.fixture(scope="module")
def enumerated():
    """Two sequences, every pair of boundary strings, and the worth of each prediction for each history."""
    layout, rng = layout_of("a\N{LATIN SMALL LETTER E WITH ACUTE}bcde", "abcdef"), np.random.default_rng(0)
    length, starts, mask = layout.mask.shape[1], np.asarray(layout.starts), np.asarray(layout.mask)
    hidden = jnp.asarray(rng.normal(size=(2, length, DIM)), jnp.float32)
    strings = np.array([(True, *rest) for rest in itertools.product([False, True], repeat=length - 1)])
    limits = Constrained(policy(), ALL).limits(layout)
    bounds = np.asarray(limits.least), np.asarray(limits.most)
    valid, free = [], []
    for row in range(2):
        found = [held(string, bounds[0][row], bounds[1][row], starts[row]) for string in strings]
        kept = [
            number
            for number, (forced, forbidden) in enumerate(found)
            if not (strings[number] & (forbidden | ~mask[row])).any() and strings[number][forced & mask[row]].all()
        ]
        valid.append(strings[kept])
        free.append(np.array([mask[row] & ~(found[number][0] | found[number][1] | starts[row]) for number in kept]))
    assert 5 < len(valid[0]) < len(strings) / 4
    code = [np.cumsum(one * 2 ** np.arange(length), axis=1) for one in valid]
    worth, early = rng.normal(-5, 1, (2, length, 2**length)), rng.normal(-5, 1, (2, length))
    log_prob = [worth[row][np.arange(length), code[row]] for row in range(2)]
    return layout, hidden, valid, free, log_prob, early


def exact_loss(weight, enumerated):
    """The expected loss per position that could be free, a sum over strings: probabilities are products over free positions."""
    layout, hidden, valid, free, log_prob, _ = enumerated
    possible = np.asarray(WholeCharacters().limits(layout).possible & layout.free)
    total, scored = 0.0, np.asarray(continues(layout))
    for row in range(2):
        actions = jnp.asarray(valid[row])
        raw = (
            jnp.broadcast_to(hidden[row] @ weight.T, (len(actions), *hidden.shape[1:2], 3))
            .at[..., 0]
            .add(eq.logit(0.4))
        )
        began = jnp.broadcast_to(layout.starts[row], actions.shape)
        logits = eq.soft_cap(eq.windowed_logits(raw, actions, began), 6.0)
        probability = jnp.exp(jnp.sum(eq.action_log_prob(logits, actions), axis=1, where=jnp.asarray(free[row])))
        total += jnp.sum(probability * jnp.sum(jnp.asarray(log_prob[row]), axis=1, where=jnp.asarray(scored[row])))
    return -total / float(np.sum(possible))


@pytest.mark.parametrize("reductions", [(), (EarlyExit(), BatchCentre(leave_one_out=True))])
def test_the_expected_policy_gradient_is_the_exact_gradient_over_free_decisions(enumerated, reductions):
    layout, hidden, valid, free, log_prob, early = enumerated
    scored = continues(layout)
    pairs = list(itertools.product(range(len(valid[0])), range(len(valid[1]))))
    stacked = [jnp.asarray(np.stack([(one[0][a], one[1][b]) for a, b in pairs])) for one in (valid, free, log_prob)]

    def one(weight, actions, expected_free, log_prob):
        router = Constrained(eqx.tree_at(lambda r: r.weight, policy(), weight), ALL)
        drawn = router(hidden, layout, SamplingOptions(boundary_scan, actions=actions, training=True))
        inputs = ObjectiveInputs(drawn, hidden, log_prob, jnp.asarray(early, jnp.float32), scored, scored)
        loss = ScoreFunctionObjective(reductions, 0.4)(inputs).metrics["policy_loss"]
        chance = jnp.sum(eq.action_log_prob(drawn.logits, actions), where=drawn.decided)
        return loss, (jnp.exp(chance), jnp.all(drawn.decided == expected_free))

    weight = policy().weight
    each = jax.vmap(jax.grad(one, has_aux=True), (None, 0, 0, 0))
    gradients, (chance, same) = jax.jit(each)(weight, stacked[0], stacked[1], stacked[2].astype(jnp.float32))
    assert bool(jnp.all(same))
    assert float(jnp.sum(chance)) == pytest.approx(1.0, abs=1e-5)
    expected = jax.grad(exact_loss)(weight, enumerated)
    got = jnp.tensordot(chance, gradients, 1)
    np.testing.assert_allclose(got, expected, atol=1e-4 * float(jnp.max(jnp.abs(expected))))


def test_strings_are_drawn_with_the_probabilities_of_their_free_decisions(enumerated):
    layout, hidden, valid, _, _, _ = enumerated
    count = 4000
    rows = jnp.repeat(hidden[:1], count, axis=0)
    many = jax.tree.map(lambda one: jnp.repeat(one[:1], count, axis=0), layout)
    router = Constrained(policy(), ALL)
    drawn = router(rows, many, SamplingOptions(boundary_scan, jax.random.key(5)))
    states, few = jax.tree.map(lambda one: one[: len(valid[0])], (rows, many))
    given = router(states, few, SamplingOptions(boundary_scan, actions=jnp.asarray(valid[0])))
    log_prob = jnp.sum(eq.action_log_prob(given.logits, given.actions), axis=1, where=given.decided)
    seen = np.array([np.mean(np.all(np.asarray(drawn.actions) == one, axis=1)) for one in valid[0]])
    assert seen.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(seen, np.exp(log_prob), atol=4 * 0.5 / count**0.5)


# Losses and rates.


def test_rate_losses_and_the_controller_look_at_free_positions_alone():
    layout = layout_of("\N{CJK UNIFIED IDEOGRAPH-6F22}" * 8)
    router, hidden = Constrained(Bernoulli(0.25), (WholeCharacters(),)), jnp.zeros((1, 25, 1))
    drawn = router(hidden, layout, SamplingOptions(boundary_scan, jax.random.key(0)))
    assert int(jnp.sum(drawn.decided)) == 8
    scored = continues(layout)
    inputs = ObjectiveInputs(drawn, hidden, jnp.zeros((1, 25)), None, scored, scored)
    assert float(ScoreFunctionObjective((), 0.5)(inputs).metrics["rate_loss"]) == pytest.approx(0.25 * eq.logit(0.75))
    share = float(jnp.mean(drawn.actions[0, jnp.asarray([0, *range(3, 25, 3)])]))
    ratio = RatioObjective(0.5, 1.0)(inputs).loss
    assert float(ratio) == pytest.approx(2 * (share * 0.25 + (1 - share) * 0.75))


def test_the_controller_is_told_the_rate_of_free_positions():
    model = under(registered("sfe"), (WholeCharacters(), MaxLength(4)))
    bytes = jnp.broadcast_to(layout_of("\N{CJK UNIFIED IDEOGRAPH-6F22}a" * 6).bytes[:, :24], (2, 24))
    output = losses(model, bytes, key=jax.random.key(0))
    level = predict(model, bytes, key=jax.random.key(0), training=True).levels[0]
    assert level.boundaries.constrained is not None
    free = ~np.asarray(level.boundaries.constrained)
    assert float(output.free_rate) == pytest.approx(float(np.mean(np.asarray(level.drawn)[free])))
    assert float(output.free_rate) != pytest.approx(float(output.rate))
    plain = losses(registered("sfe"), bytes, key=jax.random.key(0))
    assert float(plain.free_rate) == float(plain.rate + plain.overflow)


def test_nothing_is_forgotten_of_a_chunk_that_was_open_when_the_capacity_ran_out():
    router = Constrained(Bernoulli(0.9), (MaxLength(3),))
    layout = plain_layout(text_bytes(1, 12))
    drawn = router(jnp.zeros((1, 12, 1)), layout, SamplingOptions(boundary_scan, jax.random.key(0)))
    kept = drawn.truncated(3)
    assert int(jnp.sum(kept.actions)) == 3
    last = int(np.flatnonzero(np.asarray(kept.actions)[0])[-1])
    assert not np.asarray(kept.decided)[0, last + 1 :].any()
    assert not np.asarray(kept.deciding)[0, last + 1 :].any()
    np.testing.assert_array_equal(np.asarray(kept.confidence)[np.asarray(kept.constrained)], 1.0)


# Commands.


def asked(*arguments):
    return parse(["--dataset", "stdlib", *map(str, arguments)])


def test_constraints_and_their_settings_are_flags_and_are_kept():
    config = asked("--constrain", "characters", "max-length", "--max-length.n", 12)
    model = build_byte_model(config, jax.random.key(0))
    router = model.stage.estimators[0].router
    assert isinstance(router, Constrained)
    assert router.constraints == (WholeCharacters(), MaxLength(12))
    assert from_json(to_json(config), "here") == config


def test_a_constrained_model_is_saved_and_comes_back(tmp_path):
    model = under(registered("sfe"), (*ALL,))
    save(model, tmp_path)
    back = load(tmp_path).model.unet
    router = back.stage.estimators[0].router
    assert isinstance(router, Constrained)
    assert router.constraints == ALL
    bytes = text_bytes(2, 24)
    np.testing.assert_array_equal(predict(model, bytes).logits, predict(back, bytes).logits)


def test_levels_inside_have_constraints_of_their_own_that_count_tokens():
    given = (
        "--model",
        "hnet-2stage-tiny",
        "--inner-constrain",
        "max-length",
        "--max-length.n",
        9,
        "--max-length.inner-n",
        2,
    )
    config = asked(*given)
    outer, inner = build_byte_model(config, jax.random.key(0)).stage.estimators
    assert not isinstance(outer.router, Constrained)
    assert isinstance(inner.router, Constrained)
    assert inner.router.constraints == (MaxLength(2),)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--constrain", "words"), "--constrain words: .*characters, max-length, min-length"),
        (
            ("--constrain", "max-length", "--max-length.n", 0),
            "max-length.n, which counts the bytes of a chunk, must be a whole number from 1 to 16777216; got 0",
        ),
        (("--constrain", "min-length", "--min-length.n", 10**15), "min-length.n, .* to 16777216; got 1000000000000000"),
        (
            ("--constrain", "max-length", "--max-length.n", 4, "--max-length.inner-n", 0),
            "max-length.inner-n, which counts the tokens of a chunk, must be a whole number from 1 to 16777216; got 0",
        ),
        (
            ("--constrain", "max-length", "min-length", "--max-length.n", 2, "--min-length.n", 3),
            "at most 2 and at least 3 bytes",
        ),
        (("--max-length.n", 3), "--max-length.n is a setting of --constrain max-length, which was not chosen"),
        (("--inner-constrain", "max-length", "--max-length.n", 3), "no level of tokens inside its first"),
        (("--estimator", "isotropic", "--isotropic.no-token-level", "--constrain", "characters"), "no level of tokens"),
        (
            ("--model", "hnet-2stage-tiny", "--inner-constrain", "characters"),
            "--inner-constrain characters reads bytes, not tokens",
        ),
    ],
)
def test_impossible_constraints_are_one_sentence(arguments, sentence):
    with pytest.raises(ConfigError, match=sentence):
        asked(*arguments)


def test_capacities_follow_from_the_boundaries_that_constraints_leave():
    config = dataclasses.replace(asked("--length", 64), rate=0.6)
    layout = layout_of(*["\N{CJK UNIFIED IDEOGRAPH-6F22}" * 21] * 8)
    characters = Constrained(WindowedPolicy(4, target_rate=0.6), (WholeCharacters(),))
    # 0.6 of 21 characters and BOS.
    assert 14 <= constrained_capacities(config, characters, layout)[-1] <= 32
    short = Constrained(WindowedPolicy(4, target_rate=0.6), (MaxLength(1),))
    assert constrained_capacities(config, short, layout)[-1] == 64
    assert short.rate == 1.0


def test_every_level_of_a_hierarchy_keeps_its_limits_in_one_pass_and_in_parts():
    shape = HNetConfig('["",["",["t1"],""],""]', (16,) * 3, (0,) * 3, (2,) * 3, (4,) * 3, (4, 4, 0))
    levels = (
        constrained(
            Uniform(chunker=Chunker(Select(), Distribute()), target_rate=0.6), (WholeCharacters(), MinLength(2))
        ),
        constrained(Uniform(chunker=Chunker(Select(), Distribute()), target_rate=0.2), (MaxLength(3),)),
    )
    model = UNet(shape, levels, key=jax.random.key(0))
    bytes, keys = layout_of(2 * TEXT, 2 * TEXT[::-1]).bytes, jax.random.split(jax.random.key(1), 2)
    whole = predict(model, bytes, key=keys)
    outer, inner = (np.asarray(level.boundaries.actions) for level in whole.levels)
    possible = np.asarray(WholeCharacters().limits(plain_layout(bytes)).possible)
    assert not (outer & ~possible).any()
    tokens = outer.sum(axis=1)
    for row in range(2):
        assert (np.diff(np.flatnonzero(outer[row])) >= np.array([1] + [2] * (tokens[row] - 2))).all()
        gaps = np.diff(np.flatnonzero(inner[row, : tokens[row]]))
        assert gaps.max() == 3
    state, parts = model.init_state(2, keys), []
    for first, last in ((0, 11), (11, bytes.shape[1])):
        decoded = decode(model, bytes[:, first:last], state)
        state = update_state(state, decoded.update, jnp.full((2,), last - first, jnp.int32))
        state = with_room(state, bytes.shape[1])
        parts.append(decoded.prediction.logits)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole.logits, atol=1e-4)


@eqx.filter_jit
def decode(model, bytes, state):
    return model.decode(bytes, state)
