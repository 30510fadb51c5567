"""What a user does without thinking works or is refused in one sentence, and settings of JAX change no promise."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from estimators import BatchCentre, Discount, EarlyExit, Estimator, ScoreFunctionObjective, trainable
from estimators.base import uniforms_from
from estimators.registry import ESTIMATORS
from experiments.config.build import build_byte_model
from tests.compositions import config_of, prepared_for, registered
from tests.conftest import losses, small_model, small_score_function, text_bytes
from unet import Chunker, Distribute, Select, UNet, UNetConfig, generate, load, save, score
from unet.decoding.score import keys_of

KEY = jax.random.key(3)


@contextlib.contextmanager
def wide():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


SETTINGS = {
    "x64": wide,
    "debug_nans": lambda: jax.debug_nans(True),
    "rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
    "rbg": lambda: jax.default_prng_impl("rbg"),
}


@pytest.mark.parametrize("name", ["sfe", "hnet", "uniform"])
@pytest.mark.parametrize("setting", sorted(SETTINGS))
def test_settings_of_jax_change_no_promise(setting, name):
    with SETTINGS[setting]():
        model, bytes = registered(name), text_bytes(2, 16)
        assert {leaf.dtype for leaf in jax.tree.leaves(model) if eqx.is_inexact_array(leaf)} == {jnp.dtype("float32")}
        gradient = eqx.filter_jit(
            eqx.filter_grad(lambda m: m.loss(bytes, key=jax.random.key(0), capacities=((8, 16),)).loss)
        )(model)
        assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(3), jnp.arange(2))
        both = generate(model, ["so", "a man"], max_bytes=6, key=keys, chunk=6).texts
        alone = generate(model, "a man", max_bytes=6, key=keys[1:], chunk=6).texts[0]
        assert both[1].piece.bytes == alone.piece.bytes
        np.testing.assert_array_equal(both[1].piece.boundaries, alone.piece.boundaries)
        assert np.isfinite(score(model, "so it goes", key=jax.random.key(0))[0].log_prob)


@pytest.mark.parametrize("name", sorted(ESTIMATORS.house))
def test_under_64_bit_types_a_model_has_the_same_values_and_everything_is_float32(name):
    def built() -> UNet:
        config = config_of(name)
        return build_byte_model(config, jax.random.key(0), prepared_for(config))

    usual = built()
    # Nothing relies on the user's setting of rank promotion either, in gradients written by hand too.
    with wide(), jax.numpy_rank_promotion("raise"):
        model, bytes = built(), text_bytes(2, 16)

        def loss(model):
            return model.loss(bytes, key=KEY, capacities=((8, 16),))

        gradient = eqx.filter_grad(lambda model: loss(model).loss)
        computed = eqx.filter_eval_shape(lambda m: (loss(m), gradient(m), m(bytes, key=KEY)), model)
        kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(computed) if hasattr(leaf, "dtype")}
        assert "float64" not in kinds
    assert eqx.tree_equal(usual, model)


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_the_keys_of_texts_depend_on_themselves_alone(kind):
    keys = jax.random.split(jax.random.key(0, impl=kind), 4)
    made = keys_of(keys, 4)
    assert str(jax.random.key_impl(made)) == "threefry2x32"
    data = np.asarray(jax.random.key_data(made))
    assert len({tuple(row) for row in data.tolist()}) == 4
    for number in range(4):
        alone = keys_of(keys[number : number + 1], 1)
        np.testing.assert_array_equal(jax.random.key_data(alone)[0], data[number])
    if kind == "threefry2x32":
        np.testing.assert_array_equal(data, jax.random.key_data(keys))
    else:
        # Every word of a longer key counts.
        words = np.array(jax.random.key_data(keys[:1]))
        words[0, 3] ^= 1
        other = keys_of(jax.random.wrap_key_data(jnp.asarray(words), impl=kind), 1)
        assert not np.array_equal(jax.random.key_data(other)[0], data[0])
    one, several = (keys_of(jax.random.key(1, impl=kind), count) for count in (1, 3))
    np.testing.assert_array_equal(jax.random.key_data(one)[0], jax.random.key_data(several)[0])


def test_uniform_numbers_of_a_text_are_the_same_under_64_bit_types():
    first = jnp.zeros((2,), jnp.int32)
    usual = uniforms_from(jax.random.split(KEY, 2), first, 5)
    with wide():
        np.testing.assert_array_equal(usual, uniforms_from(jax.random.split(KEY, 2), first, 5))


def test_one_array_of_actions_and_one_capacity_are_those_of_the_outermost_level():
    model, bytes = registered("sfe"), text_bytes(2, 24)
    actions = jnp.zeros((2, 24), bool).at[:, ::4].set(True)
    one, listed = (eqx.filter_jit(lambda m, a=a: m(bytes, actions=a).logits)(model) for a in (actions, (actions,)))
    np.testing.assert_array_equal(one, listed)
    assert (
        losses(model, bytes, key=KEY, capacities=4).overflow == losses(model, bytes, key=KEY, capacities=(4,)).overflow
    )


def test_one_text_is_a_list_of_one():
    model = registered("sfe")
    assert generate(model, "so", max_bytes=4, key=KEY, stop="END", chunk=4).texts[0].prompt == b"so"
    assert [one.bytes for one in score(model, "abc", contexts="so", key=KEY)] == [3]


def test_a_list_of_reductions_trains_and_is_saved_to_a_folder_that_is_made(tmp_path):
    objective = ScoreFunctionObjective([EarlyExit(), Discount(0.9), BatchCentre()], target_rate=0.2)
    model = small_model(Estimator(small_score_function().router, Chunker(Select(), Distribute()), objective))
    path = save(model, str(tmp_path / "deep" / "folder"))
    assert jax.tree.structure(load(path.parent).model) == jax.tree.structure(model)


def test_frozen_parts_and_integers_stay_as_they_are_in_any_loop():
    for name in ("entropy", "bpe"):
        model, bytes = registered(name), text_bytes(2, 16)
        params, static = eqx.partition(model, trainable(model))
        optimizer = optax.adamw(1e-2, weight_decay=0.1)

        @eqx.filter_jit
        def step(params, static=static, optimizer=optimizer, bytes=bytes):
            gradient = eqx.filter_grad(lambda p: eqx.combine(p, static).loss(bytes, key=KEY).loss)(params)
            updates, _ = optimizer.update(gradient, optimizer.init(params), params)
            return eqx.apply_updates(params, updates)

        # Optax leaves the promotion of a step's number to jax.
        with jax.numpy_dtype_promotion("standard"):
            moved = eqx.combine(step(params), static)
        before, after = (one.stage.estimators[0].router for one in (model, moved))
        assert eqx.tree_equal(before, after)
        assert not eqx.tree_equal(model.embedding, moved.embedding)


def test_the_shapes_of_a_model_train_where_its_arrays_do():
    for name in ("entropy", "bpe"):
        model = registered(name)
        shapes = eqx.filter_eval_shape(lambda model=model: model)
        assert jax.tree.leaves(trainable(shapes)) == jax.tree.leaves(trainable(eqx.filter(model, eqx.is_array)))
        assert any(jax.tree.leaves(trainable(shapes)))


WRONG = """
import equinox as eqx, jax, jax.numpy as jnp
from estimators import Estimator, NoObjective, ScoreFunction, WindowedPolicy
from unet import Chunker, Distribute, Select, UNet, UNetConfig, generate, score

chunker, router = Chunker(Select(), Distribute()), WindowedPolicy(16, window=2)
shape = UNetConfig(16, 2, 1, 1, 1, window=4)
model = UNet(shape, ScoreFunction(16, chunker=chunker, window=2), key=jax.random.key(0))
key = jax.random.key(1)
cases = [
    (lambda: model(jnp.full((1, 8), 300)), "bytes must lie between 0 and 255; got 300"),
    (lambda: model.loss(jnp.full((1, 8), -1), key=None), "bytes must lie between 0 and 255; got -1"),
    (lambda: model(jnp.zeros((1, 8))), "integers, batch x length (one text: text[None]); got float32 (1, 8)"),
    (lambda: model(jnp.zeros(8, int)), "integers, batch x length (one text: text[None]); got int32 (8,)"),
    (lambda: model(b"text"), "must be integers"),
    (lambda: Estimator(chunker, router, NoObjective()), "the router of a Estimator must be an AbstractRouter; got a Chunker"),
    (lambda: Estimator(router, router, NoObjective()), "must be an AbstractChunker; got a WindowedPolicy"),
    (lambda: UNet(shape, ScoreFunction(32, chunker=chunker), key=jax.random.key(0)), "width 32, but this shape has 16 there"),
    (lambda: UNetConfig(16.0, 2, 1, 1, 1), "dim must be a whole number from 1 to 65536; got 16.0"),
    (lambda: generate(model, [b"a", 3], max_bytes=4, key=key), "text 1 must be a string or bytes; got a int"),
    (lambda: generate(model, ["a"], max_bytes=4, key=key, stop=[None]), "text 0 must be a string or bytes"),
    (lambda: generate(model, ["a"], max_bytes=4.5, key=key), "max_bytes must be a whole number from 1"),
    (lambda: score(model, [["a"]], key=key), "text 0 must be a string or bytes; got a list"),
    (lambda: score(model, ["a"], contexts=[0], key=key), "text 0 must be a string or bytes; got a int"),
    (lambda: score(model, ["a", "b"], contexts="ab", key=key), "1 contexts for 2 texts"),
    (lambda: score(model, ["a" + chr(0xD83D)], key=key), "text 0 holds half a surrogate pair at 1"),
    (lambda: score(model, ["a"], key=7), "must be one of JAX, such as jax.random.key(0); got a int"),
    (lambda: score(model, ["a"], key=jax.random.split(key, (2, 2))), "got keys of shape (2, 2)"),
]
for number, (case, message) in enumerate(cases):
    try:
        case()
    except (ValueError, TypeError) as error:
        assert message in str(error), (number, str(error))
    else:
        raise AssertionError(number)
print("refused", len(cases))
"""


def test_what_cannot_be_meant_is_refused_without_checks_of_types():
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", WRONG], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "refused 18\n", done.stderr[-2000:]


def test_a_shape_of_another_width_is_refused_where_the_model_is_made():
    with pytest.raises(
        ValueError, match="the router of level 0 reads hidden states of width 16, but this shape has 32"
    ):
        UNet(UNetConfig(32, 2, 1, 1, 1, window=4), small_score_function(), key=KEY)
