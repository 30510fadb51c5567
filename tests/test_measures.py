"""Windows over documents, and measures of boundaries with exact answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.evaluation.byte_scores import ByteScores, Text
from experiments.evaluation.windows import PositionScores, padded_lengths, score_windows, window_keys, windows_of
from tests.compositions import registered
from tests.conftest import predict, small_model
from unet import score


@pytest.mark.parametrize("size", [1, 7, 8, 9, 10, 11, 15, 40])
@pytest.mark.parametrize("stride", [1, 3, 8])
def test_every_position_counts_in_one_window_that_reads_enough_before_it(size, stride):
    windows = list(windows_of(5, size, 8, stride))
    counted = [place for window in windows for place in range(window.counted, window.stop)]
    assert counted == list(range(size + 1))
    assert [window.number for window in windows] == list(range(len(windows)))
    assert all(window.stop - window.start <= 8 for window in windows)
    for window in windows[1:]:
        assert window.counted - window.start + 1 >= 8 - stride + 1


def test_windows_that_leave_bytes_out_are_refused():
    with pytest.raises(ValueError, match="can move by 1 to 8 bytes; got 9"):
        list(windows_of(0, 20, 8, 9))


def test_windows_are_padded_to_few_lengths():
    assert padded_lengths(1000) == [125, 250, 500, 1000]
    assert padded_lengths(20) == [16, 20]
    assert padded_lengths(5) == [5]


DOCUMENTS = (b"so it goes, a man ", "né".encode()[:2], b"x", b"and then " * 4)


def scores_of(model, text, *, context, stride, seed=None, batch=2):
    windows = [w for number, size in enumerate(text.sizes) for w in windows_of(number, int(size), context, stride)]
    keys = None if seed is None else window_keys(seed, 0, windows)
    positions = score_windows(model, text.documents, windows, keys, context=context, batch=batch)
    return ByteScores.of(text, [positions], len(model.stage.estimators))


@pytest.mark.parametrize("seed", [None, 3])
def test_a_window_that_holds_a_whole_document_is_a_full_pass(seed):
    model, text = registered("sfe"), Text("", DOCUMENTS)
    got = scores_of(model, text, context=40, stride=40, seed=seed)
    keys = None
    if seed is not None:
        of_sample = jax.random.fold_in(jax.random.key(seed), 0)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(of_sample, np.arange(len(DOCUMENTS)))
    for number, one in enumerate(score(model, DOCUMENTS, key=keys)):
        own = text.document == number
        np.testing.assert_allclose(got.log_prob[0, own], one.logprobs, atol=1e-5)
        np.testing.assert_array_equal(got.depth[0, own], one.boundary_depth)
    assert got.free.all()
    assert got.boundaries.any()
    assert not got.boundaries.all()


def test_the_bytes_of_windows_are_those_of_passes_over_their_context():
    # Without a token level, a prediction depends on the bytes before it alone.
    model, text = small_model(None), Text("", DOCUMENTS[-1:])
    got = scores_of(model, text, context=12, stride=5).log_prob[0]
    read, sizes = np.zeros((36, 12), np.int32), []
    for place in range(36):
        start = 5 * max(0, -(-(place - 11) // 5))
        before = (b"\xfe" + DOCUMENTS[-1])[start : place + 1]
        read[place, : len(before)] = list(before)
        sizes.append(len(before))
    assert min(sizes[11:]) == 12 - 5 + 1
    logits = predict(model, jnp.asarray(read)).logits[np.arange(36), np.array(sizes) - 1]
    expected = jax.nn.log_softmax(logits)[np.arange(36), np.array(list(DOCUMENTS[-1]))]
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_where_windows_do_not_overlap_their_first_boundary_is_forced():
    got = scores_of(registered("sfe"), Text("", DOCUMENTS[-1:]), context=12, stride=12)
    np.testing.assert_array_equal(np.flatnonzero(~got.free[0]), [11, 23, 35])
    assert got.boundaries[0, [11, 23, 35]].all()


def test_positions_become_bytes():
    text = Text("", (b"ab", b"c"))
    places = np.arange(5, dtype=np.float32)
    positions = PositionScores(places, places + 10, places + 20, np.arange(5, dtype=np.uint8), np.arange(5) == 1)
    got = ByteScores.of(text, [positions], 1)
    assert got.log_prob.tolist() == [[0, 1, 3]]
    assert got.early_log_prob.tolist() == [[10, 11, 13]]
    assert got.prob.tolist() == [[21, 22, 24]]
    assert got.depth.tolist() == [[1, 2, 4]]
    assert got.free.tolist() == [[False, True, True]]
    assert (text.offset.tolist(), text.ends.tolist()) == ([0, 1, 0], [False, True, True])
    assert text.totals(np.array([1.0, 2.0, 4.0])).tolist() == [3.0, 4.0]
