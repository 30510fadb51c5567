"""Distillation of a model of tokens into a hierarchy: what is aligned, the loss, and runs that do it."""

import dataclasses
import json
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from estimators import DynamicChunking, trainable
from estimators.equations import embedding_matching_loss, stage_multipliers
from estimators.objectives import Imitation
from experiments import evaluate as evaluate_module
from experiments import export as export_module
from experiments import run as run_module
from experiments.config.errors import ConfigError
from experiments.config.presets import PRESETS
from experiments.training.optimizer import multipliers
from experiments.training.run_dir import read_config
from experiments.training.setup import set_up
from experiments.training.stored import stored_model
from tests.conftest import needs
from tests.test_run import corpus as corpus
from tests.test_run import curve, message, start
from tests.test_run import usual_promotion as usual_promotion
from unet import (
    Adapted,
    GPT2Config,
    Hierarchy,
    LlamaConfig,
    TokenModel,
    UNet,
    UNetConfig,
    generate,
    load,
    save,
    save_tokens,
    train_tokenizer,
)
from unet.chunkers import Chunker, Select, Smooth
from unet.distillation import Alignment, Teacher, distilled, main_network, token_targets
from unet.flops import layer_flops, matrix_flops
from unet.layers import unit_rms
from unet.likelihood import plain_layout
from unet.tokens.batch import tokenised
from unet.tokens.spelling import ExpectedBytes, Spelling

needs("bpe", "tokenizers")

KEY = jax.random.key(0)
TEXT = b"the cat sat on the mat and the dog sat on the log; " * 4


@pytest.fixture(scope="module")
def teacher():
    tokenizer = train_tokenizer([TEXT * 10], 270)
    shape = LlamaConfig(dim=8, layers=1, heads=2, kv_heads=1, mlp_dim=16)
    return TokenModel(tokenizer, UNet(shape, None, key=KEY, vocab=tokenizer.size))


@pytest.fixture(scope="module")
def student(teacher):
    estimator = DynamicChunking(12, chunker=Chunker(Select(), Smooth()), target_rate=0.3)
    byte_level = UNet(UNetConfig(12, 2, 1, 1, 1, window=8), estimator, key=KEY)
    return distilled(byte_level, Teacher.of(teacher), 16, remat=False, attention="auto", key=KEY)


def rows_of(*texts: bytes) -> dict[str, np.ndarray]:
    """Rows of two documents each, the second of which begins in the middle, and padding at the end."""
    length = max(len(text) for text in texts) + 3
    made = {"bytes": np.zeros((len(texts), length), np.uint8), "segments": np.zeros((len(texts), length), np.int32)}
    mask = np.zeros((len(texts), length), bool)
    for row, text in enumerate(texts):
        made["bytes"][row, : len(text)], mask[row, : len(text)] = np.frombuffer(text, np.uint8), True
        made["segments"][row, len(text) // 2 :] = 1
    return {**made, "mask": mask}


def targets_of(teacher, batch, places):
    return token_targets(teacher.inputs(batch)["tokens"], batch, places)


@pytest.mark.parametrize("places", ["starts", "ends"])
def test_the_main_network_sees_the_tokens_of_the_teacher_one_after_another(teacher, places):
    batch = rows_of(TEXT[:41], TEXT[7:60])
    targets = targets_of(teacher, batch, places)
    tokens = tokenised(teacher.tokenizer, batch["bytes"], batch["segments"], batch["mask"])
    for row in range(2):
        for document in range(2):
            inside = batch["mask"][row] & (batch["segments"][row] == document)
            own = tokens.mask[row] & (tokens.segments[row] == document)
            ids, sites = (
                targets.tokens[row, targets.actions[row] & inside],
                np.flatnonzero(targets.actions[row] & inside),
            )
            # The last token has no next one that could begin.
            wanted, ends = tokens.ids[row, own], tokens.ends[row, own]
            wanted, ends = (wanted[:-1], ends[:-1]) if places == "starts" else (wanted, ends)
            np.testing.assert_array_equal(ids, wanted)
            # The first byte of a document is a token that closes at once.
            moved = (places == "starts") * (np.arange(len(ends)) > 0)
            np.testing.assert_array_equal(sites, ends + moved)
    assert not targets.actions[~batch["mask"]].any()


def test_the_last_token_of_a_full_row_may_go_on_and_is_left_out(teacher):
    """A row that ends inside " the", the same row where a document ends with it, and one whose last byte begins a document."""
    text = b"\xfethe cat sat on th"
    size = len(text)
    values = np.zeros((3, size + 1), np.uint8)
    values[:, :size], segments, mask = (
        np.frombuffer(text, np.uint8),
        np.zeros((3, size + 1), np.int32),
        np.ones((3, size + 1), bool),
    )
    mask[1, size:] = False
    values[0, size], values[2, size] = ord("e"), 254
    segments[2, size] = 1
    batch = {"bytes": values, "segments": segments, "mask": mask}
    full = {name: value[:, :size] for name, value in batch.items()}
    ids = [teacher.tokenizer.encode(part).tolist() for part in (text[:1], text[1:])]
    ends = np.cumsum([len(teacher.tokenizer.tokens[one]) for part in ids for one in part]) - 1
    assert ends[-1] == size - 1
    # Full, and cut.
    cut = targets_of(teacher, {name: value[:1] for name, value in full.items()}, "ends")
    assert np.flatnonzero(cut.actions[0]).tolist() == ends[:-1].tolist()
    assert cut.tokens[0, ends[:-1]].tolist() == [one for part in ids for one in part][:-1]
    assert not cut.tokens[0, -1]
    # Its document ends before the row does.
    whole = targets_of(teacher, batch, "ends")
    assert np.flatnonzero(whole.actions[1]).tolist() == ends.tolist()
    # The first byte of a document is a token by itself.
    assert np.flatnonzero(whole.actions[2]).tolist() == [*ends.tolist(), size]


def test_stages_learn_at_the_width_of_the_teacher(student):
    preset = PRESETS["tiny"]
    config = dataclasses.replace(
        preset,
        unet=UNetConfig(12, 2, 1, 1, 1, window=8),
        estimator="hnet",
        rate=0.25,
        distill=dataclasses.replace(preset.distill, teacher="one of width 8"),
        optimizer=dataclasses.replace(preset.optimizer, stage_multipliers=4.6),
    )
    assert config.unet.widths[-1] != 8
    outer, inner = stage_multipliers([4.0], [config.unet.widths[0], 8], 4.6)
    found = multipliers(config, eqx.filter(student, eqx.is_inexact_array))
    assert set(jax.tree.leaves((found.embedding, found.stage.encoder, found.stage.decoder))) == {outer}
    assert set(jax.tree.leaves(found.stage.inner)) == {inner}


def test_the_loss_is_relative_to_the_size_of_the_embeddings():
    wanted = jnp.asarray([[[3.0, 4.0], [0.0, 5.0], [7.0, 7.0]]])
    mask = jnp.asarray([[True, True, False]])
    assert float(embedding_matching_loss(wanted, wanted, mask)) == 0.0
    assert float(embedding_matching_loss(jnp.zeros_like(wanted), wanted, mask)) == 1.0
    vectors = wanted.at[0, 0, 0].add(5.0).at[0, 2].set(1e6)
    assert float(embedding_matching_loss(vectors, wanted, mask)) == pytest.approx(25.0 / 50.0)
    assert not jnp.any(jax.grad(lambda one: embedding_matching_loss(vectors, one, mask))(wanted))
    assert float(embedding_matching_loss(vectors, wanted, jnp.zeros_like(mask))) == 0.0


def test_alignment_teaches_boundaries_and_embeddings(teacher, student):
    """One batch learned by heart: the parts of the loss are those of its definition, and all of them fall."""
    batch = {name: jnp.asarray(value) for name, value in rows_of(TEXT[:41], TEXT[7:60]).items()}
    targets = targets_of(teacher, rows_of(TEXT[:41], TEXT[7:60]), "starts")
    tokens, spelling = teacher.inputs(rows_of(TEXT[:41], TEXT[7:60]))["tokens"], Spelling.of(teacher.tokenizer.written)
    whole = {**batch, "targets": targets, "tokens": tokens, "next_bytes": spelling.next_bytes(tokens, 56)}
    expected = ExpectedBytes(teacher, spelling)
    alignment = Alignment(teacher.inner.embedding, Imitation(2.0), expected, embedding_weight=0.5, byte_weight=0.25)
    params, static = eqx.partition(student, trainable(student))
    adam = optax.adam(1e-2)

    @jax.jit
    def step(params, moments):
        def loss(params):
            output = alignment(eqx.combine(params, static), whole, capacity=48)
            return output.loss, output

        gradient, output = jax.grad(loss, has_aux=True)(params)
        updates, moments = adam.update(gradient, moments)
        return eqx.apply_updates(params, updates), moments, output

    moments, outputs = adam.init(params), []
    for _ in range(120):
        params, moments, output = step(params, moments)
        outputs.append(output)
    first, last = outputs[0], outputs[-1]
    metrics = first.metrics
    parts = -first.log_prob + 2.0 * metrics["imitation_loss"] + 0.5 * metrics["embedding_loss"]
    assert float(first.loss) == pytest.approx(float(parts + 0.25 * metrics["byte_loss"]), rel=1e-6)
    assert float(first.rate) == pytest.approx(targets.actions.sum() / batch["mask"].sum())
    assert float(first.overflow) == 0.0
    assert float(last.metrics["imitation_loss"]) < 0.5 * float(metrics["imitation_loss"])
    assert float(last.metrics["embedding_loss"]) < 0.5 * float(metrics["embedding_loss"])
    assert float(last.metrics["byte_loss"]) < float(metrics["byte_loss"])
    assert float(last.log_prob) > float(first.log_prob)


def test_the_model_is_one_as_any_other(teacher, student, tmp_path):
    assert eqx.tree_equal(main_network(student), teacher.inner.stage)
    save(student, tmp_path)
    loaded = load(tmp_path).model
    assert eqx.tree_equal(loaded, student)
    text = generate(loaded, ["the c"], max_bytes=4, key=KEY).texts[0].text
    assert text == generate(student, ["the c"], max_bytes=4, key=KEY).texts[0].text
    # Cached generation gives the probabilities of a full pass.
    assert matrix_flops(student, rate=0.3).mid > 0 < layer_flops(student, length=64, rate=0.3).mid


def test_embeddings_of_bytes_add_up_to_those_of_the_longest_token(teacher):
    shape = UNetConfig(8, 2, 1, 1, 1, window=8, ngrams=(2, 3, 4), ngram_buckets=5000, ngram_functions=2)
    estimator = DynamicChunking(8, chunker=Chunker(Select(), Smooth()), target_rate=0.3)
    model = UNet(shape, estimator, key=KEY)
    made = distilled(model, Teacher.of(teacher), 16, remat=False, attention="auto", key=KEY)
    text = b"the dog sat on the mat"
    tokens = teacher.tokenizer.tokens
    short = {token: number for number, token in reversed(list(enumerate(tokens))) if 0 < len(token) <= 4}
    longest = [
        short[next(text[first : end + 1] for first in range(end + 1) if text[first : end + 1] in short)]
        for end in range(len(text))
    ]
    embedded = made.embed(plain_layout(jnp.frombuffer(text, jnp.uint8)[None]))
    assert max(len(tokens[number]) for number in longest) == 4
    np.testing.assert_allclose(embedded[0], teacher.inner.embedding[jnp.asarray(longest)], atol=1e-6)
    # As wide as the teacher, the first adapter begins as its norm, in the size of the embeddings.
    assert isinstance(made.stage, Hierarchy)
    assert isinstance(made.stage.inner, Adapted)
    entered = made.stage.inner.enter(embedded)
    size = jnp.sqrt(jnp.mean(teacher.inner.embedding**2))
    np.testing.assert_allclose(entered, unit_rms(embedded, 1e-5) * size, rtol=1e-5, atol=1e-7)


def test_what_does_not_fit_together_is_refused(teacher, student):
    byte_model = UNet(UNetConfig(12, 2, 1, 1, 1, window=8), None, key=KEY)
    with pytest.raises(ValueError, match="with one token level"):
        distilled(byte_model, Teacher.of(teacher), 16, remat=False, attention="auto", key=KEY)
    nested = TokenModel(teacher.tokenizer, student)
    with pytest.raises(ValueError, match="has 1 levels of its own"):
        Teacher.of(nested)


SMALL = (
    *("--model", "hnet-tiny", "--unet.layout", '["T1", ["T1"], "T1"]', "--unet.dims", "12", "12"),
    *("--unet.mlp-dims", "8", "8", "--unet.heads", "2", "2", "--unet.rotary-dims", "2", "2", "--rate", "0.4"),
    *("--length", "32", "--batch", "4", "--steps", "4", "--devices", "1", "--buckets", "1"),
    *("--evaluation.bytes", "128", "--evaluation.times", "1", "--checkpoint.times", "2", "--distill.adapter-dim", "8"),
    *("--target.control", "0.1"),
)


@pytest.fixture(scope="module")
def published(teacher, tmp_path_factory):
    """The teacher as transformers would keep it."""
    folder = tmp_path_factory.mktemp("teacher") / "llama"
    save_tokens(teacher, folder)
    return folder


@pytest.fixture(scope="module")
def finished(corpus, published, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert start("--dataset", corpus, "--distill.teacher", published, "--out", folder, *SMALL) == 0
    return folder


def test_a_distilled_run_is_aligned_first_and_then_a_run_as_any_other(finished, published, teacher, tmp_path):
    steps = [record for record in curve(finished) if "loss" in record]
    assert ["embedding_loss" in record for record in steps] == [True, True, False, False]
    assert ["byte_loss" in record for record in steps] == [True, True, False, False]
    assert ["ratio_loss" in record for record in steps] == [False, False, True, True]
    # The controller begins when boundaries are the router's.
    aimed = [record["aimed_rate"] for record in steps]
    assert aimed[:3] == pytest.approx([0.4] * 3, rel=1e-6)
    assert abs(aimed[3] - 0.4) > 1e-3
    figures = json.loads((finished / "summary.json").read_text())
    assert figures["vocabulary"] == teacher.tokenizer.size
    # At the teacher's rate, not only at --rate.
    assert figures["capacity"] == 32 > 1.35 * 0.5 * 32
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "summary.json").unlink()
    shutil.rmtree(copy / "checkpoints" / "4")
    aligned, step = stored_model(copy)
    assert step == 2
    # Held until then, and moved since.
    assert eqx.tree_equal(main_network(aligned.unet), teacher.inner.stage)
    assert not eqx.tree_equal(main_network(load(finished).model.unet), teacher.inner.stage)
    # The teacher is kept with the run.
    hidden = published.rename(published.with_name("away"))
    try:
        assert start("--resume", "--out", copy) == 0
    finally:
        hidden.rename(published)
    assert curve(copy) == curve(finished)
    assert (copy / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def test_another_end_leaves_the_alignment_where_it_was(finished, tmp_path, monkeypatch):
    """A run of four steps, the first two of them aligned, goes on to ten, and then to twenty."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)

    def stopped(*arguments, **callbacks):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "train", stopped)
    assert start("--resume", "--out", copy, "--steps", "10") == 130
    assert (read_config(copy).total_steps, read_config(copy).align_steps) == (10, 2)
    for end, aligned in (((), 2), (("--steps", "20"), 2), (("--bytes", "2560"), 2)):
        assert run_module.parse(["--resume", "--out", str(copy), *end]).align_steps == aligned
    # A new run with its settings is aligned for half of itself.
    assert run_module.parse(["--config", str(finished / "config.json"), "--steps", "20"]).align_steps == 10


def test_it_is_exported_and_evaluated(finished, tmp_path, capsys):
    assert export_module.main([str(finished), "--to", str(tmp_path / "model")]) == 0
    (tmp_path / "text").write_text("words of a text")
    arguments = ["--text", str(tmp_path / "text"), "--cache", str(tmp_path / "cache"), "--json", "--context", "16"]
    capsys.readouterr()
    assert evaluate_module.main([str(tmp_path / "model"), *arguments]) == 0
    (found,) = json.loads(capsys.readouterr().out)["models"]
    assert np.isfinite(found["bpb"])
    assert export_module.main([str(finished), "--to", str(tmp_path / "hnet"), "--layout", "hnet-safetensors"]) == 2
    assert "the released layout has no Adapted" in message(capsys)


def test_a_teacher_with_learned_positions_needs_enough_of_them(corpus, teacher, tmp_path, capsys):
    """A GPT-2 of 16 positions: its layers go on counting tokens, and sequences may not be longer than they."""
    shape = GPT2Config(dim=8, layers=1, heads=2, mlp_dim=16, positions=16)
    model = TokenModel(teacher.tokenizer, UNet(shape, None, key=KEY, vocab=teacher.tokenizer.size))
    save_tokens(model, tmp_path / "gpt2")
    out = ("--dataset", corpus, "--out", tmp_path / "run", *SMALL, "--distill.teacher", tmp_path / "gpt2")
    assert start(*out) == 2
    assert "has embeddings of 16 positions, and --length 32 may have" in message(capsys)


def test_bad_input_is_one_sentence(finished, corpus, published, tmp_path, capsys):
    out = ("--dataset", corpus, "--out", tmp_path / "run", *SMALL)
    for arguments, sentence in (
        (("--distill.teacher", tmp_path / "missing"), "there is no file or folder"),
        (("--distill.teacher", finished), "is a model of bytes: name one of tokens"),
        (("--distill.teacher", published, "--estimator", "spacelike"), "draws boundaries by a rule"),
        (("--distill.teacher", published, "--estimator", "bpe"), "is prepared from text"),
        (("--distill.teacher", published, "--tokenizer.source", "bpe"), "leave out --tokenizer.source"),
        (("--distill.teacher", published, "--model", "hnet-2stage-tiny"), "one level of tokens"),
        (("--distill.teacher", published, "--distill.embedding-weight", "-1"), "--distill.embedding-weight must be"),
    ):
        given = [one for one in out if arguments[-1] != "hnet-2stage-tiny" or one in (*out[:4],)]
        assert start(*given, *arguments) == 2, arguments
        assert sentence in message(capsys)
    assert not (tmp_path / "run").exists()


def test_settings_of_a_distillation_need_a_teacher():
    with pytest.raises(
        ConfigError, match=r"^--distill\.align-bytes, --distill\.byte-weight: there is no --distill\.teacher"
    ):
        run_module.parse(["--distill.byte-weight", "0.5", "--distill.align-bytes", "1000"])


def test_of_long_rows_the_tokens_without_room_are_cut_off(teacher, corpus, published):
    """So that one program computes all batches."""
    arguments = [*SMALL, "--dataset", str(corpus), "--distill.teacher", str(published)]
    stage = set_up(run_module.parse(arguments)).alignment
    assert stage is not None
    stage = dataclasses.replace(stage, capacity=16)
    short, long = (np.full((4, 32), 254, np.uint8) for _ in range(2))
    short[:, 1:] = np.frombuffer((TEXT * 2)[:31], np.uint8)
    # Every byte is a token.
    long[:, 1:] = np.arange(128, 159)
    rest = {"segments": np.zeros((4, 32), np.int32), "mask": np.ones((4, 32), bool)}
    read = [stage.inputs({"bytes": bytes, **rest}) for bytes in (short, long)]
    assert [jax.tree.map(np.shape, one["tokens"]).ids for one in read] == [(4, 16), (4, 16)]
    assert read[1]["next_bytes"].mask.sum() == 4 * 15
    assert not read[1]["next_bytes"].mask[:, 16:].any()
    without = dataclasses.replace(stage.config.distill, byte_weight=0.0)
    plain = dataclasses.replace(stage, config=dataclasses.replace(stage.config, distill=without))
    assert plain.alignment.expected is None
    assert set(plain.inputs({"bytes": short, **rest})) == {"bytes", "segments", "mask", "targets"}
