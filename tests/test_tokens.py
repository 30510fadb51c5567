"""Models of tokens: the tokenizer, and everything that a model of bytes can do too."""

import itertools
import json
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from estimators import Stride
from estimators.base import BOS, EOS
from experiments.evaluation.byte_results import evaluate_batch
from experiments.evaluation.token_windows import score_token_windows
from experiments.evaluation.windows import windows_of
from tests.conftest import needs
from unet import Sampling, TokenModel, TransformerConfig, UNet, UNetConfig, generate, load, save, score
from unet.chunkers import Chunker, Distribute, Select
from unet.decoding.alphabet import BYTES, Alphabet, byte_alphabet
from unet.decoding.sampling import weight_of_more_likely
from unet.flops import layer_flops, matrix_flops
from unet.likelihood import continues, next_logprobs, plain_layout
from unet.tokens.batch import at_last_byte, at_predictions, padded_length, tokenised
from unet.tokens.tokenizer import Tokenizer, train_tokenizer

needs("bpe", "tokenizers")

TEXT = ("The cat sat on the mat, and the dog sat on the cat. Naïve café! " * 6).encode()
DOCUMENTS = [b"The cat sat on the mat.", "the café\n".encode(), b""]
KEY = jax.random.key(0)
"""Of everything that is drawn here."""


@eqx.filter_jit
def logits_of(model, ids):
    """Those of a full pass over one row of tokens."""
    return model.inner(ids).logits


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], 280)


@pytest.fixture(scope="module")
def flat(tokenizer):
    """A transformer of tokens."""
    shape = TransformerConfig(dim=8, heads=2, layers=1, mlp_dim=16)
    return TokenModel(tokenizer, UNet(shape, None, key=KEY, vocab=tokenizer.size))


@pytest.fixture(scope="module")
def nested(tokenizer):
    """Chunks of two tokens each."""
    shape = UNetConfig(dim=8, heads=2, encoder_layers=1, main_layers=1, decoder_layers=1, window=4)
    estimator = Stride(chunker=Chunker(Select(), Distribute()), stride=2)
    return TokenModel(tokenizer, UNet(shape, estimator, key=KEY, vocab=tokenizer.size))


def packed(length=64):
    """A batch of packed documents: two in the first row, then padding; a piece that begins in the middle in the second."""
    bytes, segments, mask = (np.zeros((2, length), kind) for kind in (np.int32, np.int32, np.bool_))
    first = bytes_of(bytes_between(DOCUMENTS[0])) + bytes_of(bytes_between(DOCUMENTS[1]))
    bytes[0, : len(first)], mask[0, : len(first)] = first, True
    segments[0, len(DOCUMENTS[0]) + 2 :] = 1
    second = TEXT[5 : 5 + length]
    bytes[1], mask[1] = bytes_of(second), True
    return {"bytes": bytes, "segments": segments, "mask": mask}


def bytes_between(document):
    return bytes([BOS]) + document + bytes([EOS])


def bytes_of(content):
    return list(content)


def test_tokens_make_up_the_bytes_whatever_they_are(tokenizer):
    texts = [TEXT, b"", b"\xff\xfe a\x80 caf\xc3", "🙂 naïve\u200b".encode(), bytes(range(256))]
    for text, ids in zip(texts, tokenizer.encode_all(texts), strict=True):
        assert b"".join(tokenizer.tokens[one] for one in ids) == text
        assert tokenizer.token_sizes[ids].sum() == len(text)
    assert len(tokenizer.encode(TEXT)) < 0.6 * len(TEXT)
    assert tokenizer.size == 280
    assert tokenizer.learned_from == len(TEXT)


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        (lambda found: found["model"]["vocab"].pop("Ć"), "does not cover the bytes"),
        (lambda found: found["model"].update(dropout=0.5), "at random"),
        (lambda found: found.update(normalizer={"type": "Lowercase"}), "changes what it reads"),
        (lambda found: found["pre_tokenizer"].update(add_prefix_space=True), "changes what it reads"),
        (lambda found: found.update(pre_tokenizer={"type": "Whitespace"}, decoder=None), "no byte-level"),
        (lambda found: found.clear(), "not the tokenizer.json"),
    ],
)
def test_what_does_not_cover_the_bytes_is_refused_in_one_sentence(tokenizer, change, refusal):
    found = json.loads(np.asarray(tokenizer.json).tobytes())
    change(found)
    with pytest.raises(ValueError, match=refusal):
        Tokenizer.read(json.dumps(found).encode())


def test_sizes_of_vocabularies_are_bounded():
    for size in (256, 2**21):
        with pytest.raises(ValueError, match="the size of a vocabulary must be a whole number from 257 to"):
            train_tokenizer([TEXT], size)


def test_rows_of_tokens_cover_what_is_predicted_of_rows_of_bytes(tokenizer):
    batch = packed()
    tokens = tokenised(tokenizer, **batch)
    layout = plain_layout(*map(jnp.asarray, batch.values()))
    for row in range(2):
        valid = tokens.mask[row]
        spelled = b"".join(tokenizer.tokens[one] for one in tokens.ids[row][valid])
        assert spelled == bytes(batch["bytes"][row][batch["mask"][row]].astype(np.uint8))
        assert tokens.ends[row][valid][-1] == batch["mask"][row].sum() - 1
    of_tokens = plain_layout(*map(jnp.asarray, (tokens.ids, tokens.segments, tokens.mask)))
    sizes = jnp.asarray(tokenizer.token_sizes)[jnp.roll(of_tokens.bytes, -1, axis=1)]
    # The bytes of the tokens that are predicted are the bytes that are predicted.
    assert int(jnp.sum(jnp.where(continues(of_tokens), sizes, 0))) == int(jnp.sum(continues(layout)))
    assert np.all(np.asarray(tokens.ids)[:, 0] == [tokenizer.tokens.index(bytes([BOS])), tokens.ids[1, 0]])
    assert [padded_length(count, 100) for count in (3, 16, 17, 25, 97, 200)] == [16, 16, 24, 32, 100, 200]
    longer = tokenised(tokenizer, **batch, shortest=50)
    assert longer.ids.shape == (2, 64)
    np.testing.assert_array_equal(longer.ids[longer.mask], tokens.ids[tokens.mask])


def test_the_loss_is_that_of_the_tokens_over_the_bytes(flat, nested):
    batch = packed()
    layout = plain_layout(*map(jnp.asarray, batch.values()))
    for model in (flat, nested):
        inputs = model.inputs(batch)
        output = eqx.filter_jit(lambda m, b: m.batch_loss(b, key=KEY))(model, inputs)
        tokens = inputs["tokens"]
        of_tokens = plain_layout(*map(jnp.asarray, (tokens.ids, tokens.segments, tokens.mask)))
        logits = eqx.filter_jit(
            lambda m, one: m.inner(one.bytes, key=KEY, segments=one.segments, mask=one.mask).logits
        )(model, of_tokens)
        log_prob = jnp.where(continues(of_tokens), next_logprobs(logits, of_tokens.bytes), 0.0)
        predicted = int(jnp.sum(continues(layout)))
        assert float(output.log_prob) == pytest.approx(float(jnp.sum(log_prob)) / predicted, rel=1e-5)
        assert float(output.rate) == pytest.approx(tokens.mask.sum() / batch["mask"].sum())
        # At bytes they have the same sum, each where its last byte is predicted.
        at_bytes = at_predictions(tokens, log_prob, 64)
        assert float(jnp.sum(at_bytes)) == pytest.approx(float(jnp.sum(log_prob)), rel=1e-6)
        ends = at_last_byte(tokens, jnp.asarray(tokens.mask).astype(jnp.int32), 64) > 0
        assert bool(jnp.all((at_bytes == 0) | jnp.roll(ends, -1, axis=1)))
        result = evaluate_batch(model, layout, KEY, None)
        np.testing.assert_allclose(np.sum(result.log_prob[result.scored]), np.sum(log_prob), rtol=1e-5)
        np.testing.assert_array_equal(result.sampled, ends)
        assert result.tokens.shape == (2, model.levels)
    assert set(output.metrics) >= {"level1_rate", "level1_overflow"}
    assert float(output.free_rate) == float(output.metrics["level1_rate"] + output.metrics["level1_overflow"])
    with pytest.raises(ValueError, match="no other boundaries"):
        evaluate_batch(flat, layout, KEY, None, (jnp.ones((2, 64), bool),))


def test_predictions_depend_on_no_later_token(flat):
    ids = jnp.asarray(flat.encode(TEXT)[None, :12])
    changed = ids.at[0, 7:].set(70)
    before, after = logits_of(flat, ids), logits_of(flat, changed)
    np.testing.assert_allclose(before[:, :7], after[:, :7], atol=1e-6)
    assert np.abs(before - after)[:, 7:].max() > 1e-3


def test_scores_are_those_of_a_full_pass_and_windows_sum_to_them(flat, nested):
    for model in (flat, nested):
        (scored,) = score(model, DOCUMENTS[0], contexts=b"On a day: ", key=None, batch=1)
        ids = [model.alphabet.bos, *model.encode(b"On a day: "), *model.encode(DOCUMENTS[0])]
        logits = logits_of(model, jnp.asarray([ids]))
        first = 1 + len(model.encode(b"On a day: "))
        log_prob = np.asarray(next_logprobs(logits, jnp.asarray([ids])))[0, first - 1 : -1]
        assert scored.log_prob == pytest.approx(float(log_prob.sum()), rel=1e-4)
        assert scored.bytes == len(DOCUMENTS[0]) == len(scored.logprobs)
        sizes = model.tokenizer.token_sizes[ids[first:]]
        np.testing.assert_allclose(scored.logprobs[np.cumsum(sizes) - 1], log_prob, rtol=1e-3, atol=1e-4)
        assert scored.logprobs.sum() == pytest.approx(scored.log_prob, rel=1e-5)
        assert np.flatnonzero(scored.boundaries).tolist() == (np.cumsum(sizes) - 1).tolist()


@pytest.mark.parametrize(("context", "stride"), [(400, 400), (16, 8), (7, 7)])
def test_every_token_counts_in_one_window(flat, context, stride):
    document = TEXT[:61]
    windows = list(windows_of(0, len(document), context, stride))
    scores = score_token_windows(flat, [document], windows, None, batch=4)
    ends = np.concatenate([[0], np.cumsum(flat.tokenizer.token_sizes[flat.encode(document)])])
    assert scores.log_prob.shape == (len(document) + 1,)
    assert np.flatnonzero(scores.log_prob).tolist() == (ends[1:] - 1).tolist()
    assert np.flatnonzero(scores.depth).tolist() == ends.tolist()
    # A context ends with a token, as in `score`.
    (after,) = score(flat, document[11:], contexts=document[:11], key=None, batch=1)
    apart = score_token_windows(flat, [document], windows, None, batch=4, cuts=[11])
    if context == 400:
        assert apart.log_prob[11:].sum() == pytest.approx(after.log_prob, rel=1e-3)
    assert apart.depth[11]
    (whole,) = score(flat, document, key=None, batch=1)
    if context == 400:
        np.testing.assert_allclose(scores.log_prob[:-1], whole.logprobs, rtol=1e-3, atol=1e-4)


def test_generation_has_the_likelihood_of_a_full_pass(flat, nested):
    for model in (flat, nested):
        written = generate(model, ["The café"] * 2, max_bytes=9, key=jax.random.key(3), chunk=4, greedy_boundaries=True)
        for text in written.texts:
            assert len(text.piece.bytes) <= 9
            ids = [model.alphabet.bos, *model.encode(text.prompt)]
            first = len(ids)
            drawn = tokens_at(model, text.piece)
            ids += drawn
            logprobs = np.asarray(next_logprobs(logits_of(model, jnp.asarray([ids])), jnp.asarray([ids])))[0]
            ends = np.flatnonzero(text.piece.boundaries)
            np.testing.assert_allclose(text.piece.logprobs[ends], logprobs[first - 1 : -1], rtol=1e-3, atol=1e-3)


def tokens_at(model, piece):
    """The tokens that were drawn, from where they end; of several with the same bytes the first."""
    ends = [0, *(np.flatnonzero(piece.boundaries) + 1).tolist()]
    return [model.symbols.index(piece.bytes[first:last]) for first, last in itertools.pairwise(ends)]


def test_generation_keeps_to_limits_utf8_and_stop_strings(flat):
    written = generate(flat, "Naïve", max_bytes=6, key=jax.random.key(1), valid=True, endless=True, chunk=8)
    (text,) = written.texts
    assert text.piece.bytes.decode()
    assert len(text.piece.bytes) == 6
    assert text.piece.finish == "length"
    greedy = generate(flat, "The", max_bytes=8, key=KEY, sampling=Sampling(0.0), chunk=8).texts[0].piece.bytes
    stopped = generate(flat, "The", max_bytes=8, key=KEY, sampling=Sampling(0.0), stop=[greedy[3:5]], chunk=8)
    assert stopped.texts[0].piece.bytes == greedy[: greedy.index(greedy[3:5])]
    with pytest.raises(ValueError, match="top_k must be a whole number from 1 to 280"):
        generate(flat, "The", max_bytes=8, key=KEY, sampling=Sampling(top_k=281))


def test_alphabets_know_what_may_follow():
    bytewise = byte_alphabet()
    assert (bytewise.bos, bytewise.eos) == (BOS, EOS)
    alphabet = Alphabet.of([*BYTES, "é".encode(), b"\xa9a", b""])
    state, left = jnp.asarray([0, 1, 0]), jnp.asarray([2, 2, 1])
    allowed = np.asarray(alphabet.allowed(state, left, valid=True, endless=True))
    assert allowed[:, 256:].tolist() == [[True, False, False], [False, True, False], [False, False, False]]
    assert not allowed[2, 0xC3]
    anything = np.asarray(alphabet.allowed(state, left, valid=False, endless=False))
    assert anything[:, 256:].tolist() == [[True, True, False], [True, True, False], [False, False, False]]
    assert anything[:, EOS].all()
    assert not anything[:, BOS].any()
    after = alphabet.next_state(jnp.asarray([0, 1]), jnp.asarray([256, 257]))
    assert after.tolist() == [0, 0]


def test_many_symbols_are_sorted_instead_of_compared():
    logits = jnp.round(jax.random.normal(KEY, (2, 700)), 1)
    weight = jax.random.uniform(jax.random.key(1), (2, 700))
    expected = np.where(np.asarray(logits)[:, None, :] > np.asarray(logits)[:, :, None], weight[:, None, :], 0.0)
    np.testing.assert_allclose(weight_of_more_likely(logits, weight), expected.sum(axis=-1), rtol=1e-4, atol=1e-4)


def test_a_model_of_tokens_is_saved_with_its_tokenizer(flat, nested, tmp_path):
    for model in (flat, nested):
        save(model, tmp_path)
        again = load(tmp_path).model
        assert isinstance(again, TokenModel)
        assert eqx.tree_equal(again, model)
        np.testing.assert_array_equal(again.encode(TEXT), model.encode(TEXT))


def test_flops_are_counted_per_byte_with_the_head(flat, nested):
    block = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(flat.inner.stage, eqx.is_inexact_array)))
    head = 280 * 8 + 8
    assert matrix_flops(flat, rate=0.25).total == pytest.approx(6 * 0.25 * (block + head))
    one = matrix_flops(nested.inner, rate=0.5).total
    assert matrix_flops(nested, rate=0.25, inner_rates=(0.5,)).total == pytest.approx(0.25 * one)
    assert layer_flops(nested, length=64, rate=0.25, inner_rates=(0.5,)).total == pytest.approx(
        0.25 * layer_flops(nested.inner, length=16, rate=0.5).total
    )
    with pytest.raises(ValueError, match="inside the tokenizer"):
        matrix_flops(nested, rate=0.25)


def test_losses_are_differentiable_and_bits_are_finite(flat):
    batch = flat.inputs(packed())
    gradient = eqx.filter_jit(eqx.filter_grad(lambda m, b: m.batch_loss(b, key=KEY).loss))(flat, batch)
    norm = float(jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient))))
    assert 0 < norm < math.inf
