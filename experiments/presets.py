"""Named sizes. The defaults of every other flag come from the preset that --model names."""

from __future__ import annotations

from experiments.config import ModelName, RunConfig
from experiments.sections import DataConfig, OptimizerConfig, ScoreFunctionConfig
from unet.config import UNetConfig


def _paper(
    name: ModelName,
    dim: int,
    heads: int,
    layers: tuple[int, int, int],
    learning_rate: float,
    batch: int,
    warmup_bytes: float,
    training_bytes: float,
    rate: float = 0.2,
) -> RunConfig:
    encoder, main, decoder = layers
    return RunConfig(
        unet=UNetConfig(dim, heads, encoder, main, decoder, remat=True),
        model=name,
        length=4096,
        batch=batch,
        bytes=round(training_bytes),
        rate=rate,
        optimizer=OptimizerConfig(learning_rate=learning_rate, warmup_bytes=round(warmup_bytes)),
    )


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
    "18M": _paper("18M", 384, 6, (2, 6, 2), 3.6e-3, 32, 6.2e7, 8.3e8),
    "32M": _paper("32M", 512, 8, (2, 6, 2), 3e-3, 64, 1.1e8, 1.5e9),
    "73M": _paper("73M", 768, 12, (2, 6, 2), 2.4e-3, 128, 2.5e8, 3.4e9),
    "90M": _paper("90M", 768, 12, (4, 6, 4), 2e-3, 128, 2.5e8, 3.4e9),
    "130M": _paper("130M", 768, 12, (2, 12, 2), 2e-3, 128, 4.5e8, 6e9),
    "147M": _paper("147M", 768, 12, (4, 12, 4), 1.5e-3, 128, 4.5e8, 6e9),
    "346M": _paper("346M", 1024, 16, (2, 20, 2), 1.5e-3, 256, 1.2e9, 1.6e10),
    # The paper's aspect-ratio runs: n token-level layers at a target rate of 1/n.
    "ratio2": _paper("ratio2", 512, 8, (4, 2, 4), 3e-3, 64, 1.1e8, 1.5e9, rate=1 / 2),
    "ratio4": _paper("ratio4", 512, 8, (4, 4, 4), 3e-3, 64, 1.1e8, 1.5e9, rate=1 / 4),
    "ratio6": _paper("ratio6", 512, 8, (4, 6, 4), 3e-3, 64, 1.1e8, 1.5e9, rate=1 / 6),
}
