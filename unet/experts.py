"""Mixtures of experts in place of an MLP: token-choice routing with a load-balancing loss and a static capacity.

Shazeer et al., "Outrageously large neural networks"; Fedus, Zoph and Shazeer, "Switch transformers".
"""

from __future__ import annotations

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from estimators.sharding import batch_sum
from unet.layers import Linear


def balance_loss(
    probs: Float[Array, "batch length experts"],
    chosen: Int[Array, "batch length choices"],
    mask: Bool[Array, "batch length"],
) -> Float[Array, ""]:
    r"""$E \sum_e f_e P_e$ (Switch eq. 4-6): $f_e$ is the share of choices that fall on expert e, $P_e$ the mean of its
    probability, both over the positions of the `mask`. 1 if both are uniform, E if one expert gets everything. The gradient is
    that of P."""
    experts, valid = probs.shape[-1], mask.astype(jnp.float32)
    count = jnp.maximum(batch_sum(jnp.sum(valid)), 1.0)
    picked = jnp.mean(jax.nn.one_hot(chosen, experts, dtype=jnp.float32), axis=2)
    sums = [jnp.sum(part * valid[..., None], axis=(0, 1)) for part in (picked, probs)]
    share, mean = (total / count for total in batch_sum(sums))
    return experts * jnp.sum(jax.lax.stop_gradient(share) * mean)


def gates(
    probs: Float[Array, "batch length experts"], choices: int
) -> tuple[Float[Array, "batch length choices"], Int[Array, "batch length choices"]]:
    r"""The `choices` most probable experts e of each position, and their weights: $p_e$ for one (Switch eq. 2), or
    $p_e / \sum_{chosen} p$ for several."""
    weights, chosen = jax.lax.top_k(probs, choices)
    return (weights if choices == 1 else weights / jnp.sum(weights, axis=-1, keepdims=True)), chosen


def slots(
    chosen: Int[Array, "batch length choices"], mask: Bool[Array, "batch length"], experts: int
) -> Int[Array, "batch length choices"]:
    """How many earlier choices of the same sequence fell on the same expert: those of earlier positions first, then the more
    probable ones of the same position. So a choice has room, or has not, whatever comes after it and whatever the other sequences
    are. Padding chooses nothing."""
    batch, length, choices = chosen.shape
    picked = jax.nn.one_hot(chosen, experts, dtype=jnp.int32) * mask[..., None, None].astype(jnp.int32)
    flat = picked.reshape(batch, length * choices, experts)
    before = (jnp.cumsum(flat, axis=1) - flat).reshape(picked.shape)
    return jnp.sum(before * picked, axis=-1)


def capacity_of(length: int, choices: int, experts: int, factor: float) -> int:
    r"""$\lceil \mathrm{factor} \cdot k L / E \rceil$ positions for each expert and sequence (Switch eq. 3), at most L."""
    return min(length, math.ceil(factor * choices * length / experts))


class ExpertLoss(eqx.Module):
    """What mixtures report of a training step, summed over `layers` of them: the weighted `loss`, the unweighted `balance`, and
    the share of choices `dropped` for lack of room."""

    loss: Float[Array, ""]
    balance: Float[Array, ""]
    dropped: Float[Array, ""]
    layers: int = eqx.field(static=True, default=1)

    def plus(self, other: ExpertLoss | None) -> ExpertLoss:
        """The sums with those of further layers."""
        if other is None:
            return self
        loss, balance, dropped = self.loss + other.loss, self.balance + other.balance, self.dropped + other.dropped
        return ExpertLoss(loss, balance, dropped, self.layers + other.layers)

    @property
    def metrics(self) -> dict[str, Float[Array, ""]]:
        """Means over layers, by name."""
        return {"balance_loss": self.balance / self.layers, "dropped_choices": self.dropped / self.layers}


class Mixed(eqx.Module):
    """The output of a mixture, and in training its `loss`."""

    hidden: Float[Array, "batch length dim"]
    loss: ExpertLoss | None


class Experts(eqx.Module):
    r"""$y_i = \sum_{e \in \mathrm{top}_k(p_i)} g_{ie}\, \mathrm{SwiGLU}_e(x_i)$, $p_i = \mathrm{softmax}(W_r x_i)$ in float32.

    In training each expert has room for `capacity_of` positions of a sequence; choices beyond that are dropped and counted, and
    the residual stream passes them by. In evaluation and generation nothing is dropped: every expert is computed at every
    position, so a pass there costs as much as with all of them chosen.
    """

    router: Linear
    value_gate: Float[Array, "experts dim both"]
    out: Float[Array, "experts hidden dim"]
    choices: int = eqx.field(static=True)
    capacity_factor: float = eqx.field(static=True)
    balance_weight: float = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        hidden: int,
        experts: int,
        *,
        choices: int,
        capacity_factor: float,
        balance_weight: float,
        std: float,
        out_std: float,
        key: PRNGKeyArray,
    ):
        """Weights are normal with standard deviation `std`, those of the projections `out` with `out_std`."""
        key_router, key_in, key_out = jax.random.split(key, 3)
        self.router = Linear.of(std * jax.random.normal(key_router, (dim, experts), jnp.float32))
        self.value_gate = std * jax.random.normal(key_in, (experts, dim, 2 * hidden), jnp.float32)
        self.out = out_std * jax.random.normal(key_out, (experts, hidden, dim), jnp.float32)
        self.choices, self.capacity_factor, self.balance_weight = choices, capacity_factor, balance_weight

    @property
    def experts(self) -> int:
        return self.out.shape[0]

    def __call__(
        self, x: Float[Array, "batch length dim"], mask: Bool[Array, "batch length"], *, training: bool
    ) -> Mixed:
        probs = jax.nn.softmax(self.router.in_float32(x), axis=-1)
        weights, chosen = gates(probs, self.choices)
        if not training:
            return Mixed(self._all(x, weights, chosen), None)
        capacity = capacity_of(x.shape[1], self.choices, self.experts, self.capacity_factor)
        place = slots(chosen, mask, self.experts)
        kept = (place < capacity) & mask[..., None]
        balance = balance_loss(probs, chosen, mask)
        valid, lost = batch_sum((jnp.sum(mask), jnp.sum(~kept & mask[..., None])))
        dropped = lost.astype(jnp.float32) / jnp.maximum(valid.astype(jnp.float32) * self.choices, 1.0)
        loss = ExpertLoss(self.balance_weight * balance, balance, dropped)
        return Mixed(self._within(x, weights, jnp.where(kept, chosen * capacity + place, -1), capacity), loss)

    def _expert(self, x: Float[Array, "*shape dim"], value_gate: Array, out: Array) -> Float[Array, "*shape dim"]:
        value, gate = jnp.split(x @ value_gate.astype(x.dtype), 2, axis=-1)
        return (value * jax.nn.silu(gate)) @ out.astype(x.dtype)

    def _all(
        self,
        x: Float[Array, "batch length dim"],
        weights: Float[Array, "batch length choices"],
        chosen: Int[Array, "batch length choices"],
    ) -> Float[Array, "batch length dim"]:
        """Every expert at every position, one after another."""

        def add(total: Array, expert: tuple[Array, Array, Array]) -> tuple[Array, None]:
            number, value_gate, out = expert
            weight = jnp.sum(jnp.where(chosen == number, weights, 0.0), axis=-1, keepdims=True)
            return total + weight.astype(x.dtype) * self._expert(x, value_gate, out), None

        numbers = jnp.arange(self.experts, dtype=jnp.int32)
        return jax.lax.scan(add, jnp.zeros_like(x), (numbers, self.value_gate, self.out))[0]

    def _within(
        self,
        x: Float[Array, "batch length dim"],
        weights: Float[Array, "batch length choices"],
        slot: Int[Array, "batch length choices"],
        capacity: int,
    ) -> Float[Array, "batch length dim"]:
        """Each expert at the positions in its slots. `slot`: that of each choice, -1 without one."""
        length, choices, size = x.shape[1], self.choices, self.experts * capacity

        def sequence(x: Array, weights: Array, slot: Array) -> Array:
            flat = slot.reshape(-1)
            position = jnp.arange(length * choices, dtype=jnp.int32) // choices
            # Slots that nothing fills read the first position and are read by none.
            at = jnp.zeros((size,), jnp.int32).at[jnp.where(flat < 0, size, flat)].set(position, mode="drop")
            rows = x[at].reshape(self.experts, capacity, -1)
            outputs = jax.vmap(self._expert)(rows, self.value_gate, self.out).reshape(size, -1)
            back = outputs[jnp.maximum(flat, 0)].reshape(length, choices, -1)
            weight = jnp.where(slot < 0, 0.0, weights)[..., None].astype(x.dtype)
            return jnp.sum(weight * back, axis=1)

        # `vmap` over the batch lets XLA see that devices with different sequences need no communication.
        return jax.vmap(sequence)(x, weights, slot)
