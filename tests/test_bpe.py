"""Byte-pair boundaries: the prefix tree against string search, a real vocabulary, distillation."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from estimators import BPEGuided, Distilled, PrefixTree, SamplingOptions, WindowedPolicy
from estimators.routers.prefixes import find_size, train_vocabulary
from tests.conftest import losses, needs, small_model, text_bytes
from unet import Chunker, Distribute, Select
from unet.likelihood import plain_layout
from unet.ops import boundary_scan

BYTES = [bytes([value]) for value in range(256)]
WORDS = [b"th", b"the", b" th", b" the", b" then", b"re", b"\xc3\xa9", b" caf\xc3\xa9", b"  "]
TEXT = b"the cat then the th rethe caf\xc3\xa9s   are there"


def greedy(text, vocabulary):
    """Where tokens begin, by trying every prefix of every token."""
    begins, so_far = [], b""
    for value in text:
        longer = so_far + bytes([value])
        begins.append(not so_far or not any(token.startswith(longer) for token in vocabulary))
        so_far = bytes([value]) if begins[-1] else longer
    return begins


def layout_of(*texts):
    size = max(map(len, texts))
    rows = np.stack([np.frombuffer(text.ljust(size, b"\0"), np.uint8) for text in texts])
    mask = np.stack([np.arange(size) < len(text) for text in texts])
    return plain_layout(jnp.asarray(rows, jnp.int32), mask=jnp.asarray(mask))


def test_walking_the_tree_equals_searching_the_vocabulary():
    vocabulary = BYTES + WORDS
    begins = PrefixTree(vocabulary).begins(layout_of(TEXT, TEXT[::-1]))
    np.testing.assert_array_equal(begins[0], greedy(TEXT, vocabulary))
    np.testing.assert_array_equal(begins[1], greedy(TEXT[::-1], vocabulary))


@pytest.mark.parametrize("size", [256, 258, 261, 265])
def test_a_smaller_vocabulary_is_the_beginning_of_a_larger(size):
    vocabulary = BYTES + WORDS
    found = PrefixTree(vocabulary).begins(layout_of(TEXT), size)
    np.testing.assert_array_equal(found[0], greedy(TEXT, vocabulary[:size]))


def test_a_document_starts_a_token():
    layout = plain_layout(
        jnp.asarray(np.frombuffer(b"thethe", np.uint8), jnp.int32)[None], jnp.array([[0, 0, 1, 1, 1, 1]])
    )
    begins = PrefixTree(BYTES + WORDS).begins(layout)
    np.testing.assert_array_equal(begins[0], [True, False, True, True, False, False])


@pytest.fixture(scope="module")
def learned():
    needs("bpe", "tokenizers")
    text = b"the cat and the dog and then the other cat, 12 dogs and 12 cats; caf\xc3\xa9\n" * 40
    return text, train_vocabulary([text], 320)


def test_a_learned_vocabulary_has_bytes_first_and_words_with_their_space(learned):
    _, vocabulary = learned
    assert vocabulary[:256] == BYTES
    assert b" the" in vocabulary
    assert b" cat" in vocabulary
    assert len(set(vocabulary)) == len(vocabulary)
    # White space follows nothing else in a token, and precedes it only as one space.
    assert not any(re.search(rb"\S\s|\s\s\S|[^\S ]\S", token) for token in vocabulary)


def test_learning_a_vocabulary_twice_gives_the_same(learned):
    text, vocabulary = learned
    assert train_vocabulary([text], 320) == vocabulary


@pytest.mark.parametrize("rate", [0.01, 0.4, 0.7])
def test_the_size_found_comes_nearest_to_the_rate_and_its_rate_is_told(learned, rate):
    text, vocabulary = learned
    layout = layout_of(text[:700])
    rates = {size: np.mean(greedy(text[:700], vocabulary[:size])) for size in range(256, len(vocabulary) + 1)}
    found = find_size(PrefixTree(vocabulary), layout, rate)
    assert found.rate == pytest.approx(rates[found.size])
    assert abs(found.rate - rate) == pytest.approx(min(abs(one - rate) for one in rates.values()), abs=1e-6)


def test_a_router_aims_at_no_rate_but_tells_the_one_measured():
    assert BPEGuided(BYTES, chunker=Chunker(Select(), Distribute()), rate=0.23).router.rate == 0.23
    assert BPEGuided(BYTES, chunker=Chunker(Select(), Distribute())).router.rate is None


def test_a_vocabulary_without_all_bytes_is_refused():
    with pytest.raises(ValueError, match="256 single bytes"):
        PrefixTree(BYTES[:-1] + WORDS)


def test_distillation_teaches_the_guides_boundaries():
    """A policy without memory can learn a guide that only ever looks at the byte itself."""
    guide = BPEGuided(
        BYTES + [bytes([a, b]) for a in range(97, 123) for b in range(97, 123)], chunker=Chunker(Select(), Distribute())
    )
    student = WindowedPolicy(16, window=0, target_rate=0.3, scale=1.0, cap=1e6)
    estimator = Distilled(student, guide.router, chunker=Chunker(Select(), Distribute()))
    layout = plain_layout(text_bytes(4, 32))
    hidden = jax.random.normal(jax.random.key(0), (256, 16))[layout.bytes]
    options = SamplingOptions(boundary_scan, jax.random.key(0), training=True)
    np.testing.assert_array_equal(
        estimator.router(hidden, layout, options).actions, guide.router(hidden, layout, options).actions
    )
    model = small_model(estimator)
    output = losses(model, text_bytes(2, 16), key=jax.random.key(0))
    # At zero weights the student gives every boundary its target rate.
    drawn = guide.router(hidden[:2, :16], plain_layout(text_bytes(2, 16)), options).actions[:, 1:]
    expected = -float(jnp.mean(jnp.where(drawn, jnp.log(0.3), jnp.log(0.7))))
    assert float(output.metrics["imitation_loss"]) == pytest.approx(expected, rel=1e-5)
