"""The same model and dynamic chunking in PyTorch, and dynamic chunking here beside it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import numpy as np

from experiments.benchmark.device.asked import Asked, Item, Result
from experiments.benchmark.ops import Sizes, changing_signs, chunking_work
from experiments.benchmark.timing import Work, time_interleaved

FORMS = {
    "eager, drawing at once": {"at_once": True},
    "torch.compile of each block, drawing at once": {"at_once": True, "compile": True},
    "eager, drawing byte by byte": {"at_once": False},
}
"""The step of the model in PyTorch. Boundaries byte by byte, as here, are a loop of the host there."""


def torch_step_items(asked: Asked) -> list[Item]:
    """The training step of each model in PyTorch. Raises `ModuleNotFoundError` where that is not installed."""
    from experiments.benchmark import torch_unet

    torch_unet.use_gpu()

    def measured(model: str, at_once: bool, compile: bool = False) -> Result:
        config = asked.config(model)
        torch_unet.forget_peak()
        work = torch_unet.torch_step(config, at_once=at_once, blocked=True, compile=compile)
        seconds = _alone(work, asked)
        peak = torch_unet.peak_bytes()
        return {
            "batch": f"{config.batch} × {config.length}",
            "ms": 1e3 * seconds,
            "bytes/s": config.bytes_per_step / seconds,
            "GiB at the peak": None if peak is None else peak / 2**30,
        }

    return [
        Item(f"{model}, {name}", functools.partial(measured, model, **form))
        for name, form in FORMS.items()
        for model in reversed(asked.models)
    ]


def torch_chunking_items(asked: Asked) -> list[Item]:
    """The module of h-net-dynamic-chunking. Raises `ModuleNotFoundError` where that or PyTorch is not installed."""
    from experiments.benchmark import torch_chunking, torch_unet

    torch_unet.use_gpu()

    def measured(projected: bool) -> Result:
        sizes = sizes_of(asked)
        hidden = np.asarray(changing_signs(sizes, jax.random.key(1)))
        return {"ms": 1e3 * _alone(torch_chunking.torch_chunking(hidden, sizes.rate, projected=projected), asked)}

    return _both_chunkings("h-net-dynamic-chunking", measured)


def chunking_items(asked: Asked) -> list[Item]:
    """Dynamic chunking here."""

    def measured(projected: bool) -> Result:
        return {"ms": 1e3 * _alone(chunking_work(sizes_of(asked), projected=projected), asked)}

    return _both_chunkings("caesura", measured)


def sizes_of(asked: Asked) -> Sizes:
    """Sizes of the inputs of dynamic chunking: in float32, as in `experiments.bench ops`."""
    defaults = Sizes()
    return Sizes(min(asked.batch or defaults.batch, defaults.batch), asked.length or defaults.length, defaults.dim)


def _both_chunkings(name: str, measured: Callable[[bool], Result]) -> list[Item]:
    return [
        Item(f"{name}, {'with' if projected else 'without'} projections", functools.partial(measured, projected))
        for projected in (True, False)
    ]


def _alone(work: Work, asked: Asked) -> float:
    return time_interleaved({"own": work}, baseline="own", rounds=asked.rounds, calls=asked.calls)["own"].seconds
