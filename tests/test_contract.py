"""One contract that every registered estimator keeps."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from estimators.registry import ESTIMATORS
from tests.compositions import LENGTH, SHAPE, registered, trains
from tests.conftest import text_bytes
from unet.files.saving import load, save
from unet.hierarchy import StageSampling
from unet.likelihood import plain_layout

BOUNDED = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module", params=sorted(ESTIMATORS.house))
def model(request):
    return registered(request.param)


def layout_inputs():
    """Three rows: one document, two documents, one document and padding."""
    segments = jnp.zeros((3, LENGTH), jnp.int32).at[1, 11:].set(1)
    mask = jnp.ones((3, LENGTH), bool).at[2, 15:].set(False)
    bytes = text_bytes(3, LENGTH).at[1, 11].set(254)
    return bytes, segments, mask


@eqx.filter_jit
def forward(model, bytes, segments, mask, key, actions, capacities):
    return model(bytes, key=key, segments=segments, mask=mask, actions=actions, capacities=capacities)


def run(model, bytes, segments, mask, actions=(), capacities=(), greedy=False):
    key = None if greedy else jax.random.key(3)
    return forward(model, bytes, segments, mask, key, actions, capacities)


def test_shapes_dtypes_and_finite_logits(model):
    prediction = run(model, *layout_inputs())
    assert prediction.logits.shape == (3, LENGTH, 256)
    assert prediction.logits.dtype == jnp.float32
    assert jnp.all(jnp.isfinite(prediction.logits))
    boundaries = prediction.levels[0].boundaries
    assert boundaries.actions.dtype == bool
    assert jnp.all((boundaries.probs >= 0) & (boundaries.probs <= 1))


def test_boundaries_stand_at_document_starts_and_never_on_padding(model):
    bytes, segments, mask = layout_inputs()
    boundaries = run(model, bytes, segments, mask).levels[0].boundaries
    assert jnp.all(boundaries.actions[:, 0])
    assert boundaries.actions[1, 11]
    assert not jnp.any(boundaries.actions & ~mask)
    assert not jnp.any(boundaries.decided & ~mask)
    assert not boundaries.decided[1, 11]
    assert not jnp.any(boundaries.decided[:, 0])


def test_greedy_boundaries_need_no_key_and_are_the_likelier_actions(model):
    bytes, segments, mask = layout_inputs()
    boundaries = run(model, bytes, segments, mask, greedy=True).levels[0].boundaries
    free = mask.at[:, 0].set(False).at[1, 11].set(False)
    np.testing.assert_array_equal(boundaries.actions[free], (boundaries.probs > 0.5)[free])


def test_given_actions_are_taken_as_they_are(model):
    bytes, segments, mask = layout_inputs()
    actions = jnp.zeros((3, LENGTH), bool).at[:, ::4].set(True)
    boundaries = run(model, bytes, segments, mask, actions=(actions,)).levels[0].boundaries
    np.testing.assert_array_equal(boundaries.actions, (actions.at[:, 0].set(True).at[1, 11].set(True)) & mask)


@pytest.mark.parametrize("place", [5, 11, 17])
def test_changing_a_byte_moves_nothing_before_it(model, place):
    bytes, segments, mask = layout_inputs()
    changed = bytes.at[:, place].set(33)
    before, after = run(model, bytes, segments, mask), run(model, changed, segments, mask)
    np.testing.assert_allclose(before.logits[:, :place], after.logits[:, :place], **BOUNDED)
    old, new = before.levels[0].boundaries, after.levels[0].boundaries
    np.testing.assert_array_equal(old.actions[:, :place], new.actions[:, :place])
    np.testing.assert_allclose(old.probs[:, :place], new.probs[:, :place], **BOUNDED)
    assert not np.allclose(before.logits[0, place], after.logits[0, place], **BOUNDED)


def test_no_gradient_reaches_an_embedding_from_an_earlier_prediction(model):
    bytes, segments, mask = layout_inputs()
    actions = run(model, bytes, segments, mask).levels[0].boundaries.actions
    layout = plain_layout(bytes, segments, mask)

    def energy(offset, place):
        output = model.stage(model.embed(layout) + offset, layout, StageSampling(None, (actions,)))
        return jnp.sum(model.head(model.norm(output.hidden))[0, place] ** 2)

    gradient = jax.jit(jax.grad(energy), static_argnums=1)(jnp.zeros((3, LENGTH, SHAPE.dim)), 9)
    assert not jnp.any(gradient[0, 10:])
    assert not jnp.any(gradient[1:])
    assert jnp.any(gradient[0, 9])


def test_a_row_of_a_batch_equals_that_row_among_others(model):
    bytes, segments, mask = layout_inputs()
    actions = run(model, bytes, segments, mask).levels[0].boundaries.actions
    together = run(model, bytes, segments, mask, actions=(actions,))
    others = (text_bytes(3, LENGTH, seed=1), jnp.zeros((3, LENGTH), jnp.int32), jnp.ones((3, LENGTH), bool))
    everywhere = jnp.ones((3, LENGTH), bool)
    for b in range(3):
        inputs = [other.at[1].set(own[b]) for other, own in zip(others, (bytes, segments, mask), strict=True)]
        moved = run(model, *inputs, actions=(everywhere.at[1].set(actions[b]),))
        np.testing.assert_allclose(together.logits[b], moved.logits[1], **BOUNDED)
        before, after = (p.levels[0].boundaries.logits for p in (together, moved))
        np.testing.assert_allclose(before[b], after[1], **BOUNDED)


def test_documents_in_one_row_do_not_see_each_other(model):
    bytes, segments, mask = layout_inputs()
    actions = run(model, bytes, segments, mask).levels[0].boundaries.actions
    together = run(model, bytes, segments, mask, actions=(actions,))
    length = LENGTH - 11
    alone = run(
        model,
        bytes.at[0, :length].set(bytes[1, 11:]),
        segments,
        mask.at[0, length:].set(False),
        actions=(actions.at[0, :length].set(actions[1, 11:]),),
    )
    np.testing.assert_allclose(together.logits[1, 11:], alone.logits[0, :length], **BOUNDED)


def test_a_model_goes_out_and_comes_back(model, tmp_path):
    save(model, tmp_path)
    back = load(tmp_path).model
    assert jax.tree.structure(back) == jax.tree.structure(model)
    for one, other in zip(jax.tree.leaves(model), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(one, other)


def test_losses_and_gradients_are_finite_and_reach_what_they_should(model):
    bytes, segments, mask = layout_inputs()

    @eqx.filter_jit
    def gradient(model):
        return eqx.filter_grad(
            lambda m: m.loss(bytes, key=jax.random.key(0), segments=segments, mask=mask, capacities=(12,)).loss
        )(model)

    gradients = gradient(model)
    for path, leaf in jax.tree_util.tree_leaves_with_path(trains(gradients)):
        assert jnp.all(jnp.isfinite(leaf)), jax.tree_util.keystr(path)
        assert jnp.any(leaf), f"no gradient at {jax.tree_util.keystr(path)}"


def test_too_little_capacity_is_counted_and_bounds_the_tokens(model):
    bytes, segments, mask = layout_inputs()
    everywhere = jnp.ones((3, LENGTH), bool)
    tight = run(model, bytes, segments, mask, actions=(everywhere,), capacities=(6,)).levels[0]
    assert jnp.all(tight.lengths <= 6)
    np.testing.assert_array_equal(tight.lengths + tight.overflow, jnp.sum(mask, axis=1))
    np.testing.assert_array_equal(jnp.sum(tight.boundaries.actions, axis=1), tight.lengths)
    assert not jnp.any(run(model, bytes, segments, mask).levels[0].overflow)


def test_too_little_capacity_never_leaves_a_document_with_its_neighbours_token(model):
    bytes, segments, mask = layout_inputs()
    everywhere = (jnp.ones((3, LENGTH), bool),)
    changed = bytes.at[1, 3].set(33)
    before, after = (run(model, text, segments, mask, actions=everywhere, capacities=(6,)) for text in (bytes, changed))
    assert before.levels[0].boundaries.actions[1, 11]
    np.testing.assert_allclose(before.logits[1, 11:], after.logits[1, 11:], **BOUNDED)
    assert not np.allclose(before.logits[1, 3:11], after.logits[1, 3:11], **BOUNDED)
