"""Ahead-of-time compilation for GPUs on any host, down to machine code.

The compiler is the CUDA plugin of the installed jax version (`pip install 'caesura-lm[deviceless]'`). It needs neither a GPU nor
a driver. The process must be started with `ENVIRONMENT` and can compile for one target only.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
"""Environment of a compiling process: no search for GPUs, no error if there are none, and messages of ptxas for each kernel."""


@dataclass(frozen=True)
class Target:
    """A GPU: its description for the compiler, and the peak rates for a roofline (dense, from the data sheet)."""

    name: str
    major: int
    cores: int
    memory: int
    cache: int
    bandwidth: float
    """Bytes per second."""
    bfloat16: float
    """FLOP/s of the tensor cores in bfloat16."""
    float32: float
    """FLOP/s of the tensor cores for float32 operands, which XLA rounds to TF32."""
    shared: int = 233_472
    """Shared memory of a multiprocessor, in bytes; a block may have 1 KiB less."""
    lanes: int = 128
    """float32 lanes of a multiprocessor."""
    clock: float = 1.98
    """GHz."""
    nvlink: float = 450e9
    """Bytes per second that a GPU sends to the others of its host over all of its links (half of what data sheets name, which
    counts both directions)."""

    @property
    def description(self) -> str:
        """The target for the compiler: a `GpuTargetConfigProto` in text format."""
        features = "ACCELERATED_FEATURES" if self.major >= 9 else "NONE"
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
              shared_memory_per_block: 49152 shared_memory_per_core: {self.shared}
              shared_memory_per_block_optin: {self.shared - 1024}
              core_count: {self.cores} fpus_per_core: {self.lanes} clock_rate_ghz: {self.clock}
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
              memory_bandwidth: {round(self.bandwidth)} l2_cache_size: {self.cache} device_memory_size: {self.memory}
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              cuda_compute_capability {{ major: {self.major} feature_extension: {features} }}
              device_vendor: "NVIDIA Corporation" name: "{self.name}"
              driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
              dnn_version: "9.10.0"
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 }}
            device_description_str: "{self.name}"
        """


TARGETS = {
    "a100": Target(
        "NVIDIA A100-SXM4-80GB",
        8,
        108,
        85_100_068_864,
        41_943_040,
        2.039e12,
        312e12,
        156e12,
        shared=167_936,
        lanes=64,
        clock=1.41,
        nvlink=300e9,
    ),
    "h100": Target("NVIDIA H100 80GB HBM3", 9, 132, 84_942_979_072, 52_428_800, 3.35e12, 989e12, 494e12),
    "b200": Target("NVIDIA B200", 10, 148, 191_514_411_008, 132_644_864, 7.67e12, 2250e12, 1125e12, nvlink=900e9),
}


def missing() -> str | None:
    """An error message if the compiler is not installed, else None."""
    if importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        return "compiling for a GPU needs jax's CUDA plugin: pip install 'caesura-lm[deviceless]'"
    return None


NETWORK = 50e9
"""Bytes per second that a GPU sends to other hosts: a port of 400 Gbit/s for each GPU, as in NVIDIA's DGX H100."""


def devices_of(target: Target, count: int) -> list[jax.Device]:
    """So many devices of this kind, in one host."""
    topology = topologies.get_topology_desc(platform="cuda", topology=f"1x1x{count}", target_config=target.description)
    return list(topology.devices)


def mesh_of(target: Target) -> Mesh:
    """A mesh of one device of this kind."""
    return Mesh(np.asarray(devices_of(target, 1)), ("x",), axis_types=(AxisType.Auto,))


def optimized_hlo(compiled: jax.stages.Compiled) -> str:
    """The optimized HLO as text, one instruction per line."""
    text = compiled.as_text()
    assert text is not None
    return text


def compile_for(
    mesh: Mesh, function: Callable[..., PyTree], *args: PyTree, donate: int | None = None
) -> jax.stages.Compiled:
    """Compile `function` for the devices of `mesh`. Only shapes and dtypes of `args` matter, and their shardings where they are
    shapes that have some; others are whole on every device. `donate`: index of the argument whose buffers are donated."""
    replicated = NamedSharding(mesh, PartitionSpec())

    def shape(arg: Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        own = arg.sharding if isinstance(arg, jax.ShapeDtypeStruct) else None
        return jax.ShapeDtypeStruct(arg.shape, arg.dtype, sharding=replicated if own is None else own)

    shapes = jax.tree.map(shape, args)
    # Kernels query the capabilities of the default device.
    with jax.default_device(mesh.devices.flat[0]), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function, donate_argnums=donate).trace(*shapes).lower().compile()
