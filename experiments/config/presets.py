"""Named sizes. The defaults of every other flag come from the preset that --model names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from experiments.config.sections import (
    BPEConfig,
    DataConfig,
    DynamicChunkingConfig,
    EvaluationConfig,
    IsotropicConfig,
    OptimizerConfig,
    ScoreFunctionConfig,
    SmoothConfig,
)
from experiments.config.settings import EstimatorName, ModelName, RunConfig
from unet.config import UNetConfig
from unet.files.pretrained import PUBLISHED
from unet.files.published import shape_of
from unet.hnet import HNetConfig

PAPER_EVALUATION = EvaluationConfig(bytes=16_000_000)
"""Enough held-out text to tell methods apart whose bits per byte differ by a few thousandths."""


def _paper(
    name: ModelName,
    unet: UNetConfig,
    learning_rate: float,
    batch: int,
    warmup_bytes: float,
    training_bytes: float,
    rate: float = 0.2,
) -> RunConfig:
    return RunConfig(
        unet=dataclasses.replace(unet, remat=True),
        model=name,
        length=4096,
        batch=batch,
        bytes=round(training_bytes),
        rate=rate,
        # The paper's size, and text enough that its last tokens are no accidents.
        bpe=BPEConfig(vocabulary=200_000, text_bytes=2**28),
        optimizer=OptimizerConfig(learning_rate=learning_rate, warmup_bytes=round(warmup_bytes)),
        evaluation=PAPER_EVALUATION,
    )


LARGE, EXTRA_LARGE = 6.25e-4, 5e-4
"""Learning rates of the two sizes of H-Net (section 3)."""

BYTES_PER_TOKEN = 4.6
"""N^GPT of H-Net eq. 11: bytes per token of the GPT-2 tokenizer on English."""


def _hnet(
    name: ModelName,
    unet: HNetConfig,
    learning_rate: float,
    rates: tuple[float, ...],
    *,
    estimator: EstimatorName = "hnet",
    multipliers: bool = True,
    projected: bool = True,
    length: int = 8192,
) -> RunConfig:
    """As H-Net was trained, on a hundred billion tokens of FineWeb-Edu; Adam's decay rates and the weight decay, which the paper
    does not give, are GPT-3's."""
    isotropic = not rates
    return RunConfig(
        unet=dataclasses.replace(unet, remat=True),
        model=name,
        dataset="fineweb-edu-100BT",
        estimator="isotropic" if isotropic else estimator,
        length=length,
        batch=256,
        bytes=460_000_000_000,
        rate=rates[0] if rates else 0.2,
        inner_rates=rates[1:],
        buckets=1 if estimator == "hnet" or isotropic else 4,
        # What comes back is smoothed where the router has probabilities that smoothing can teach.
        smooth=SmoothConfig(smoothing=estimator == "hnet", residual="projected" if projected else "plain"),
        # Dynamic chunking smooths of its own accord; other estimators learn through what they were published with.
        chunker="smooth" if projected and estimator != "hnet" else None,
        isotropic=IsotropicConfig(token_level=not isotropic),
        optimizer=OptimizerConfig(
            learning_rate=learning_rate,
            schedule="wsd",
            beta2=0.95,
            weight_decay=0.1,
            decay="matrices",
            stage_multipliers=BYTES_PER_TOKEN if multipliers and not isotropic else None,
        ),
        data=DataConfig(protocol="pack"),
        evaluation=PAPER_EVALUATION,
    )


def _published(name: ModelName, of: str, learning_rate: float, rates: tuple[float, ...]) -> RunConfig:
    return _hnet(name, shape_of(PUBLISHED[of]), learning_rate, rates)


def _in_no_english(run: RunConfig) -> RunConfig:
    """Trained on Chinese or code, which the paper does not name: the data set has to be given."""
    return dataclasses.replace(run, dataset="docs")


def _shape(layout: str, dims: tuple[int, ...], mlp_dims: tuple[int, ...], *, norms: bool = True) -> HNetConfig:
    """Sixteen heads, half of each with rotary positions, and a window of 1024 at the byte level, as in the other models."""
    heads = tuple(16 if dim >= 1024 else 8 for dim in dims)
    windows = (1024, *[0] * (len(dims) - 1))
    rotary = tuple(dim // count // 2 for dim, count in zip(dims, heads, strict=True))
    return HNetConfig(
        layout=layout,
        dims=dims,
        mlp_dims=mlp_dims,
        heads=heads,
        rotary_dims=rotary,
        windows=windows,
        network_norms=norms,
    )


def _spaced(
    name: ModelName, layers: int, dims: tuple[int, int], mlp_dim: int, rate: float, **settings: bool
) -> RunConfig:
    """H-Net's baselines around the same networks: boundaries at spaces, and at every sixth byte."""
    shape = _shape(f'["m4", ["T{layers}"], "m4"]', dims, (0, mlp_dim), norms=settings.get("norms", True))
    estimator: EstimatorName = "stride" if "pool" in name else "spacelike"
    plain = settings.get("norms", True)
    return _hnet(name, shape, rate, (1 / 6,), estimator=estimator, multipliers=plain, projected=plain)


def _dna(name: ModelName, layout: str, mlp_dims: tuple[int, ...], rates: tuple[float, ...]) -> RunConfig:
    """Table 5: width 512 throughout, chunks of three bases, learning rate .005 at the resolution of bases.

    A document is a stretch of a chromosome that nobody began or ended on purpose: crops show all of it, and in every epoch
    other windows of it.
    """
    shape = _shape(layout, (512,) * len(mlp_dims), mlp_dims)
    run = _hnet(name, shape, 5e-3, rates, multipliers=False)
    return dataclasses.replace(run, dataset="genome.fa", data=DataConfig(protocol="crop"))


def _small_hnet(name: ModelName, layout: str, dims: tuple[int, ...], rates: tuple[float, ...]) -> RunConfig:
    """H-Nets for a laptop, on the data and at the batch of `tiny`."""
    shape = HNetConfig(
        layout=layout,
        dims=dims,
        mlp_dims=tuple(2 * dim for dim in dims),
        heads=(4,) * len(dims),
        rotary_dims=tuple(dim // 8 for dim in dims),
        windows=(16,) * (len(dims) - 1) + (0,),
        state=16,
    )
    run = _hnet(name, shape, 2e-3, rates, length=256)
    return dataclasses.replace(
        run,
        unet=shape,
        dataset="docs",
        batch=16,
        # On so little text the published weight of .03 leaves the rates a tenth above what is asked.
        hnet=DynamicChunkingConfig(ratio_weight=0.3),
        bytes=6_000_000,
        sfe=ScoreFunctionConfig(window=0, discount=0.9, scale=2.4),
        optimizer=dataclasses.replace(run.optimizer, weight_decay=0.01, stage_multipliers=None),
        data=DataConfig(protocol="crop"),
        evaluation=EvaluationConfig(),
    )


def _hnets() -> Mapping[ModelName, RunConfig]:
    runs = [
        _small_hnet("hnet-tiny", '["m1", ["T4"], "m1"]', (64, 64), (0.2,)),
        _small_hnet("hnet-2stage-tiny", '["m1", ["T1m1", ["T2"], "m1T1"], "m1"]', (64, 64, 96), (0.4, 0.5)),
        _published("hnet-1stage-L", "hnet_1stage_L", LARGE, (1 / 6,)),
        _published("hnet-1stage-XL", "hnet_1stage_XL", EXTRA_LARGE, (1 / 6,)),
        _published("hnet-2stage-L", "hnet_2stage_L", LARGE, (1 / 3, 1 / 3)),
        _published("hnet-2stage-XL", "hnet_2stage_XL", EXTRA_LARGE, (1 / 3, 1 / 3)),
        _in_no_english(_published("hnet-2stage-XL-chinese", "hnet_2stage_XL_chinese", EXTRA_LARGE, (1 / 3, 1 / 3))),
        _in_no_english(_published("hnet-2stage-XL-code", "hnet_2stage_XL_code", EXTRA_LARGE, (1 / 3, 1 / 3))),
        _spaced("hnet-space-L", 28, (1024, 1536), 4096, LARGE),
        _spaced("hnet-space-XL", 31, (1024, 2048), 5504, EXTRA_LARGE),
        _spaced("hnet-pool-L", 28, (1024, 1536), 4096, LARGE),
        _spaced("spacebyte++-L", 28, (1024, 1536), 4096, LARGE, norms=False),
        _spaced("spacebyte++-XL", 31, (1024, 2048), 5504, EXTRA_LARGE, norms=False),
        _hnet("llamabyte-L", _shape('["T16"]', (1024,), (2816,)), LARGE, ()),
        _hnet("mambabyte-L", _shape('["m28"]', (1024,), (0,)), LARGE, ()),
        # Widths inside the MLPs are not in the paper; with these the counts of Table 5 come out.
        _dna("dna-transformer", '["T9"]', (1408,), ()),
        _dna("dna-mamba", '["M10"]', (1024,), ()),
        _dna("dna-hnet", '["m3T1", ["T15"], "m4"]', (1408, 1408), (1 / 3,)),
        _dna("dna-hnet-mamba", '["m3T1", ["M15"], "m4"]', (1408, 1024), (1 / 3,)),
    ]
    return {run.model: run for run in runs}


PRESETS: dict[ModelName, RunConfig] = {
    # Short sequences and few bytes: returns must forget sooner, and the policy move faster and learn less, than the paper's.
    "tiny": RunConfig(
        unet=UNetConfig(dim=64, heads=4, encoder_layers=1, main_layers=4, decoder_layers=1, window=16),
        model="tiny",
        length=256,
        batch=16,
        buckets=2,
        bytes=6_000_000,
        sfe=ScoreFunctionConfig(window=0, discount=0.9, scale=2.4),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        data=DataConfig(protocol="crop"),
    ),
    "18M": _paper("18M", UNetConfig(384, 6, 2, 6, 2), 3.6e-3, 32, 6.2e7, 8.3e8),
    "32M": _paper("32M", UNetConfig(512, 8, 2, 6, 2), 3e-3, 64, 1.1e8, 1.5e9),
    "73M": _paper("73M", UNetConfig(768, 12, 2, 6, 2), 2.4e-3, 128, 2.5e8, 3.4e9),
    "90M": _paper("90M", UNetConfig(768, 12, 4, 6, 4), 2e-3, 128, 2.5e8, 3.4e9),
    "130M": _paper("130M", UNetConfig(768, 12, 2, 12, 2), 2e-3, 128, 4.5e8, 6e9),
    "147M": _paper("147M", UNetConfig(768, 12, 4, 12, 4), 1.5e-3, 128, 4.5e8, 6e9),
    "346M": _paper("346M", UNetConfig(1024, 16, 2, 20, 2), 1.5e-3, 256, 1.2e9, 1.6e10),
    # The paper's aspect-ratio runs: n token-level layers at a target rate of 1/n.
    "ratio2": _paper("ratio2", UNetConfig(512, 8, 4, 2, 4), 3e-3, 64, 1.1e8, 1.5e9, rate=1 / 2),
    "ratio4": _paper("ratio4", UNetConfig(512, 8, 4, 4, 4), 3e-3, 64, 1.1e8, 1.5e9, rate=1 / 4),
    "ratio6": _paper("ratio6", UNetConfig(512, 8, 4, 6, 4), 3e-3, 64, 1.1e8, 1.5e9, rate=1 / 6),
    **_hnets(),
}
