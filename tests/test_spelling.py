"""What a model of tokens says of the next byte, against the sums that define it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from estimators.equations import byte_matching_loss
from unet.tokens.batch import TokenBatch
from unet.tokens.spelling import LEAST_MASS, Spelling

TOKENS = (b"b", b"a", b"ab", b"abc", b"", b"aca", b"ab", b"c", b"\xff", b"ba")
"""Out of order, one of them twice and one without bytes."""


def batch_of(*rows):
    """Rows of (token, document), each as one after another."""
    size = max(map(len, rows))
    made = TokenBatch(*(np.zeros((len(rows), size), kind) for kind in (np.int32, np.int32, np.int32, np.bool_)))
    for number, row in enumerate(rows):
        for place, (token, document) in enumerate(row):
            made.ids[number, place], made.segments[number, place] = TOKENS.index(token), document
            made.mask[number, place] = True
        spelled = [len(token) for token, _ in row]
        made.ends[number, : len(row)] = np.cumsum(spelled) - 1
    return made


BATCH = batch_of([(b"b", 0), (b"abc", 0), (b"a", 0), (b"aca", 0)], [(b"a", 0), (b"ba", 0), (b"b", 1), (b"c", 1)])


def by_definition(probs, before):
    """The sums over all tokens, one by one; None where no token goes on."""
    going_on = {number: token for number, token in enumerate(TOKENS) if token.startswith(before) and token != before}
    mass = sum(probs[number] for number in going_on)
    shares = np.zeros(256)
    for number, token in going_on.items():
        shares[token[len(before)]] += probs[number] / mass
    return shares


def test_the_next_byte_is_that_of_the_tokens_that_go_on_as_the_text_does():
    spelling = Spelling.of(TOKENS)
    where = spelling.next_bytes(BATCH, 9)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, len(TOKENS))), jnp.float32)
    found, known = spelling.probabilities(logits, where)
    # Of the first row "b" is complete after byte 0, "abc" after byte 3, "a" after byte 4; the first byte of a document is given.
    before = {
        (0, 0): (0, b""),
        (0, 1): (0, b"a"),
        (0, 2): (0, b"ab"),
        (0, 3): (1, b""),
        (0, 4): (2, b""),
        (0, 5): (2, b"a"),
        (0, 6): (2, b"ac"),
        (1, 0): (0, b""),
        (1, 1): (0, b"b"),
        (1, 3): (2, b""),
    }
    assert {tuple(one) for one in np.argwhere(known).tolist()} == set(before)
    probs = np.asarray(jax.nn.softmax(logits), np.float64)
    for (row, place), (token, prefix) in before.items():
        wanted = by_definition(probs[row, token], prefix)
        np.testing.assert_allclose(found[row, place], wanted, atol=1e-6)
        assert float(found[row, place].sum()) == pytest.approx(1.0, abs=1e-6)
    assert not np.any(np.asarray(found)[~np.asarray(known)])


def test_the_last_token_of_a_full_row_is_left_out():
    """It may go on beyond the row."""
    spelling = Spelling.of(TOKENS)
    assert spelling.next_bytes(BATCH, 9).mask.sum(axis=1).tolist() == [7, 3]
    assert spelling.next_bytes(BATCH, 8).mask.sum(axis=1).tolist() == [4, 3]


def test_nothing_is_said_where_hardly_any_token_goes_on():
    spelling = Spelling.of(TOKENS)
    logits = jnp.zeros((2, 4, len(TOKENS))).at[:, :, TOKENS.index(b"abc")].set(-8.0)
    _, known = spelling.probabilities(logits, spelling.next_bytes(BATCH, 9))
    assert np.exp(-8.0) / 9 < LEAST_MASS
    assert np.argwhere(~np.asarray(known) & spelling.next_bytes(BATCH, 9).mask).tolist() == [[0, 2]]


def test_the_divergence_is_exact():
    wanted = jnp.zeros((1, 3, 256)).at[0, 0, :2].set(jnp.asarray([0.25, 0.75])).at[0, 1, 5].set(1.0)
    probs = jnp.full((1, 3, 256), 0.5 / 254).at[0, :, :2].set(0.25)
    mask = jnp.asarray([[True, True, False]])
    exact = 0.5 * (0.25 * np.log(1.0) + 0.75 * np.log(3.0) + np.log(254 / 0.5))
    assert float(byte_matching_loss(wanted, jnp.log(probs), mask)) == pytest.approx(exact, rel=1e-6)
    same = jnp.broadcast_to(probs, wanted.shape)
    assert float(byte_matching_loss(same, jnp.log(probs), mask)) == pytest.approx(0.0, abs=1e-6)
    assert float(byte_matching_loss(wanted, jnp.log(probs), jnp.zeros_like(mask))) == 0.0
    assert not jnp.any(jax.grad(lambda one: byte_matching_loss(one, jnp.log(probs), mask))(same))
