"""Texts are written as the whole model would have them, each as if it were alone."""

import functools
import itertools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from estimators import BOS, EOS, EveryNth, RuleRouter
from tests.compositions import config_of, registered
from tests.conftest import small_model
from unet import Flat, Sampling, TextStream, generate, score, utf8
from unet.blocks import transformer
from unet.decoding import generate as generation
from unet.decoding.generate import joined
from unet.decoding.kv_cache import cache_bytes, most_slots
from unet.decoding.sampling import draw, kept
from unet.decoding.score import keys_of
from unet.likelihood import next_logprobs

PROMPTS = ("", "a man", "the quick fox", "né")
KEY = jax.random.key(3)

write = functools.partial(generate, chunk=8)
"""In small chunks: each size of a batch, a prompt, a cache and a chunk is a program to compile."""


@pytest.fixture(scope="module")
def sfe():
    return registered("sfe")


@eqx.filter_jit
def whole(model, bytes, keys):
    return model(bytes, key=keys)


def with_rule(model, rule, reach=0, rate=None):
    return eqx.tree_at(lambda m: m.stage.estimator.router, model, RuleRouter(rule, reach, rate))


def check_against_the_whole(model, written, keys):
    """Log-likelihoods and boundaries are those of one pass over prompt and text."""
    for text, key in zip(written.texts, keys, strict=True):
        values = np.frombuffer(bytes([BOS]) + text.prompt + text.piece.bytes, np.uint8).astype(np.int32)
        padded = jnp.asarray(np.pad(values, (0, 64 - len(values))))[None]
        drawing = jax.random.fold_in(key, 0)[None]
        prediction = whole(model, padded, drawing)
        log_prob = next_logprobs(prediction.logits, padded)[0]
        rows = slice(len(text.prompt), len(values) - 1)
        np.testing.assert_allclose(text.piece.logprobs, log_prob[rows], atol=2e-4, rtol=1e-4)
        closed = closings(prediction.levels, len(values))
        np.testing.assert_array_equal(text.prompt_boundary_depth, closed[1 : 1 + len(text.prompt)])
        np.testing.assert_array_equal(text.piece.boundary_depth, closed[1 + len(text.prompt) :])


def closings(levels, length):
    """How many levels closed a token with each row, token by token."""
    count, rows = np.zeros(length, int), np.arange(length)
    for level in levels:
        rows = rows[np.asarray(level.boundaries.actions[0])[: len(rows)]]
        count[rows] += 1
    return count


@pytest.mark.parametrize("name", ["sfe", "hnet"])
def test_what_is_written_has_the_likelihood_and_the_boundaries_of_the_whole(name):
    model, keys = registered(name), keys_of(KEY, len(PROMPTS))
    written = write(model, PROMPTS, max_bytes=21, key=keys)
    assert [text.piece.finish for text in written.texts] == ["length"] * 4
    assert all(len(text.piece.bytes) == 21 for text in written.texts)
    check_against_the_whole(model, written, keys)
    assert written.throughput.bytes == 4 * 21
    assert written.throughput.steps == 21


def test_greedy_text_is_the_likeliest_byte_after_byte(sfe):
    written = write(sfe, ["so"], max_bytes=12, key=KEY, sampling=Sampling(temperature=0.0), greedy_boundaries=True)
    text = bytes([BOS]) + b"so"
    for _ in range(12):
        padded = jnp.asarray(np.pad(np.frombuffer(text, np.uint8).astype(np.int32), (0, 16 - len(text))))[None]
        logits = whole(sfe, padded, None).logits[0, len(text) - 1]
        text += bytes([int(jnp.argmax(logits.at[BOS].set(-jnp.inf)))])
    assert written.texts[0].piece.bytes == text[3:]


def test_a_text_is_the_same_alone_and_in_any_batch(sfe):
    keys = keys_of(KEY, len(PROMPTS))
    together = write(sfe, PROMPTS, max_bytes=20, key=keys).texts
    for number, prompt in list(enumerate(PROMPTS))[1:3]:
        alone = write(sfe, [prompt], max_bytes=20, key=keys[number : number + 1]).texts[0]
        assert alone.piece.bytes == together[number].piece.bytes
        np.testing.assert_allclose(alone.piece.logprobs, together[number].piece.logprobs, atol=1e-4)
    assert [text.piece.bytes for text in write(sfe, PROMPTS, max_bytes=20, key=KEY).texts] == [
        text.piece.bytes for text in together
    ]


def test_chunks_and_pieces_change_nothing(sfe):
    one, other = (write(sfe, PROMPTS, max_bytes=20, key=KEY, chunk=chunk).texts for chunk in (8, 20))
    assert [text.piece.bytes for text in one] == [text.piece.bytes for text in other]
    np.testing.assert_array_equal(one[1].piece.boundaries, other[1].piece.boundaries)


def test_other_keys_write_other_texts(sfe):
    texts = [write(sfe, ["so"], max_bytes=12, key=jax.random.key(seed)).texts[0].piece.bytes for seed in (1, 2)]
    assert texts[0] != texts[1]


def test_a_text_ends_before_a_stop_string_even_across_pieces(sfe):
    plain = write(sfe, ["so", "no"], max_bytes=24, key=KEY).texts
    stop = plain[0].piece.bytes[6:9]
    writer = TextStream(sfe, [b"so", b"no"], max_bytes=24, key=KEY, stop=[b"\0\0\0\0", stop], chunk=4)
    pieces = list(writer)
    mine = [piece for piece, _ in pieces if piece is not None]
    place = plain[0].piece.bytes.find(stop)
    assert b"".join(piece.bytes for piece in mine) == plain[0].piece.bytes[:place]
    assert [piece.finish for piece in mine][-1] == "stop"
    np.testing.assert_allclose(joined(mine).logprobs, plain[0].piece.logprobs[:place], atol=1e-5)
    if stop not in plain[1].piece.bytes:
        assert b"".join(piece.bytes for _, piece in pieces if piece is not None) == plain[1].piece.bytes


def test_a_text_ends_at_eos_and_stays_ended(sfe):
    # Half of all probability is on EOS wherever the norm's first feature is positive.
    loud = eqx.tree_at(lambda m: m.head.weight, sfe, sfe.head.weight.at[0, EOS].set(6.0))
    written = write(loud, ["a", "b", "c", "d"], max_bytes=40, key=KEY)
    finishes = [text.piece.finish for text in written.texts]
    assert "eos" in finishes
    for text in written.texts:
        assert EOS not in text.piece.bytes
        assert len(text.piece.bytes) < 40 or text.piece.finish == "length"
        assert len(text.piece.logprobs) == len(text.piece.boundaries) == len(text.piece.bytes)
    endless = write(loud, ["a", "b", "c", "d"], max_bytes=40, key=KEY, endless=True)
    assert all(len(text.piece.bytes) == 40 and EOS not in text.piece.bytes for text in endless.texts)
    assert written.throughput.bytes == sum(
        len(text.piece.bytes) + (text.piece.finish == "eos") for text in written.texts
    )


@pytest.mark.parametrize("max_bytes", [3, 5, 11])
def test_valid_text_is_valid_to_its_last_byte(sfe, max_bytes):
    prompts = [b"", "é".encode()[:1], "€".encode()[:2], "😀".encode()[:1]]
    written = write(sfe, prompts, max_bytes=max_bytes, key=KEY, sampling=Sampling(3.0), valid=True)
    for text in written.texts:
        (text.prompt + text.piece.bytes).decode("utf-8")
        assert len(text.piece.bytes) == max_bytes or text.piece.finish == "eos"
    free = write(sfe, prompts, max_bytes=max_bytes, key=KEY, sampling=Sampling(3.0))
    with pytest.raises(UnicodeDecodeError):
        b"".join(text.piece.bytes for text in free.texts).decode("utf-8")


def decodes(text):
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def test_bytes_can_follow_exactly_where_pythons_decoder_says_so():
    edges = [0x00, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF, 0xE0, 0xE1, 0xEC]
    edges += [0xED, 0xEE, 0xEF, 0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xFF]
    for length in (1, 2, 3, 4):
        for text in itertools.product(range(256) if length == 1 else edges, repeat=length):
            state = utf8.COMPLETE
            for byte in text:
                state = int(utf8.AFTER[state, byte])
                if state < 0:
                    break
            assert (state == utf8.COMPLETE) == decodes(bytes(text)), bytes(text)


def test_a_last_character_that_is_not_complete_is_counted_off():
    text = "né€😀".encode()
    ends = [utf8.whole_characters(text[:size]) for size in range(len(text) + 1)]
    assert ends == [0, 1, 1, 3, 3, 3, 6, 6, 6, 6, 10]


def test_a_cache_that_turns_out_too_small_grows_in_the_middle(sfe):
    late = with_rule(sfe, lambda layout: layout.document_positions >= 40, rate=0.05)
    prompt = "the quick brown fox jumps over the lazy dog "[:36]
    writer = TextStream(late, [prompt.encode()], max_bytes=28, key=KEY, chunk=4)
    sizes = [cache_bytes(writer.state)]
    pieces = []
    for now in writer:
        pieces += now
        sizes.append(cache_bytes(writer.state))
    assert sizes[0] < sizes[-1]
    written = write(late, [prompt], max_bytes=27, key=KEY)
    assert joined(pieces).bytes[:27] == written.texts[0].piece.bytes
    check_against_the_whole(late, written, keys_of(KEY, 1))


def test_more_tokens_than_expected_are_read_all_the_same(sfe):
    dense = with_rule(sfe, lambda layout: layout.mask, rate=0.05)
    written = write(dense, ["the quick brown fox jumps over"], max_bytes=8, key=KEY)
    check_against_the_whole(dense, written, keys_of(KEY, 1))
    assert written.texts[0].prompt_boundaries.all()


def test_the_token_level_runs_where_a_token_closes_and_nowhere_else(sfe):
    every_fifth = with_rule(sfe, EveryNth(5), rate=0.2)
    # Two texts of which the second is two bytes ahead.
    pace = write(every_fifth, ["abcd", "abcdef"], max_bytes=20, key=KEY).throughput
    assert (pace.steps, pace.token_steps) == (20, 8)
    pace = write(every_fifth, ["abcd", "efgh"], max_bytes=20, key=KEY).throughput
    assert (pace.steps, pace.token_steps) == (20, 4)


def test_scores_are_sums_of_the_whole_models_log_likelihoods(sfe):
    contexts, texts = ["", "a man", "the qu"], ["so it goes", "", "ick brown fox jumps over"]
    keys = keys_of(KEY, 3)
    for batch in (2, 4):
        scored = score(sfe, texts, contexts=contexts, key=keys, batch=batch)
        assert [one.bytes for one in scored] == [10, 0, 24]
        assert scored[1].log_prob == 0.0
        assert scored[1].greedy
        for one, text, context, key in zip(scored, texts, contexts, keys, strict=True):
            values = jnp.asarray(np.frombuffer(bytes([BOS]) + (context + text).encode(), np.uint8).astype(np.int32))
            prediction = whole(sfe, values[None], jax.random.fold_in(key, 0)[None])
            expected = next_logprobs(prediction.logits, values[None])[0, len(context) : len(values) - 1]
            np.testing.assert_allclose(one.logprobs, expected, atol=2e-4)
            assert one.log_prob == pytest.approx(float(expected.sum()), abs=1e-3)
            closed = prediction.levels[0].boundaries.actions[0, 1 + len(context) :]
            np.testing.assert_array_equal(one.boundaries, closed)


def test_what_was_written_scores_the_same_with_the_same_key(sfe):
    texts = write(sfe, PROMPTS, max_bytes=11, key=KEY).texts
    scores = score(sfe, [text.piece.bytes for text in texts], contexts=PROMPTS, key=KEY, batch=4)
    for text, one in zip(texts, scores, strict=True):
        np.testing.assert_allclose(one.logprobs, text.piece.logprobs, atol=2e-4)
        np.testing.assert_array_equal(one.boundaries, text.piece.boundaries)


def test_what_greedy_sampling_writes_scores_as_greedy(sfe):
    # BOS, which is never written, could be the likeliest byte of an untrained model.
    model = eqx.tree_at(lambda m: m.head.weight, sfe, sfe.head.weight.at[:, BOS].set(0.0))
    text = write(model, ["so"], max_bytes=12, key=KEY, sampling=Sampling(0.0), greedy_boundaries=True).texts[0]
    one, other = score(model, [text.piece.bytes, b"zzzz"], contexts=["so", "so"], key=None)
    assert one.greedy
    assert not other.greedy
    assert one.log_prob == pytest.approx(float(text.piece.logprobs.sum()), abs=1e-3)


def test_cut_off_bytes_are_those_that_were_asked_for():
    logits = jnp.log(jnp.asarray([[0.4, 0.3, 0.15, 0.1, 0.05], [0.05, 0.1, 0.15, 0.3, 0.4]]))

    def allowed(**settings):
        return np.asarray(kept(logits, Sampling(**settings).checked()))[0].tolist()

    assert allowed() == [True] * 5
    assert allowed(top_k=2) == [True, True, False, False, False]
    assert allowed(top_k=9) == [True] * 5
    assert allowed(top_p=0.69) == [True, True, False, False, False]
    assert allowed(top_p=0.71) == [True, True, True, False, False]
    assert allowed(top_p=0.01) == [True, False, False, False, False]
    assert allowed(min_p=0.3) == [True, True, True, False, False]
    # At temperature 1/2 probabilities go as their squares: 0.16, 0.09, 0.0225, ... of 0.285.
    assert allowed(top_p=0.8, temperature=0.5) == [True, True, False, False, False]
    assert allowed(min_p=0.3, temperature=0.5) == [True, True, False, False, False]
    # Of the two that are left after top-k, the first has 4/7.
    assert allowed(top_k=2, top_p=0.55) == [True, False, False, False, False]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_the_tempered_distribution(temperature):
    logits = jnp.log(jnp.asarray([0.5, 0.25, 0.15, 0.1]))
    count = 20_000
    uniforms = jax.random.uniform(jax.random.key(0), (count,))
    drawn = draw(jnp.broadcast_to(logits, (count, 4)), Sampling(temperature, top_k=3).checked(), uniforms)
    expected = np.array(jax.nn.softmax(logits[:3] / temperature))
    shares = np.bincount(drawn, minlength=4) / count
    assert shares[3] == 0
    np.testing.assert_allclose(shares[:3], expected, atol=4 * math.sqrt(0.25 / count))


def test_the_ends_of_the_unit_interval_draw_the_first_and_the_last_byte_kept():
    logits = jnp.log(jnp.asarray([[1e-9, 0.3, 0.3, 0.4, 0.0, 0.0]]))
    ends = jnp.asarray([0.0, float(np.nextafter(np.float32(1), np.float32(0)))])
    drawn = draw(jnp.broadcast_to(logits, (2, 6)), Sampling(min_p=0.1).checked(), ends)
    assert drawn.tolist() == [1, 3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": []}, "no prompt"),
        ({"max_bytes": 0}, "max_bytes must be a whole number from 1 to"),
        ({"stop": [""]}, "stop string"),
        ({"prompts": [b"a\xfe"]}, "holds the byte 254 or 255"),
        ({"prompts": [b"\xf0"], "max_bytes": 2, "valid": True}, "cannot complete"),
        ({"key": jax.random.split(KEY, 2)}, "2 keys for 1 texts"),
        ({"max_bytes": 2**31}, "max_bytes must be a whole number from 1 to"),
        ({"chunk": 10**9}, "chunk must be a whole number from 1 to"),
        ({"sampling": Sampling(temperature=-1.0)}, "temperature"),
        ({"sampling": Sampling(temperature=math.nan)}, "temperature must be 0, or a number from 1e-06"),
        ({"sampling": Sampling(temperature=math.inf)}, "temperature"),
        ({"sampling": Sampling(top_k=10**11)}, "top_k must be a whole number from 1 to 256"),
        ({"sampling": Sampling(top_p=1e-320)}, "top_p"),
        ({"sampling": Sampling(min_p=math.nan)}, "min_p"),
        ({"sampling": Sampling(top_k=0)}, "top_k"),
        ({"sampling": Sampling(top_p=0.0)}, "top_p"),
        ({"sampling": Sampling(min_p=1.5)}, "min_p"),
    ],
    ids=str,
)
def test_what_cannot_be_written_is_refused(sfe, settings, message):
    asked = functools.partial(write, sfe, prompts=["a"], max_bytes=4, key=KEY)
    with pytest.raises(ValueError, match=message):
        asked(**settings)


def test_what_cannot_be_scored_is_refused(sfe):
    with pytest.raises(ValueError, match="2 contexts for 1"):
        score(sfe, ["a"], contexts=["b", "c"], key=None)
    with pytest.raises(ValueError, match="batch must be a whole number from 1 to"):
        score(sfe, ["a"], key=None, batch=0)


def test_a_model_without_tokens_writes_and_scores():
    config = config_of("isotropic").with_settings(isotropic={"token_level": False})
    model = registered("isotropic", config)
    written = write(model, PROMPTS, max_bytes=9, key=KEY)
    assert written.throughput.token_steps == 0
    assert not any(text.piece.boundaries.any() for text in written.texts)
    one = score(model, [written.texts[1].piece.bytes], contexts=[PROMPTS[1]], key=KEY)[0]
    assert one.log_prob == pytest.approx(float(written.texts[1].piece.logprobs.sum()), abs=1e-3)


def test_a_model_without_tokens_has_slots_for_every_byte_from_the_start():
    full = Flat(transformer(1, 16, 2, 16, window=None, key=jax.random.key(1)))
    model = eqx.tree_at(lambda m: m.stage, small_model(), full)
    stream = TextStream(model, [b"so it is " * 20], max_bytes=400, key=KEY)
    assert most_slots(stream.state) >= 1 + 180 + 400


def test_a_cache_is_not_reserved_for_a_text_that_may_never_come(sfe, monkeypatch):
    stream = TextStream(sfe, ["so"], max_bytes=2**30, key=KEY)
    assert most_slots(stream.state) <= 2 * generation.RESERVED
    assert next(iter(stream))[0] is not None
    # A cache that doubles as it fills changes no byte.
    whole = write(sfe, ["so it"], max_bytes=90, key=KEY, chunk=8, endless=True).texts[0].piece
    monkeypatch.setattr(generation, "RESERVED", 8)
    grown = write(sfe, ["so it"], max_bytes=90, key=KEY, chunk=8, endless=True).texts[0].piece
    assert grown.bytes == whole.bytes
    np.testing.assert_allclose(grown.logprobs, whole.logprobs, atol=1e-5)
