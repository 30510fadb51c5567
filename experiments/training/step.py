"""One training step: the loss, its gradient, and the optimizer."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from experiments.config.settings import RunConfig
from experiments.training.placement import ModelOf, Placement
from experiments.training.target import TargetSchedule, TargetState
from unet.blocks import computed
from unet.language_model import AbstractLanguageModel
from unet.losses import LossOutput, level_prefix


class TrainState(eqx.Module):
    """The arrays that training changes: the parameters (a model without its static parts), the optimizer's moments, and
    what `target_rate` keeps."""

    params: PyTree[Float[Array, ...]]
    optimizer: PyTree[Array]
    target: TargetState


def fresh_state(params: PyTree[Float[Array, ...]], optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(params, optimizer.init(params), TargetState())


class StepMetrics(eqx.Module):
    """What a step reports: its losses, the norm of the gradient before clipping, of all of it and by part, and the rate its
    estimator aimed at."""

    output: LossOutput
    gradient_norm: Float[Array, ""]
    aimed_rate: Float[Array, ""]
    gradient_norms: dict[str, Float[Array, ""]]


Inputs = Mapping[str, PyTree[Array]]
"""What `AbstractLanguageModel.inputs` makes of a batch of text."""
Step = Callable[[TrainState, Inputs, PRNGKeyArray], tuple[TrainState, StepMetrics]]


Loss = Callable[[AbstractLanguageModel, Inputs, PRNGKeyArray, Float[Array, ""]], LossOutput]
"""The loss of a model on a batch, with a key and the target rate."""


def own_loss(config: RunConfig, capacities: Sequence[int | Sequence[int]]) -> Loss:
    """The loss of a run's models themselves; `capacities` as `UNet.loss` takes them."""

    def loss(
        model: AbstractLanguageModel, batch: Inputs, key: PRNGKeyArray, target_rate: Float[Array, ""]
    ) -> LossOutput:
        return model.batch_loss(batch, key=key, target_rate=target_rate, capacities=capacities, samples=config.samples)

    return loss


def make_step(
    config: RunConfig,
    static: AbstractLanguageModel,
    optimizer: optax.GradientTransformation,
    *,
    loss: Loss,
    remat: bool | None = None,
    placement: Placement | None = None,
    held: PyTree[bool] | None = None,
) -> Step:
    """The training step of a run that minimises `loss`. `remat`: whether blocks are computed twice (None: as the model says).
    `placement`: its devices (None: one). `held`: True for parameters that do not move, whose moments follow their gradients."""
    schedule, accumulate = TargetSchedule.of(config), config.optimizer.accumulate

    def loss_of(
        params: PyTree[Array], model_of: ModelOf, batch: Inputs, key: PRNGKeyArray, target_rate: Float[Array, ""]
    ) -> tuple[Float[Array, ""], LossOutput]:
        model = model_of(params)
        # Only here, so that the model is the same whatever machine it was trained on.
        model = model if remat is None else computed(model, remat=remat)
        output = loss(model, batch, key, target_rate)
        return output.loss, output

    gradient = jax.grad(loss_of, has_aux=True)

    def accumulated(
        model_of: ModelOf, params: PyTree[Array], batch: Inputs, key: PRNGKeyArray, target_rate: Float[Array, ""]
    ) -> tuple[PyTree[Array], LossOutput]:
        """The mean over the parts of a batch."""
        if accumulate == 1:
            return gradient(params, model_of, batch, key, target_rate)
        # Every device keeps sequences of every part, or all would compute each part whole.
        parts = jax.tree.map(lambda rows: jnp.swapaxes(rows.reshape(-1, accumulate, *rows.shape[1:]), 0, 1), batch)
        keys = jax.random.split(key, accumulate)

        def add(total: PyTree[Array], part: tuple[Inputs, PRNGKeyArray]) -> tuple[PyTree[Array], None]:
            return jax.tree.map(jnp.add, total, gradient(params, model_of, *part, target_rate)), None

        first = gradient(params, model_of, jax.tree.map(lambda rows: rows[0], parts), keys[0], target_rate)
        rest = jax.tree.map(lambda rows: rows[1:], parts), keys[1:]
        total, _ = jax.lax.scan(add, first, rest)
        return jax.tree.map(lambda value: value / accumulate, total)

    gradients_of = functools.partial(accumulated, lambda params: eqx.combine(params, static))
    if placement is not None and not placement.alone:
        gradients_of = placement.by_sequence(accumulated, static)

    def step(state: TrainState, batch: Inputs, key: PRNGKeyArray) -> tuple[TrainState, StepMetrics]:
        target_rate = schedule.target(state.target)
        gradients, output = gradients_of(state.params, batch, key, target_rate)
        with jax.named_scope("optimizer"):
            updates, moments = optimizer.update(gradients, state.optimizer, state.params)
            if held is not None:
                updates = jax.tree.map(lambda still, one: jnp.zeros_like(one) if still else one, held, updates)
            params = optax.apply_updates(state.params, updates)
        moved = TrainState(params, moments, schedule.moved(state.target, output.free_rate))
        moved = moved if placement is None else placement.kept(moved)
        return moved, StepMetrics(output, optax.tree.norm(gradients), target_rate, norms_by_part(gradients))

    return step


def norms_by_part(tree: PyTree[Float[Array, ...]]) -> dict[str, Float[Array, ""]]:
    """The norm of each part of a model's parameters or gradients, by the name of its part."""
    parts: dict[str, list[Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        parts.setdefault(part_of(jax.tree_util.keystr(path)), []).append(leaf)
    return {name: optax.tree.norm(leaves) for name, leaves in parts.items()}


def part_of(path: str) -> str:
    """The part of a model that a parameter belongs to, with the prefix of its level inside the first: `embedding`, `encoder`,
    `router`, `chunker`, `objective`, `main` (the innermost network), `decoder`, `head`, `early_head`."""
    # Models of tokens hold the model that reads them.
    path = path.removeprefix(".inner")
    inside = re.match(
        r"\.stage((?:\.inner|\.stage)*)\.(encoder|decoder|estimator(?:\.(?:router|chunker|objective))?)\b", path
    )
    if inside is not None:
        return level_prefix(inside.group(1).count(".inner")) + inside.group(2).rpartition(".")[2]
    if path.startswith(".stage"):
        return "main"
    outside = path.partition(".")[2].partition(".")[0].partition("[")[0]
    return {"norm": "head", "early_norm": "early_head", "ngrams": "embedding"}.get(outside, outside)


def compiled(step: Step) -> jax.stages.Wrapped:
    """The step jitted; the buffers of the state that it is given are reused."""
    return jax.jit(step, donate_argnums=0, compiler_options=compiler_options())


def compiler_options() -> dict[str, bool] | None:
    """On a CPU, XLA by default runs independent parts of a step side by side and keeps all their buffers: rematerialised
    blocks then save nothing. In sequence, a step of `18M` needs a sixth of the memory."""
    if jax.default_backend() != "cpu":
        return None
    return {"xla_cpu_enable_concurrency_optimized_scheduler": False}
