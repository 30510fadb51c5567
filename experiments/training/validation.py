"""Forward passes of a model that trains, on the devices that it trains on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import final

import equinox as eqx
import jax
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from estimators import Layout
from estimators.sharding import BATCH_AXES
from experiments.evaluation.byte_results import (
    AbstractPass,
    Actions,
    ByteResults,
    evaluate_inputs,
    is_off_policy,
    tokens_of,
)
from experiments.training.placement import Placement
from experiments.training.sharding import assembled, on_host
from unet.language_model import AbstractLanguageModel
from unet.tokens.batch import TokenBatch

Read = tuple[Layout, TokenBatch | None, Actions]


@final
class PlacedPass(AbstractPass):
    """Passes of the model with these parameters, which stay where they lie: no device or process has all of them. Every process
    has to compute the same ones, `together`, and gets the results of all rows."""

    def __init__(
        self,
        placement: Placement,
        params: PyTree[Float[Array, ...]],
        static: AbstractLanguageModel,
        together: Callable[[], AbstractContextManager[object]] = nullcontext,
    ):
        self._placement, self._params, self._static, self._together = placement, params, static, together

    @property
    def off_policy(self) -> bool:
        return is_off_policy(self._static)

    def results(self, layout: Layout, key: PRNGKeyArray, capacity: int | None, actions: Actions = ()) -> ByteResults:
        rows = layout.bytes.shape[0]
        read = layout, tokens_of(self._static, layout, actions), actions
        if self._placement.alone:
            return evaluate_inputs(eqx.combine(self._params, self._static), *read[:2], key, capacity, actions)
        # Every device has as many rows: what is added repeats the first one, and is left out of the results.
        missing = -rows % self._placement.batch_shards
        filled = jax.tree.map(lambda leaf: np.concatenate([leaf, *[np.asarray(leaf)[:1]] * missing]), read)
        placed = self._placement.rows(filled)
        # Each pass by itself, so that a validation of many is not taken for an exchange that hangs.
        with self._together():
            results = _on_mesh(self._placement, self._params, self._static, placed, key, capacity)
            return jax.tree.map(lambda leaf: on_host(leaf)[:rows], results)


@eqx.filter_jit
def _on_mesh(
    placement: Placement,
    params: PyTree[Float[Array, ...]],
    static: AbstractLanguageModel,
    read: Read,
    key: PRNGKeyArray,
    capacity: int | None,
) -> ByteResults:
    specs, of_batch, same = placement.specs(params), PartitionSpec(BATCH_AXES), PartitionSpec()

    def on_each(parts: PyTree[Float[Array, ...]], own: Read, key: PRNGKeyArray) -> ByteResults:
        layout, tokens, actions = own
        return evaluate_inputs(assembled(parts, static, specs), layout, tokens, key, capacity, actions)

    # As in `unet.local_devices`: there is no gradient.
    placed = {"mesh": placement.mesh, "in_specs": (specs, of_batch, same), "out_specs": of_batch}
    return jax.shard_map(on_each, **placed, check_vma=False)(params, read, key)
