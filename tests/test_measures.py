"""Windows over documents, and measures of boundaries with exact answers."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from experiments.config.errors import ConfigError
from experiments.evaluation.byte_classes import BYTE_CLASSES, byte_classes, scripts_of
from experiments.evaluation.byte_scores import ByteScores, Text
from experiments.evaluation.measures import (
    LONGEST,
    boundary_change,
    boundary_enrichment,
    boundary_rate,
    bytes_per_token,
    chunk_lengths,
    class_statistics,
    fit,
    likelihood,
)
from experiments.evaluation.references import (
    cut_targets,
    encoding_cuts,
    learn_encoding,
    read_encoding,
    read_reference,
)
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


def test_a_window_that_holds_a_whole_document_is_a_full_pass():
    model, text = registered("sfe"), Text("", DOCUMENTS)
    got = scores_of(model, text, context=40, stride=40, seed=3)
    of_sample = jax.random.fold_in(jax.random.key(3), 0)
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
    depth, marks = np.arange(5, dtype=np.uint8), np.arange(5) == 1
    inner = np.stack([places + 30, places + 40], axis=1)
    positions = PositionScores(places, places + 10, places + 20, depth, marks, marks, inner)
    got = ByteScores.of(text, [positions], 1)
    assert got.log_prob.tolist() == [[0, 1, 3]]
    assert got.early_log_prob.tolist() == [[10, 11, 13]]
    assert got.prob.tolist() == [[21, 22, 24]]
    assert got.depth.tolist() == [[1, 2, 4]]
    assert got.inner_prob.tolist() == [[[31, 41], [32, 42], [34, 44]]]
    assert got.free.tolist() == [[False, True, True]]
    assert (text.offset.tolist(), text.ends.tolist()) == ([0, 1, 0], [False, True, True])
    assert text.totals(np.array([1.0, 2.0, 4.0])).tolist() == [3.0, 4.0]


def byte_scores(text, boundaries, *, bits=1.0, prob=0.0, forced=(), depth=1):
    """Scores with boundaries at these bytes, and these bits of each byte."""
    shape = (1, text.bytes)
    drawn = np.isin(np.arange(text.bytes), boundaries)[None]
    return ByteScores(
        log_prob=np.broadcast_to(np.asarray(bits, np.float32) * np.float32(-math.log(2.0)), shape).copy(),
        early_log_prob=np.full(shape, np.nan, np.float32),
        prob=np.broadcast_to(np.asarray(prob, np.float32), shape).copy(),
        depth=drawn.astype(np.uint8) * np.uint8(depth),
        free=~np.isin(np.arange(text.bytes), forced)[None],
        levels=depth,
        inner_prob=np.full((*shape, depth - 1), np.nan, np.float32),
    )


ABC = Text("", (b"abcdef", b"gh"))


def test_bits_are_a_mean_over_bytes_with_an_error_over_documents():
    got = likelihood(byte_scores(ABC, (), bits=[1, 1, 1, 1, 1, 1, 4, 6]), ABC)
    assert got.bpb == pytest.approx(16 / 8)
    np.testing.assert_allclose(got.document_nats / math.log(2.0), [6, 10])
    # Residuals 6 - 2·6 and 10 - 2·2 of a ratio of sums: √(2/1 · (36 + 36)) / 8.
    assert got.bpb_error == pytest.approx(12 / 8)
    assert got.mixture_bpb == pytest.approx(got.bpb)
    assert math.isnan(got.early_bpb)


def test_the_mixture_of_samples_is_the_mean_of_their_probabilities():
    text = Text("", (b"a", b"b"))
    one, two = (byte_scores(text, (), bits=bits) for bits in ([1, 3], [2, 3]))
    names = ("log_prob", "early_log_prob", "prob", "depth", "free", "inner_prob")
    both = ByteScores(**{n: np.concatenate([getattr(one, n), getattr(two, n)]) for n in names}, levels=1)
    got = likelihood(both, text)
    assert got.bpb == pytest.approx((1.5 + 3) / 2)
    assert got.mixture_bpb == pytest.approx((-math.log2((1 / 2 + 1 / 4) / 2) + 3) / 2)


def test_rates_and_bytes_per_token_count_what_is_there():
    scores = byte_scores(ABC, (1, 3, 6), forced=(3,))
    assert boundary_rate(scores) == pytest.approx(2 / 7)
    assert bytes_per_token(scores) == (pytest.approx(8 / 3),)
    inner = dataclasses.replace(scores, depth=np.array([[0, 1, 0, 2, 0, 0, 1, 0]], np.uint8), levels=3)
    assert bytes_per_token(inner) == (pytest.approx(8 / 3), 8, math.inf)


def test_a_fit_is_precision_and_recall_where_something_follows():
    targets = np.array([0, 1, 0, 0, 1, 1, 1, 1], bool)
    # Byte 1 hits, 2 misses; 3 is forced, and nothing follows 5 and 7.
    got = fit(byte_scores(ABC, (1, 2, 3, 5, 7), forced=(3,), prob=[0, 9, 8, 9, 1, 9, 7, 0]), ABC, targets)
    assert (got.precision, got.recall, got.f1) == (1 / 2, 1 / 3, 2 / 5)
    # 2 of 5 bytes drawn uniformly hit 3 targets 6/5 times.
    assert got.chance_f1 == pytest.approx(2 * 6 / 5 / (2 + 3))
    assert got.targets == 3 / 5
    # Of the pairs of targets 1, 4, 6 and others 0, 2, those in order: 9 > 0, 9 > 8, 1 > 0, 7 > 0.
    assert got.auc == pytest.approx(4 / 6)


def test_enrichment_compares_the_bytes_that_begin_chunks_with_all():
    #       a  b  c  d  e  f | g  h
    bits = [9, 1, 2, 6, 1, 2, 9, 4]
    # Boundaries after b, c and f: chunks begin at c and d; g is the first byte of a document.
    got = boundary_enrichment(byte_scores(ABC, (1, 2, 5), bits=bits), ABC)
    assert got.start_bits == pytest.approx((2 + 6) / 2)
    assert got.other_bits == pytest.approx((1 + 1 + 2 + 4) / 4)
    assert got.ratio == pytest.approx(4 / (16 / 6))
    # The byte after a forced boundary does not count.
    forced = boundary_enrichment(byte_scores(ABC, (1, 2, 5), bits=bits, forced=(2,)), ABC)
    assert forced.ratio == pytest.approx(2 / (10 / 5))
    assert math.isnan(boundary_enrichment(byte_scores(ABC, (), bits=bits), ABC).ratio)


def test_boundaries_without_relation_to_surprise_have_an_enrichment_of_one():
    text = Text("", (b"x" * 20000,))
    rng = np.random.default_rng(0)
    scores = byte_scores(text, np.flatnonzero(rng.random(20000) < 0.2), bits=rng.exponential(size=20000))
    assert boundary_enrichment(scores, text).ratio == pytest.approx(1.0, abs=0.04)


def test_chunks_are_counted_from_the_start_of_their_document():
    # a|bcd|ef, gh|: lengths 1, 3 and 2.
    got = chunk_lengths(byte_scores(ABC, (0, 3, 7)), ABC)
    assert got.histogram == (1, 1, 1, *[0] * (LONGEST - 3))
    assert (got.mean, got.longest) == (2.0, 3)
    assert got.variation == pytest.approx(math.sqrt(2 / 3) / 2)
    long = Text("", (b"x" * 100,))
    assert chunk_lengths(byte_scores(long, (4, 99)), long).histogram[-1] == 1
    assert math.isnan(chunk_lengths(byte_scores(ABC, ()), ABC).mean)


def test_classes_of_bytes_have_their_share_of_text_boundaries_and_bits():
    text = Text("", ("a 1.é\x00".encode(),))
    got = class_statistics(
        byte_scores(text, (1, 4), bits=[1, 2, 3, 4, 5, 5, 0]), byte_classes(text.values), BYTE_CLASSES
    )
    assert list(got) == list(BYTE_CLASSES)
    space = got["space"]
    assert (space.share, space.rate, space.boundaries) == (1 / 7, 1.0, 1 / 2)
    assert (space.bpb, space.bits) == (pytest.approx(2.0), pytest.approx(2 / 20))
    assert got["letter"].rate == 0.0
    assert sum(one.share for one in got.values()) == pytest.approx(1.0)


def test_scripts_are_those_of_whole_characters():
    content = "aé Жя中。かア한".encode() + b"\xe4\xb8"
    scripts, names = scripts_of(content)
    assert [names[number] for number in scripts] == (
        ["Latin"] * 3
        + ["no letter"]
        + ["Cyrillic"] * 4
        + ["Han"] * 3
        + ["no letter"] * 3
        + ["Hiragana"] * 3
        + ["Katakana"] * 3
        + ["Hangul"] * 3
        + ["no letter"] * 2
    )


def test_change_is_the_part_of_the_boundaries_that_the_other_has_not():
    got = boundary_change(byte_scores(ABC, (1, 2, 3)), byte_scores(ABC, (2, 3, 5, 6), forced=(6,)))
    assert (got.changed, got.bytes) == (1 - 2 / 4, 2 / 7)
    assert math.isnan(boundary_change(byte_scores(ABC, ()), byte_scores(ABC, ())).changed)


def test_references_are_cuts_at_offsets(tmp_path):
    path = tmp_path / "cuts.jsonl"
    path.write_text("[0, 2, 3]\n[1, 2]\n")
    cuts = read_reference(path, ABC)
    np.testing.assert_array_equal(np.flatnonzero(cuts), [1, 2, 6])
    targets = cut_targets("words", cuts)
    np.testing.assert_array_equal(np.flatnonzero(targets["words: first bytes"]), [2, 3, 7])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]\n", "has 1 lines, but the text has 2 documents"),
        ("[1]\n[3]\n", "line 2, has an offset outside its document, which has 2 bytes"),
        ("[1]\n[-1]\n", "line 2, has an offset outside"),
        ("[2, 1]\n[]\n", "line 1, has offsets that do not ascend"),
        ("[1.5]\n[]\n", "line 1, is not a list of byte offsets"),
        ("[true]\n[]\n", "line 1, is not a list of byte offsets"),
        ("{}\n[]\n", "line 1, is not a list of byte offsets"),
        ("[1\n[]\n", "line 1, is not JSON"),
    ],
)
def test_a_reference_that_does_not_fit_is_refused(tmp_path, content, message):
    path = tmp_path / "cuts.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_reference(path, ABC)


def tokenizer_of(pieces: list[str], *, byte_level: bool):
    """A tokenizer of these pieces, merged from the left."""
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys([*"".join(pieces), *pieces]))}
    merges = [(piece[:-1], piece[-1]) for piece in sorted(pieces, key=len) if len(piece) > 1]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    if byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def test_encodings_cut_at_the_bytes_of_their_tokens(tmp_path):
    # Ġ is a space, Ã and © are the two bytes of é.
    tokenizer_of(["a", "ab", "Ġa", "Ã", "©"], byte_level=True).save(str(tmp_path / "bytes.json"))
    encoding = read_encoding(str(tmp_path / "bytes.json"))
    assert encoding.tokens("ab aé".encode()) == [b"ab", b" a", b"\xc3", b"\xa9"]
    assert encoding.tokens(b"ab\xc3") == [b"ab", b"\xc3"]
    text = Text("", ("ab aé".encode(), b"ab"))
    np.testing.assert_array_equal(np.flatnonzero(encoding_cuts(encoding, text, "")), [1, 3, 4])
    tokenizer_of(["é", "a", "▁", "▁a"], byte_level=False).save(str(tmp_path / "text.json"))
    spelled = read_encoding(str(tmp_path / "text.json"))
    assert spelled.tokens("aé".encode()) == [b"a", "é".encode()]
    with pytest.raises(ConfigError, match="does not cover the bytes of document 0"):
        encoding_cuts(spelled, ABC, "text.json")


def test_an_encoding_is_learned_from_the_text():
    text = Text("", (b"the the the\xff the cat",))
    tokens = learn_encoding(text, 259).tokens(text.documents[0])
    assert b"".join(tokens) == text.documents[0]
    assert len(tokens) < len(text.documents[0])
