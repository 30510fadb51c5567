"""Hashed n-grams: BLT's hash in plain Python, documents, and scales."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import small_model, text_bytes
from unet import UNet, UNetConfig
from unet.ngrams import PRIMES, HashedNgrams, rolling_hash


def by_the_program(ids, buckets, prime):
    """The hash with Python's numbers: 64 bits with a sign that wrap around, and a remainder that is not negative."""
    total = sum(value * prime**place for place, value in enumerate(ids)) % 2**64
    return (total - 2**64 if total >= 2**63 else total) % buckets


@pytest.mark.parametrize("prime", PRIMES[:3])
@pytest.mark.parametrize("buckets", [1, 503, 500_002, 2**16, 2**31])
def test_hashes_are_those_of_the_program(buckets, prime):
    rng = np.random.default_rng(buckets % 1000)
    windows = np.concatenate([rng.integers(0, 260, (40, 8)), np.full((1, 8), 259), np.zeros((1, 8), int)])
    found = eqx.filter_jit(rolling_hash)(jnp.asarray(windows, jnp.int32), buckets, prime)
    assert found.tolist() == [by_the_program(window, buckets, prime) for window in windows.tolist()]


def test_the_longest_and_largest_do_not_overflow():
    windows = jnp.full((1, 64), 255 + 512)
    assert rolling_hash(windows, 500_002).tolist() == [by_the_program([767] * 64, 500_002, PRIMES[0])]


def test_ngrams_begin_anew_with_every_document_and_look_back_only():
    ngrams = HashedNgrams(4, (3, 5), 50, functions=2, key=jax.random.key(0))
    bytes, document_positions = text_bytes(1, 9), jnp.asarray([[0, 1, 2, 3, 4, 5, 0, 1, 2]])
    got = eqx.filter_jit(ngrams)(bytes, document_positions)
    tables = dict(zip([(f, n) for f in range(2) for n in (3, 5)], ngrams.tables, strict=True))
    for row in range(9):
        first = row - int(document_positions[0, row])
        expected = jnp.zeros(4)
        for (function, size), table in tables.items():
            ids = [int(bytes[0, at]) + 4 if at >= first else 0 for at in range(row - size + 1, row + 1)]
            expected = expected + table[by_the_program(ids, 50, PRIMES[function])]
        np.testing.assert_allclose(got[0, row], expected, rtol=1e-5, atol=1e-6)


def test_tables_are_drawn_as_wide_as_the_embeddings_of_bytes():
    """In BLT both have a standard deviation of dim^-1/2."""
    model = UNet(UNetConfig(16, 2, 1, 1, 1, ngrams=(3, 4), ngram_buckets=900), None, key=jax.random.key(0))
    assert model.ngrams is not None
    wide = float(jnp.std(model.embedding))
    for table in model.ngrams.tables:
        assert float(jnp.std(table)) == pytest.approx(wide, rel=0.05)
    assert small_model().ngrams is None


@pytest.mark.parametrize(
    ("sizes", "buckets", "functions", "offset", "message"),
    [
        ((1,), 50, 1, 4, "two bytes or more"),
        ((65,), 50, 1, 4, "at most 64"),
        ((3,), 0, 1, 4, "one row or more"),
        ((3,), 50, 12, 4, "1 to 11 hash functions"),
        ((3,), 50, 1, 513, "from 0 to 512"),
    ],
)
def test_ngrams_that_make_no_sense_are_refused(sizes, buckets, functions, offset, message):
    with pytest.raises(ValueError, match=message):
        HashedNgrams(4, sizes, buckets, functions=functions, offset=offset, key=jax.random.key(0))


def test_shapes_with_such_ngrams_are_refused():
    with pytest.raises(ValueError, match="ngrams must be a whole number from 2 to 64"):
        UNetConfig(16, 2, 1, 1, 1, ngrams=(70,))
    with pytest.raises(ValueError, match="ngram_functions must be a whole number from 1 to"):
        UNetConfig(16, 2, 1, 1, 1, ngrams=(3,), ngram_functions=0)
