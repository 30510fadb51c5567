"""Sequential sampling of boundaries from a policy that depends on its last few actions."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from estimators.base import BoundaryScan, Limits
from estimators.equations import soft_cap, within_limits
from estimators.sharding import varying_zeros
from unet.ops.mosaic import AHEAD, LANES, Implementation, declare, dispatch, refusal

MAX_LAGS = 17
"""Maximum number of lags in the kernel: 0 and those of the actions that it remembers."""

MAX_PARALLEL_LAGS = 9
"""Maximum number of lags of the parallel form, whose work doubles with each."""

MAX_ITERATIONS = 256
"""Maximum number of iterations of a loop that an accelerator runs: each starts a few kernels."""


def boundary_scan(
    projections: Float[Array, "batch length lags"],
    uniforms: Float[Array, "batch length"],
    starts: Bool[Array, "batch length"] | None = None,
    cap: float | None = None,
    limits: Limits | None = None,
    *,
    implementation: Implementation | None = None,
) -> BoundaryScan:
    r"""$l_i = q_{i,0} + \sum_{j=1}^{w} a_{i-j} q_{i,j}$, $a_i = 1[u_i < \sigma(l_i)]$, in order of i (SFE eq. 16-19).

    `projections` are q, with w = lags - 1. Where `starts` is True a document begins: the action is 1 and earlier actions count
    as 0 (None: only position 0). `cap` bounds the logits by `cap·tanh(l/cap)`. Uniforms of exactly one half give greedy
    actions. `limits` say where the action must be 0 or 1 (`equations.within_limits`), but for the starts. No gradient, since
    actions are discrete; recompute the logits of given actions with `estimators.equations.windowed_logits`. Raises `ValueError`
    if a kernel requested by name cannot run.

    On a CPU and in the kernel it is one pass over the positions, each step in O(batch x lags), limits or not. Without a memory
    there is none, unless limits are `sized`. XLA on an accelerator has no loop with up to `MAX_PARALLEL_LAGS` lags and without
    such limits, and otherwise one of at most `MAX_ITERATIONS` iterations; its boundaries are the same.

    The kernel adds the lags in another order than XLA, and its exponential may differ in the last bit. So an action can differ
    where u and σ(l) agree to about seven digits.
    """
    if starts is None:
        starts = jnp.zeros(uniforms.shape, bool).at[:, 0].set(True)
    projections, uniforms = jax.lax.stop_gradient((projections, uniforms))

    if limits is not None and not limits.sized:
        uniforms, limits = limits.certain(uniforms), None

    def decide(logits: Array, uniform: Array, start: Array) -> tuple[Array, Array]:
        logits = soft_cap(logits, cap)
        return (uniform < jax.nn.sigmoid(logits)) | start, logits

    if projections.shape[-1] == 1 and limits is None:
        # Without a memory there is nothing to scan.
        return BoundaryScan(*decide(projections[..., 0], uniforms, starts))

    def xla(projections: Array, uniforms: Array, starts: Array, *sizes: Array) -> tuple[Array, Array]:
        parallel = functools.partial(scan_unrolled, decide)
        if not sizes and projections.shape[-1] <= MAX_PARALLEL_LAGS:
            parallel = functools.partial(scan_parallel, decide)
        # In turn is fastest on a CPU. An accelerator would start a few kernels for each position.
        return jax.lax.platform_dependent(
            projections,
            uniforms,
            starts,
            *sizes,
            cpu=functools.partial(scan_in_turn, decide),
            default=parallel,
        )

    def kernel(interpret: bool):
        return lambda *args: _scan_kernel(*args, cap=cap, interpret=interpret)

    args = projections, uniforms, starts
    if limits is not None:
        opened = varying_zeros(projections, starts.shape[:1], jnp.int32) if limits.size is None else limits.size
        args = *args, limits.least, limits.most, opened
    return BoundaryScan(
        *dispatch("boundary_scan", _refusal(projections), implementation, *args, xla=xla, kernel=kernel)
    )


Decide = Callable[[Array, Array, Array], tuple[Array, Array]]
"""Actions and bounded logits from logits, uniforms and starts."""


def scan_in_turn(
    decide: Decide, projections: Array, uniforms: Array, starts: Array, *sizes: Array, unroll: int = 1
) -> tuple[Array, Array]:
    """One position after another: the definition."""

    def step(carry, inputs):
        memory, size = carry
        lags, uniform, start, *bounds = inputs
        memory = memory & ~start[:, None]
        action, logits = decide(lags[:, 0] + jnp.sum(jnp.where(memory, lags[:, 1:], 0.0), axis=1), uniform, start)
        if bounds:
            action = within_limits(action, size + 1, *bounds) | start
            size = jnp.where(action, 0, size + 1)
        return (jnp.concatenate([action[:, None], memory[:, :-1]], axis=1)[:, : memory.shape[1]], size), (
            action,
            logits,
        )

    batch, _, lags = projections.shape
    inputs = (jnp.swapaxes(projections, 0, 1), uniforms.T, starts.T, *(bound.T for bound in sizes[:2]))
    no_actions, size = varying_zeros(projections, (batch, lags - 1), bool), sizes[2] if sizes else ()
    _, (actions, logits) = jax.lax.scan(step, (no_actions, size), inputs, unroll=unroll)
    return actions.T, logits.T


def scan_unrolled(
    decide: Decide, projections: Array, uniforms: Array, starts: Array, *sizes: Array
) -> tuple[Array, Array]:
    """The same, with at most `MAX_ITERATIONS` iterations of a loop."""
    unroll = -(-uniforms.shape[1] // MAX_ITERATIONS)
    return scan_in_turn(decide, projections, uniforms, starts, *sizes, unroll=unroll)


def scan_parallel(decide: Decide, projections: Array, uniforms: Array, starts: Array) -> tuple[Array, Array]:
    r"""The same values without a loop: all positions at once, in $\log_2$ `length` steps.

    A memory of w actions has $2^w$ states. Every position maps the state before it to the state after it, and these maps are
    composed by an associative scan.
    """
    window = projections.shape[-1] - 1
    states = np.arange(1 << window)

    def outcome(q: Array, uniform: Array, start: Array, states: Array) -> tuple[Array, Array]:
        """Actions and logits after these states, whose bit j - 1 is the action j positions before."""
        remembered = jnp.zeros_like(q[..., 0])
        for lag in range(1, window + 1):
            remembered = remembered + jnp.where((states >> (lag - 1)) & 1 != 0, q[..., lag], 0.0)
        return decide(q[..., 0] + remembered, uniform, start)

    def after(states: Array, actions: Array) -> Array:
        return ((states << 1) | actions.astype(jnp.int32)) & ((1 << window) - 1)

    start = starts[..., None]
    known = jnp.where(start, 0, states)
    # (b, length, states): the state after each position, by the state before it.
    actions, _ = outcome(projections[..., None, :], uniforms[..., None], start, known)
    moves = after(known, actions)
    if window <= 8:
        moves = moves.astype(jnp.uint8)
    composed = jax.lax.associative_scan(
        lambda earlier, later: jnp.take_along_axis(later, earlier.astype(jnp.int32), axis=-1), moves, axis=1
    )
    reached = jnp.pad(composed[:, :-1, 0].astype(jnp.int32), ((0, 0), (1, 0)))
    return outcome(projections, uniforms, starts, jnp.where(starts, 0, reached))


def _refusal(projections: Array) -> str | None:
    if unable := refusal(LANES, projections.dtype):
        return unable
    if projections.shape[-1] > MAX_LAGS:
        return f"the window of {projections.shape[-1] - 1} actions is longer than {MAX_LAGS - 1}"
    if projections.dtype != jnp.float32:
        return f"projections are {projections.dtype.name}, not float32"
    return None


def _scan_kernel(
    projections: Array, uniforms: Array, starts: Array, *sizes: Array, cap: float | None, interpret: bool
) -> tuple[Array, Array]:
    """Each thread samples the boundaries of one sequence; its memory is the bits of one integer. `sizes`, if given: the least and
    the most positions of chunks, and the size of the chunk that is open."""
    from jax.experimental import pallas as pl

    batch, length, lags = projections.shape
    rows, blocks = -length % AHEAD, -batch % LANES
    # The batch comes last, so that neighbouring threads read neighbouring addresses.
    q = jnp.pad(jnp.transpose(projections, (1, 2, 0)), ((0, rows), (0, 0), (0, blocks)))
    u, s, *bounds = (
        jnp.pad(one.T, ((0, rows), (0, blocks))) for one in (uniforms, starts.astype(jnp.int32), *sizes[:2])
    )
    opened = [jnp.pad(sizes[2][None, :], ((0, 0), (0, blocks)))] if sizes else []
    shape = (length + rows, batch + blocks)
    remembered = (1 << (lags - 1)) - 1

    def body(q_ref, u_ref, s_ref, *refs):
        *limit_refs, action_ref, logit_ref = refs
        lanes = pl.ds(jax.lax.axis_index("x") * LANES, LANES)
        one, zero = jnp.ones((LANES,), jnp.int32), jnp.zeros((LANES,), jnp.int32)

        def run_block(block, carry):
            memory, size = carry
            first = block * AHEAD
            loaded = [
                (
                    [q_ref[first + i, j, lanes] for j in range(lags)],
                    u_ref[first + i, lanes],
                    s_ref[first + i, lanes],
                    [bound_ref[first + i, lanes] for bound_ref in limit_refs[:2]],
                )
                for i in range(AHEAD)
            ]
            for i, (q_row, uniform, start, bound_row) in enumerate(loaded):
                memory = jnp.where(start != 0, zero, memory)
                logits = q_row[0]
                for j in range(1, lags):
                    logits = logits + jnp.where(
                        (memory & (1 << (j - 1))) != 0, q_row[j], jnp.zeros((LANES,), jnp.float32)
                    )
                logits = soft_cap(logits, cap)
                drawn = uniform < 1.0 / (1.0 + jnp.exp(-logits))
                if bound_row:
                    size = size + 1
                    drawn = within_limits(drawn, size, *bound_row)
                action = jnp.where(drawn | (start != 0), one, zero)
                if bound_row:
                    size = jnp.where(action != 0, zero, size)
                action_ref[first + i, lanes] = action
                logit_ref[first + i, lanes] = logits
                memory = ((memory * 2) | action) & remembered
            return memory, size

        size = limit_refs[2][0, lanes] if limit_refs else zero
        jax.lax.fori_loop(0, shape[0] // AHEAD, run_block, (zero, size))

    out = [jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)]
    declared = declare(body, out, (shape[1] // LANES,), interpret=interpret)
    actions, logits = declared(q, u, s, *bounds, *opened)
    return actions[:length, :batch].T != 0, logits[:length, :batch].T
