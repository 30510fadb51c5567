"""Drawing boundaries one after another from a policy that remembers its last few."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from estimators.base import BoundaryScan


def boundary_scan(
    projections: Float[Array, "batch length taps"],
    uniforms: Float[Array, "batch length"],
    starts: Bool[Array, "batch length"] | None = None,
    cap: float | None = None,
) -> BoundaryScan:
    r"""$l_i = q_{i,0} + \sum_{j=1}^{w} a_{i-j} q_{i,j}$, $a_i = 1[u_i < \sigma(l_i)]$, in order of i (SFE eq. 16-19).

    `projections` are q, with w = taps - 1. Where `starts` is True a document begins: the action is 1 and nothing before
    it is remembered (None: only row 0). `cap` bounds the logits by `cap·tanh(l/cap)`. Uniforms of exactly one half give
    the likelier action of each row. No gradient: actions are discrete; recompute the logits of given actions with
    `estimators.equations.windowed_logits`.
    """
    if starts is None:
        starts = jnp.zeros(uniforms.shape, bool).at[:, 0].set(True)
    projections, uniforms = jax.lax.stop_gradient((projections, uniforms))

    def decide(logits, uniform, start):
        logits = logits if cap is None else cap * jnp.tanh(logits / cap)
        return (uniform < jax.nn.sigmoid(logits)) | start, logits

    if projections.shape[-1] == 1:
        return BoundaryScan(*decide(projections[..., 0], uniforms, starts))

    def step(memory, row):
        taps, uniform, start = row
        memory = memory & ~start[:, None]
        action, logits = decide(taps[:, 0] + jnp.sum(jnp.where(memory, taps[:, 1:], 0.0), axis=1), uniform, start)
        return jnp.concatenate([action[:, None], memory[:, :-1]], axis=1), (action, logits)

    batch, _, taps = projections.shape
    by_row = (jnp.swapaxes(projections, 0, 1), uniforms.T, starts.T)
    _, (actions, logits) = jax.lax.scan(step, jnp.zeros((batch, taps - 1), bool), by_row)
    return BoundaryScan(actions.T, logits.T)
