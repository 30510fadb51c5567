"""Values and combinations of values that cannot be run, each refused in one sentence."""

from __future__ import annotations

from estimators.equations import logit
from experiments.config.settings import ConfigError, RunConfig
from unet.hnet import HNetConfig


def check(config: RunConfig) -> None:
    """Raise `ConfigError` for values that are impossible or do not go together."""
    for name in ("length", "batch", "bytes", "log_every"):
        _require(getattr(config, name) >= 1, f"--{name.replace('_', '-')} must be at least 1")
    _require(config.length >= 2, "--length must be at least 2: one byte to read and one to predict")
    _require(config.steps is None or config.steps >= 1, "--steps must be at least 1")
    _require(
        config.total_steps >= 1,
        f"--bytes {config.bytes} is less than one step of {config.batch} x {config.length} bytes",
    )
    _require(0 < config.rate < 1, f"--rate is a share of bytes strictly between 0 and 1; got {config.rate}")
    _require(config.buckets >= 1, "--buckets must be at least 1")
    _require(config.capacity_slack >= 1, "--capacity-slack below 1 would drop boundaries at the target rate")
    optimizer = config.optimizer
    _require(optimizer.learning_rate > 0, "--optimizer.learning-rate must be positive")
    _require(optimizer.clip > 0, "--optimizer.clip must be positive")
    multipliers = optimizer.stage_multipliers
    _require(multipliers is None or multipliers > 0, "--optimizer.stage-multipliers is a number of bytes above 0")
    _require(0 <= optimizer.final_fraction <= 1, "--optimizer.final-fraction lies between 0 and 1")
    _require(0 <= optimizer.beta1 < 1 and 0 <= optimizer.beta2 < 1, "--optimizer.beta1 and beta2 lie in [0, 1)")
    _require(optimizer.weight_decay >= 0, "--optimizer.weight-decay cannot be negative")
    _require(
        optimizer.accumulate >= 1 and config.batch % optimizer.accumulate == 0,
        f"--optimizer.accumulate {optimizer.accumulate} does not divide --batch {config.batch}",
    )
    _require(
        config.warmup_steps <= config.total_steps,
        f"a warm-up of {optimizer.warmup_bytes} bytes is longer than the run: name a shorter --optimizer.warmup-bytes, or None "
        "for 5 % of the run",
    )
    _require(0 < config.data.held_out < 1, "--data.held-out is a share of documents strictly between 0 and 1")
    _require(config.data.workers >= 0, "--data.workers cannot be negative")
    _require(config.data.cache_gib > 0, "--data.cache-gib must be positive")
    _require(config.evaluation.bytes >= config.length, "--evaluation.bytes must hold at least one sequence")
    _require(config.evaluation.times >= 1, "--evaluation.times must be at least 1")
    _require(config.checkpoint.times >= 1 and config.checkpoint.keep >= 1, "--checkpoint.times and keep are at least 1")
    _require(config.devices is None or config.devices >= 1, "--devices must be at least 1")
    _check_levels(config)
    if any(level.estimator.startswith("sfe") for level in config.levels):
        _check_score_function(config)
    _check_estimators(config)
    _require(
        not (config.resume and config.overwrite), "--resume goes on with a run and --overwrite deletes it: use one"
    )


def _check_levels(config: RunConfig) -> None:
    inside = max(config.unet.levels - 1, 0)
    given = max(len(config.inner_estimators), len(config.inner_rates))
    _require(
        given <= inside, f"{given} inner levels are named, but --model {config.model} has {inside} inside its first"
    )
    for rate in config.inner_rates:
        _require(0 < rate < 1, f"--inner-rates are shares strictly between 0 and 1; got {rate}")
    _require(
        config.unet.levels > 0 or (config.estimator == "isotropic" and not config.isotropic.token_level),
        f"--model {config.model} has no level of tokens: use --estimator isotropic --isotropic.no-token-level",
    )
    named = {config.estimator, *config.inner_estimators}
    _require(
        config.unet.levels == 0
        or not isinstance(config.unet, HNetConfig)
        or "isotropic" not in named
        or config.isotropic.token_level,
        f"--isotropic.no-token-level leaves out the only level of tokens, but the layout of --model {config.model} has "
        f"{config.unet.levels}: name a --unet.layout without any, such as '[\"m4\"]'",
    )
    for name in {level.estimator for level in config.levels[1:]} & {"entropy", "bpe", "bpe-distilled", "characters"}:
        raise ConfigError(f"{name} reads bytes, not tokens: use it for the first level, and name --inner-estimators")


def _check_pool(config: RunConfig) -> None:
    pool, levels = config.pool, config.levels
    _require(pool.heads >= 1, "--pool.heads must be at least 1")
    _require(
        config.chunker != "attend" or config.unet.attend != "none",
        "--chunker attend brings no token back itself: name the blocks that attend to them with --unet.attend first or every",
    )
    for width in config.unet.widths[: len(levels)]:
        _require(
            pool.kind != "attention" or width % pool.heads == 0,
            f"--pool.heads {pool.heads} does not divide a width of {width}",
        )
    means = config.chunker == "mean" or any(level.estimator == "gumbel" for level in levels)
    _require(not means or pool.kind == "last", "--chunker mean makes its tokens itself: leave --pool.kind out")
    _require(
        not pool.boundary or pool.kind != "last", "--pool.boundary adds the last row to a pool: name a --pool.kind"
    )


def _check_gradients(config: RunConfig) -> None:
    """At every level something has to teach the router."""
    names = {level.estimator for level in config.levels}
    _require(
        "gumbel" not in names or config.chunker in (None, "mean"),
        f"--estimator gumbel learns through the means of groups: --chunker {config.chunker} would pass it no gradient",
    )
    _require(
        "hnet" not in names or config.chunker in (None, "smooth"),
        f"--estimator hnet learns through smoothing: --chunker {config.chunker} would pass it no gradient",
    )
    _require(
        "hnet" not in names or config.smooth.smoothing or config.smooth.weighting != "none",
        "--estimator hnet without smoothing and without weighting by confidence has no gradient to learn from",
    )


def _check_estimators(config: RunConfig) -> None:
    _check_pool(config)
    _check_gradients(config)
    stride = config.stride.stride
    _require(
        stride is None or stride >= 1 or all(level.estimator != "stride" for level in config.levels),
        f"--stride.stride must be at least 1; got {stride}",
    )
    _require(config.characters.every >= 1, f"--characters.every must be at least 1; got {config.characters.every}")
    mlp, target = config.mlp, config.target
    _require(mlp.inner is None or mlp.inner >= 1, "--mlp.inner must be at least 1")
    _require(mlp.temperature > 0, f"--mlp.temperature must be positive; got {mlp.temperature}")
    _require(
        config.estimator != "entropy" or config.entropy.model is not None,
        "--estimator entropy needs a byte model: train one with --estimator isotropic --isotropic.no-token-level and name "
        "its folder with --entropy.model",
    )
    _require(config.bpe.vocabulary >= 257, "--bpe.vocabulary has 256 bytes and at least one merge: 257 or more")
    _require(
        config.bpe.text_bytes >= 1, f"--bpe.text-bytes is an amount of text, at least 1; got {config.bpe.text_bytes}"
    )
    _require(
        target.start is None or 0 < target.start < 1,
        f"--target.start is a share of bytes strictly between 0 and 1; got {target.start}",
    )
    _require(0 < target.until <= 1, f"--target.until is a share of training, above 0 and at most 1; got {target.until}")
    _require(target.control >= 0, f"--target.control cannot be negative; got {target.control}")
    _require(
        config.optimizer.accumulate == 1 or target.control == 0,
        "--target.control measures the rate of whole batches: use --optimizer.accumulate 1",
    )


def _check_score_function(config: RunConfig) -> None:
    sfe = config.sfe
    part = config.batch // config.optimizer.accumulate
    _require(sfe.window >= 0, f"--sfe.window counts past boundaries and cannot be negative; got {sfe.window}")
    _require(0 <= sfe.discount <= 1, f"--sfe.discount lies between 0 and 1; got {sfe.discount}")
    _require(sfe.scale > 0 and sfe.cap > 0, "--sfe.scale and --sfe.cap must be positive")
    for level in config.levels:
        _require(
            not level.estimator.startswith("sfe") or abs(logit(level.rate)) < sfe.cap,
            f"a rate of {level.rate} lies beyond policy logits capped at {sfe.cap}: raise --sfe.cap",
        )
    _require(
        sfe.advantage_decay is None or 0 <= sfe.advantage_decay <= 1,
        f"--sfe.advantage-decay lies between 0 and 1; got {sfe.advantage_decay}",
    )
    _require(
        sfe.advantage_decay is None or not sfe.critic,
        "--sfe.advantage-decay brings a critic of its own: leave --sfe.critic out",
    )
    _require(sfe.samples >= 1, f"--sfe.samples must be at least 1; got {sfe.samples}")
    _require(
        sfe.centring != "samples" or sfe.samples > 1,
        "--sfe.centring samples compares draws for one sequence: ask for --sfe.samples 2 or more",
    )
    clip = config.offpolicy.clip
    _require(clip is None or clip > 0, f"--offpolicy.clip must be positive; got {clip}")
    _require(
        sfe.centring in ("none", "samples") or part * sfe.samples > 1,
        f"centred returns of a batch of {part} are all zero: use a larger --batch or --sfe.centring none",
    )


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ConfigError(otherwise)
