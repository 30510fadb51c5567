"""Tokens made of all rows that their boundaries close: closed forms, what reaches them, and row by row."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from estimators import Boundaries
from experiments.config.build import require_fit
from experiments.config.errors import ConfigError
from tests.compositions import LENGTH, config_of, lively, registered
from tests.conftest import losses, predict, small_score_function, text_bytes
from tests.test_decoding import KEYS, check_in_pieces
from unet import (
    AttentionPool,
    AveragePool,
    Chunker,
    HNetConfig,
    LeaveToDecoder,
    MaxPool,
    Select,
    UNet,
    UNetConfig,
    WithBoundary,
)
from unet.blocks import Attending, Stack, attending, transformer
from unet.cross import visible_tokens
from unet.likelihood import plain_layout
from unet.ops import token_of

DIM = 8
ACTIONS = jnp.asarray(
    [[1, 0, 0, 1, 0, 1, 0, 0, 0, 1], [1, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 0, 1, 0, 0, 1, 0, 0, 1, 1]], bool
)
# The second and the third sequence hold two documents, whose second start at rows 8 and 5.
STARTS = jnp.zeros((3, 10), bool).at[:, 0].set(True).at[1, 8].set(True).at[2, 5].set(True)
GROUPS = ([[0], [1, 2, 3], [4, 5], [6, 7, 8, 9]], [[0], [1], [8]], [[0], [1, 2], [5], [6, 7, 8], [9]])


def boundaries(actions=ACTIONS, starts=STARTS):
    probs = jnp.full(actions.shape, 0.5)
    return Boundaries(actions, jnp.zeros(actions.shape), probs, ~starts, starts)


@pytest.fixture(scope="module")
def hidden():
    return jax.random.normal(jax.random.key(0), (3, 10, DIM))


def by_hand(pool, rows):
    """What a pool makes of the rows of one group."""
    if isinstance(pool, WithBoundary):
        return by_hand(pool.pool, rows) + rows[-1]
    if isinstance(pool, MaxPool):
        return rows.max(axis=0)
    if isinstance(pool, AveragePool):
        return rows.mean(axis=0)
    queries = pool.unfold(rows.max(axis=0)).reshape(-1, DIM)
    return jnp.concatenate([crossed(pool.cross, query, rows) for query in queries])


def normed(norm, rows):
    return rows / jnp.sqrt(jnp.mean(rows**2, axis=-1, keepdims=True) + 1e-5) * norm.weight


def crossed(cross, x, rows):
    """What BLT's cross-attention makes of one query and the rows it sees."""
    query = (normed(cross.before_query, x) @ cross.query.weight).reshape(cross.heads, -1)
    made = normed(cross.before_key_value, rows) @ cross.key_value.weight
    keys, values = (part.reshape(len(rows), cross.heads, -1) for part in jnp.split(made, 2, axis=-1))
    weights = jax.nn.softmax(jnp.einsum("hd,rhd->hr", query, keys) / keys.shape[-1] ** 0.5, axis=-1)
    return 2 * x + jnp.einsum("hr,rhd->hd", weights, values).ravel() @ cross.out.weight


# Norms that do something.
SINGLE, WIDE = (lively(AttentionPool(DIM, 2, vectors=n, key=jax.random.key(5))) for n in (1, 3))
POOLS = [MaxPool(), AveragePool(), WIDE, WithBoundary(MaxPool()), WithBoundary(SINGLE)]
NAMES = ["max", "mean", "attention", "max+last", "attention+last"]


@pytest.mark.parametrize("pool", POOLS, ids=NAMES)
@pytest.mark.parametrize("capacity", [3, 6])
def test_tokens_are_made_of_the_rows_that_their_boundary_closes(hidden, pool, capacity):
    rows = jax.jit(lambda h: pool(h, boundaries(), capacity=capacity).tokens)(hidden)
    for sequence, groups in enumerate(GROUPS):
        assert int(rows.lengths[sequence]) == min(len(groups), capacity)
        for token, group in enumerate(groups[:capacity]):
            expected = by_hand(pool, hidden[sequence, jnp.asarray(group)])
            np.testing.assert_allclose(rows.values[sequence, token], expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(rows.values[sequence, len(groups) :], 0.0)


@pytest.mark.parametrize("pool", POOLS, ids=NAMES)
def test_groups_are_determined_once(hidden, pool):
    """The only cumulative minimum is the one that finds the boundary which closes each position."""
    program = jax.make_jaxpr(lambda h: pool(h, boundaries(), capacity=6).tokens)(hidden)
    assert str(program).count("cummin[") == 1


@pytest.mark.parametrize("pool", POOLS[:3], ids=["max", "mean", "attention"])
def test_gradients_reach_the_rows_of_the_group_alone(hidden, pool):
    def token(h):
        return jnp.sum(pool(h, boundaries(), capacity=6).tokens.values[0, 1] ** 2)

    gradient = jax.jit(jax.grad(token))(hidden)
    assert np.all(np.isfinite(gradient))
    assert np.all(np.any(gradient[0, 1:4] != 0, axis=-1) | (isinstance(pool, MaxPool)))
    moved = np.ones((3, 10), bool)
    moved[0, 1:4] = False
    np.testing.assert_array_equal(gradient[moved], 0.0)


@pytest.mark.parametrize(("capacity", "size"), [(3, 1.0), (6, 40.0)])
@pytest.mark.parametrize("pool", POOLS, ids=NAMES)
def test_gradients_are_those_of_each_group_by_itself(hidden, pool, capacity, size):
    """In packed documents whose ends no boundary closes, where capacity is full, and where attention is all but certain."""
    hidden = size * hidden
    weights = jax.random.normal(jax.random.key(3), (3, 6, 3 * DIM if pool is WIDE else DIM))

    def found(pool, hidden):
        return jnp.sum(weights[:, :capacity] * pool(hidden, boundaries(), capacity=capacity).tokens.values)

    def expected(pool, hidden):
        return sum(
            jnp.sum(weights[sequence, token] * by_hand(pool, hidden[sequence, jnp.asarray(group)]))
            for sequence, groups in enumerate(GROUPS)
            for token, group in enumerate(groups[:capacity])
        )

    ours, theirs = (
        jax.jit(jax.grad(lambda both, f=f: f(*both), allow_int=True))((pool, hidden)) for f in (found, expected)
    )
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * size)


@pytest.mark.parametrize("which", ["first", "every"])
def test_bytes_attend_to_the_vectors_of_their_token(hidden, which):
    plain = transformer(2, DIM, 2, DIM, window=4, key=jax.random.key(1))
    stack = lively(attending(plain, which, dim=DIM, heads=2, vectors=3, key=jax.random.key(4)))
    outputs = jax.random.normal(jax.random.key(2), (3, 6, DIM))
    layout = plain_layout(text_bytes(3, 10), jnp.cumsum(STARTS, axis=1))
    back = eqx.filter_jit(lambda: stack(hidden, layout, None, visible_tokens(outputs, ACTIONS, None)).hidden)()
    assert stack.unfold is not None
    vectors, expected = stack.unfold(outputs).reshape(3, 6, 3, DIM), hidden
    for block in stack.blocks:
        if isinstance(block, Attending):
            rows = [
                [crossed(block.cross, *pair) for pair in zip(*both, strict=True)]
                for both in zip(expected, vectors[jnp.arange(3)[:, None], token_of(ACTIONS)], strict=True)
            ]
            expected, block = jnp.asarray(rows), block.block
        expected = Stack([block], window=4)(expected, layout).hidden
    np.testing.assert_allclose(back, expected, rtol=1e-5, atol=1e-5)


def test_a_stack_that_attends_needs_tokens():
    stack = transformer(1, DIM, 2, DIM, window=4, key=jax.random.key(1))
    stack = attending(stack, "first", dim=DIM, heads=2, vectors=2, key=jax.random.key(0))
    with pytest.raises(ValueError, match="attend to tokens, but there are none: it must be the decoder of a Hierarchy"):
        stack(jnp.zeros((1, 4, DIM)), plain_layout(jnp.zeros((1, 4), jnp.int32)))


def test_a_stack_that_attends_needs_blocks_and_vectors():
    with pytest.raises(ValueError, match="no block that could attend"):
        attending(Stack([]), "every", dim=DIM, heads=2, vectors=2, key=jax.random.key(0))
    block = attending(
        transformer(1, DIM, 2, DIM, window=4, key=jax.random.key(1)),
        "first",
        dim=DIM,
        heads=2,
        vectors=1,
        key=jax.random.key(0),
    ).blocks[0]
    with pytest.raises(ValueError, match="`unfold` makes of them"):
        Stack([block])


TWO_HEADS = {"attention_pool": {"heads": 2}, "policy": {"window": 2}}
CHOICES = [
    {"pool": "max"},
    {"pool": "average", "pool_boundary": True},
    {"pool": "attention", "settings": TWO_HEADS, "chunker": "smooth", "unet": {"attend": "first"}},
    {
        "pool": "attention",
        "settings": TWO_HEADS,
        "chunker": "attend",
        "unet": {"ngrams": (3, 4, 5), "ngram_buckets": 100, "attend": "every", "decoder_layers": 2, "remat": True},
    },
]


def chosen(choice):
    config = config_of("sfe")
    changes = {name: value for name, value in choice.items() if name != "unet"}
    return dataclasses.replace(config, unet=dataclasses.replace(config.unet, **choice.get("unet", {})), **changes)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_models_with_such_tokens_train_and_decode_in_pieces(choice):
    config = chosen(choice)
    model = registered("sfe", config)
    assert np.isfinite(losses(model, text_bytes(3, LENGTH), key=jax.random.key(0), capacities=(12,)).loss)
    check_in_pieces(model)


def test_decoders_of_any_shape_and_level_attend():
    shape = HNetConfig(
        layout='["T1", ["T1", ["T1"], "t1"], "m1T1"]',
        dims=(32, 32, 48),
        mlp_dims=(32, 32, 32),
        heads=(2, 4, 2),
        rotary_dims=(8, 8, 8),
        windows=(4, 4, 0),
        state=8,
        attend="every",
    )
    policies = [small_score_function((), dim=32) for _ in range(2)]
    model = lively(
        UNet(
            shape,
            [eqx.tree_at(lambda e: e.chunker, one, Chunker(Select(), LeaveToDecoder())) for one in policies],
            key=KEYS[0],
        )
    )
    parts = jax.tree.leaves(model, is_leaf=lambda part: isinstance(part, Attending))
    assert sum(isinstance(part, Attending) for part in parts) == 3
    check_in_pieces(model)


@pytest.mark.parametrize("layout", ['["T1"]', '["T1", ["T1"], "t0"]'])
def test_shapes_with_nothing_to_attend_are_refused(layout):
    stages = 1 if layout == '["T1"]' else 2
    one = (16,) * stages
    with pytest.raises(ValueError, match="attend"):
        HNetConfig(layout, one, one, (2,) * stages, (8,) * stages, (0,) * stages, attend="every")
    with pytest.raises(ValueError, match="decoder_layers is 0"):
        UNetConfig(16, 2, 1, 1, 0, attend="first")


def test_nothing_after_a_row_reaches_it():
    model = registered("sfe", chosen(CHOICES[-1]))
    bytes = text_bytes(2, LENGTH)
    changed = bytes.at[:, 15:].set(text_bytes(2, LENGTH, seed=3)[:, 15:])
    before, after = (predict(model, b, key=KEYS[:2]).logits[:, :15] for b in (bytes, changed))
    np.testing.assert_allclose(before, after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool": "attention", "settings": {"attention_pool": {"heads": 3}}}, "3"),
        ({"pool": "attention", "settings": {"attention_pool": {"heads": 0}}}, "0"),
        ({"pool": "max", "estimator": "gumbel"}, "would pass them no gradient"),
        ({"pool_boundary": True}, "name a --pool"),
        ({"chunker": "attend"}, "--unet.attend first or every"),
    ],
)
def test_pools_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        require_fit(dataclasses.replace(config_of("sfe"), **changes))
