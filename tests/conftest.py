"""Shared by all tests: strict dtypes, two CPU devices, and small models."""

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import jax

# A suite that runs in the background of a shell has Ctrl-C switched off, and the processes that it starts would have it so too.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What is imported stays: looking for garbage in it, again and again, costs a twentieth of the time.
gc.disable()

# What the type checks make of each module is compiled once, also where a variable says that Python writes no bytecode: to do that
# anew in every process takes longer than the tests of many a module.
sys.dont_write_bytecode = False

# Before anything touches a backend.
jax.config.update("jax_platforms", "cpu")
os.environ["JAX_PLATFORMS"] = "cpu"
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_dtype_promotion", "strict")
# The models are small and compiled once each: compiling fast beats running fast.
jax.config.update("jax_disable_most_optimizations", True)
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"


def known_flags(*flags: str) -> list[str]:
    """Those of these XLA flags that the installed jaxlib knows. One that it does not know ends the process that first parses
    XLA_FLAGS, and its message is lost in what pytest captures; so a child each tries them first. Those that are set already come
    from such a test, in the process that started this one."""
    command = [sys.executable, "-c", "from jaxlib import xla_client; xla_client.CompileOptions()"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    untried = [flag for flag in flags if flag not in os.environ.get("XLA_FLAGS", "").split()]
    children = {flag: subprocess.Popen(command, env=os.environ | {"XLA_FLAGS": flag}, **quiet) for flag in untried}
    return [flag for flag in flags if flag not in children or children[flag].wait() == 0]


# Programs in one piece, and where jaxlib still has them (before 0.12) by the older emitters: three times as fast to compile.
FAST_COMPILER = " ".join(known_flags("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"))
USUAL_FLAGS = os.environ.get("XLA_FLAGS", "").replace(FAST_COMPILER, "").strip()
os.environ["XLA_FLAGS"] = f"{FAST_COMPILER} {USUAL_FLAGS}".strip()

# What one test has compiled no other compiles again, nor do the processes that tests start.
CACHE = Path(__file__).parent.parent / ".pytest_cache" / "jax"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

import equinox as eqx  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import Array, Int  # noqa: E402

from estimators import AbstractEstimator, AbstractReduction, EarlyExit, ScoreFunction  # noqa: E402
from unet import Chunker, Distribute, Select, UNet, UNetConfig  # noqa: E402
from unet.model import LossOutput, Prediction  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"


if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import LoadFileScheduling


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: "Producer") -> "LoadFileScheduling | None":
    """Workers take whole files, as with `--dist loadfile`: what tests of a file share is made once, not once in each worker."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log) if config.getvalue("dist") == "load" else None


@pytest.fixture(scope="session", autouse=True)
def one_device_computes_rows():
    """Batches of an even number of rows would need programs of their own for two devices; `tests.test_local_devices` has them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unet.local_devices.usable_devices", lambda model: [])
        yield


@pytest.fixture(scope="session", autouse=True)
def runs_share_their_steps():
    """Small runs of the same settings trace and compile one training step."""
    from experiments.training.trainer import Trainer
    from tests.shared_steps import compiled_on

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "compiled_on", compiled_on)
        yield


@pytest.fixture(scope="module", autouse=True)
def programs_of_other_modules_are_dropped():
    """Thousands of programs in one process would run into its limit of memory maps, and they fill gigabytes."""
    yield
    jax.clear_caches()


def needs(extra: str, module: str) -> ModuleType:
    """A module of an extra. Skips the test, and says why, where it is not installed."""
    return pytest.importorskip(module, reason=f"{module} is not installed: pip install 'caesura-lm[{extra}]'")


@pytest.fixture(scope="session")
def golden():
    """Loads a golden file by name."""
    return lambda name: np.load(GOLDEN / f"{name}.npz", allow_pickle=False)


def text_bytes(batch: int, length: int, seed: int = 0) -> Int[Array, "batch length"]:
    """Bytes that look a little like text: BOS, letters, and a space about every fifth."""
    rng = np.random.default_rng(seed)
    values = rng.integers(97, 123, (batch, length))
    values[rng.random((batch, length)) < 0.2] = 32
    values[:, 0] = 254
    return jnp.asarray(values, jnp.int32)


@eqx.filter_jit
def predict(model: UNet, bytes: Int[Array, "batch length"], **settings) -> Prediction:
    """`model(bytes, …)`, compiled whole: faster than compiling its operations one by one."""
    return model(bytes, **settings)


@eqx.filter_jit
def losses(model: UNet, bytes: Int[Array, "batch length"], **settings) -> LossOutput:
    """`model.loss(bytes, …)`, compiled whole."""
    return model.loss(bytes, **settings)


def small_model(
    estimator: AbstractEstimator | None = None, *, dim: int = 16, window: int = 4, main_layers: int = 1, seed: int = 0
) -> UNet:
    """A model of a few thousand parameters with one block a stack."""
    config = UNetConfig(dim, 2, 1, main_layers, 1, window=window)
    return UNet(config, estimator, key=jax.random.key(seed))


def small_score_function(
    reductions: Sequence[AbstractReduction] = (EarlyExit(),),
    *,
    dim: int = 16,
    window: int = 2,
    policy_weight: float = 1e-2,
    rate_weight: float = 1e-2,
) -> ScoreFunction:
    """A score-function estimator to go with `small_model`, its policy lively enough to draw varied boundaries."""
    estimator = ScoreFunction(
        dim,
        chunker=Chunker(Select(), Distribute()),
        target_rate=0.3,
        reductions=tuple(reductions),
        window=window,
        scale=2.0,
        policy_weight=policy_weight,
        rate_weight=rate_weight,
    )
    weight = jax.random.normal(jax.random.key(7), (1 + window, dim)) * dim**-0.5
    return eqx.tree_at(lambda e: e.router.weight, estimator, weight)
