"""An estimate of what a compiled GPU program costs: its kernels one by one, each bound by arithmetic or by memory."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from experiments.benchmark.deviceless import Target

PARTS = ("embed", "encode", "boundary", "downsample", "mid", "upsample", "decode", "heads", "loss", "optimizer")
"""Names of the scopes that a training step is cut into; what is in none of them counts as `other`."""

SIZES = {"pred": 1.0, "bf16": 2.0}
"""Bytes of the types whose names do not say how many bits they have."""
SCRATCH = "s8[33554432]"
"""The work space that every matrix product of cuBLAS is given; how much of it is touched is unknown and left out."""
NOT_KERNELS = ("parameter", "constant", "bitcast", "get-tuple-element", "tuple", "after-all", "iota", "partition-id")

_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%(?P<name>[\w.-]+) = (?P<shape>\(.*?\)|\S+) (?P<opcode>[\w-]+)\((?P<operands>[^)]*)\)"
)
_SHAPE = re.compile(r"\b(pred|bf16|f16|f32|f64|[su]\d+)\[([\d,]*)\]")


@dataclass(frozen=True)
class Kernel:
    """One launch: its part of the step, what does it, floating-point operations of its matrix products, bytes read and
    written."""

    part: str
    kind: str
    flops: float
    bytes: float
    float32: bool = False
    """Whether the products are of float32 numbers."""

    def seconds(self, target: Target) -> float:
        """At the peak of what binds it; launching costs nothing."""
        return max(self.flops / (target.float32 if self.float32 else target.bfloat16), self.bytes / target.bandwidth)


@dataclass(frozen=True)
class Share:
    """Kernels of one part of a step, together."""

    part: str
    kernels: int
    flops: float
    bytes: float
    seconds: float


def kernels_of(program: str) -> list[Kernel]:
    """Every kernel that the entry of an optimized program launches, in order.

    Reads and writes are whole operands and results: an upper bound where a kernel gathers a few rows of a large one. A loop
    counts once. Raises `ValueError` where there is no entry.
    """
    lines = _entry(program)
    shapes: dict[str, str] = {}
    found = []
    for line in lines:
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        shapes[match["name"]] = match["shape"]
        if match["opcode"] in NOT_KERNELS:
            continue
        operands = [shapes.get(name, "") for name in re.findall(r"%([\w.-]+)", match["operands"])]
        moved = sum(map(_bytes, operands), _bytes(match["shape"]))
        target = re.search(r'custom_call_target="([^"]+)"', line)
        kind = match["opcode"] if target is None else target[1]
        flops = _product_flops(line, match["shape"], operands)
        wide = flops > 0 and operands[0].startswith("f32")
        found.append(Kernel(part_of(line), kind, flops, moved, wide))
    return found


def shares(kernels: Sequence[Kernel], target: Target) -> list[Share]:
    """The parts of a step in their order, `other` last; those without a kernel left out."""
    found = []
    for part in (*PARTS, "other"):
        own = [kernel for kernel in kernels if kernel.part == part]
        if own:
            totals = [sum(values) for values in zip(*((k.flops, k.bytes, k.seconds(target)) for k in own), strict=True)]
            found.append(Share(part, len(own), *totals))
    return found


def part_of(line: str) -> str:
    """The innermost named scope of an instruction that is one of `PARTS`, forward or backward."""
    name = re.search(r'op_name="([^"]*)"', line)
    scopes = re.findall(r"\w+", name[1]) if name is not None else []
    return next((scope for scope in reversed(scopes) if scope in PARTS), "other")


def _entry(program: str) -> Iterator[str]:
    lines = iter(program.splitlines())
    for line in lines:
        if line.startswith("ENTRY "):
            break
    else:
        raise ValueError("the program has no ENTRY")
    for line in lines:
        if line.startswith("}"):
            return
        yield line


def _bytes(shape: str) -> float:
    plain = shape.replace(SCRATCH, "")
    return sum((_size(dtype) * _count(dims) for dtype, dims in _SHAPE.findall(plain)), 0.0)


def _size(dtype: str) -> float:
    return SIZES[dtype] if dtype in SIZES else int(dtype[1:]) / 8


def _count(dims: str) -> int:
    return math.prod(int(dim) for dim in dims.split(",") if dim)


def _product_flops(line: str, shape: str, operands: Sequence[str]) -> float:
    """2·m·n·k of a cuBLAS product, which names the axes it contracts."""
    contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', line)
    result = _SHAPE.search(shape)
    first = _SHAPE.search(operands[0]) if operands else None
    if contracted is None or result is None or first is None:
        return 0.0
    dims = [int(dim) for dim in first[2].split(",") if dim]
    return 2.0 * _count(result[2]) * math.prod(dims[int(axis)] for axis in re.findall(r"\d+", contracted[1]))
