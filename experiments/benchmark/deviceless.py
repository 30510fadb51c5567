"""Compiling for GPUs that are not there: what XLA makes of a program, down to machine code, on any host.

The compiler is the CUDA plugin of the installed jax version (`pip install 'caesura-lm[deviceless]'`); it needs neither a GPU nor
a driver. A process that compiles must have been started with `ENVIRONMENT`, and for one target only.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
"""For a process that compiles: no search for GPUs, no complaint that there are none, and ptxas' remarks on each kernel."""


@dataclass(frozen=True)
class Target:
    """A GPU: what the compiler must know of it, and the rates that a roofline is drawn from (dense, by the data sheet)."""

    name: str
    major: int
    cores: int
    memory: int
    cache: int
    bandwidth: float
    """Bytes per second."""
    bfloat16: float
    """Floating-point operations per second in tensor cores, bfloat16."""
    float32: float
    """The same on float32 numbers, which XLA rounds to TF32 for it."""

    @property
    def description(self) -> str:
        """The target as the compiler reads it: a `GpuTargetConfigProto` in text form."""
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
              shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
              core_count: {self.cores} fpus_per_core: 128 clock_rate_ghz: 1.98
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
              memory_bandwidth: {round(self.bandwidth)} l2_cache_size: {self.cache} device_memory_size: {self.memory}
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              cuda_compute_capability {{ major: {self.major} feature_extension: ACCELERATED_FEATURES }}
              device_vendor: "NVIDIA Corporation" name: "{self.name}"
              driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
              dnn_version: "9.10.0"
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 }}
            device_description_str: "{self.name}"
        """


TARGETS = {
    "h100": Target("NVIDIA H100 80GB HBM3", 9, 132, 84_942_979_072, 52_428_800, 3.35e12, 989e12, 494e12),
    "b200": Target("NVIDIA B200", 10, 148, 191_514_411_008, 132_644_864, 7.67e12, 2250e12, 1125e12),
}


def missing() -> str | None:
    """What a host lacks for compiling, in a sentence; None where it lacks nothing."""
    if importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        return "compiling for a GPU needs jax's CUDA plugin: pip install 'caesura-lm[deviceless]'"
    return None


def mesh_of(target: Target) -> Mesh:
    """One device of this kind."""
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=target.description)
    return topologies.make_mesh(topology, (1,), ("x",))


def machine_program(compiled: jax.stages.Compiled) -> str:
    """The optimized program as text, one instruction a line."""
    text = compiled.as_text()
    assert text is not None
    return text


def compile_for(
    mesh: Mesh, function: Callable[..., PyTree], *args: PyTree, donate: int | None = None
) -> jax.stages.Compiled:
    """`function` compiled for the device of `mesh`; of `args` only shapes and dtypes matter, the buffers of the one numbered
    `donate` are reused."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(lambda arg: jax.ShapeDtypeStruct(arg.shape, arg.dtype, sharding=everywhere), args)
    # Kernels ask the default device what it can do.
    with jax.default_device(mesh.devices.flat[0]), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function, donate_argnums=donate).trace(*shapes).lower().compile()
