"""Roofline estimate of a compiled GPU program: the time of each kernel, limited by arithmetic or by memory bandwidth."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.benchmark.deviceless import Target

PARTS = ("embed", "encode", "boundary", "downsample", "mid", "upsample", "decode", "heads", "loss", "optimizer")
"""Named scopes of a training step. Kernels outside of them count as `other`."""

DTYPE_BYTES = {"pred": 1.0, "bf16": 2.0}
"""Bytes of dtypes whose names do not include the number of bits."""
WORKSPACE = "s8[33554432]"
"""The workspace of every cuBLAS matrix product. It is left out, since it is unknown how much of it is used."""
NOT_KERNELS = ("parameter", "constant", "bitcast", "get-tuple-element", "tuple", "after-all", "iota", "partition-id")

_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%(?P<name>[\w.-]+) = (?P<shape>\(.*?\)|\S+) (?P<opcode>[\w-]+)\((?P<operands>[^)]*)\)"
)
_SHAPE = re.compile(r"\b(pred|bf16|f16|f32|f64|[su]\d+)\[([\d,]*)\]")


@dataclass(frozen=True)
class Kernel:
    """One kernel launch. `part`: its part of the step. `kind`: the HLO opcode or the custom-call target. `flops`: FLOPs of its
    matrix products. `bytes`: bytes read and written."""

    part: str
    kind: str
    flops: float
    bytes: float
    float32: bool = False
    """Whether the matrix products have float32 operands."""

    def seconds(self, target: Target) -> float:
        """Time at the peak rate of the limiting resource. Launch overhead is ignored."""
        return max(self.flops / (target.float32 if self.float32 else target.bfloat16), self.bytes / target.bandwidth)


@dataclass(frozen=True)
class PartCost:
    """Total cost of the kernels in one part of a step."""

    part: str
    kernels: int
    flops: float
    bytes: float
    seconds: float


def kernels_of(program: str) -> list[Kernel]:
    """All kernels that the entry computation of an optimized program launches, in order.

    Operands and results count in full, but for operands of which a fused kernel reads only slices. This is an upper bound for a
    kernel that gathers a few rows of a large operand. A loop counts as one kernel. Raises `ValueError` if there is no entry
    computation.
    """
    computations = _computations(program)
    shapes: dict[str, str] = {}
    kernels = []
    for line in computations.get("ENTRY", ()):
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        shapes[match["name"]] = match["shape"]
        if match["opcode"] in NOT_KERNELS:
            continue
        operands = [shapes.get(name, "") for name in re.findall(r"%([\w.-]+)", match["operands"])]
        called = re.search(r"calls=%([\w.-]+)", line) if match["opcode"] == "fusion" else None
        sliced = {} if called is None else _sliced(computations.get(called[1], ()))
        read = (min(_bytes(shape), sliced.get(number, math.inf)) for number, shape in enumerate(operands))
        moved = sum(read, _bytes(match["shape"]))
        target = re.search(r'custom_call_target="([^"]+)"', line)
        kind = match["opcode"] if target is None else target[1]
        flops = _product_flops(line, match["shape"], operands) + _attention_flops(line, kind, match["shape"], operands)
        float32 = flops > 0 and operands[0].startswith("f32")
        kernels.append(Kernel(part_of(line), kind, flops, moved, float32))
    return kernels


def costs_by_part(kernels: Sequence[Kernel], target: Target) -> list[PartCost]:
    """The cost of each part of a step, in the order of `PARTS` with `other` last. Parts without kernels are left out."""
    costs = []
    for part in (*PARTS, "other"):
        own = [kernel for kernel in kernels if kernel.part == part]
        if own:
            totals = [sum(values) for values in zip(*((k.flops, k.bytes, k.seconds(target)) for k in own), strict=True)]
            costs.append(PartCost(part, len(own), *totals))
    return costs


def part_of(line: str) -> str:
    """The innermost scope of an instruction that is one of `PARTS`, or `other`."""
    name = re.search(r'op_name="([^"]*)"', line)
    scopes = re.findall(r"\w+", name[1]) if name is not None else []
    return next((scope for scope in reversed(scopes) if scope in PARTS), "other")


def _computations(program: str) -> dict[str, list[str]]:
    """The lines of every computation by its name, and of the entry computation as `ENTRY`."""
    found: dict[str, list[str]] = {}
    own: list[str] | None = None
    for line in program.splitlines():
        head = re.match(r"(ENTRY )?%([\w.-]+) .*\{$", line)
        if head is not None:
            own = found.setdefault("ENTRY" if head[1] else head[2], [])
        elif own is not None and line.startswith("}"):
            own = None
        elif own is not None:
            own.append(line)
    if "ENTRY" not in found:
        raise ValueError("the program has no ENTRY")
    return found


def _sliced(lines: Sequence[str]) -> dict[int, float]:
    """The bytes that a fused computation reads of those of its parameters of which it reads only slices, by their number."""
    users: dict[str, list[tuple[str, str, str]]] = {}
    parameters: dict[int, str] = {}
    for line in lines:
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        if match["opcode"] == "parameter":
            parameters[int(match["operands"])] = match["name"]
        for place, name in enumerate(re.findall(r"%([\w.-]+)", match["operands"])):
            opcode = match["opcode"] if place == 0 else "other"
            users.setdefault(name, []).append((opcode, match["name"], match["shape"]))

    def read(name: str) -> float:
        total = 0.0
        for opcode, user, shape in users.get(name, ()):
            if opcode == "bitcast":
                total += read(user)
            else:
                total += _bytes(shape) if opcode in ("slice", "dynamic-slice") else math.inf
        return total

    return {number: read(name) for number, name in parameters.items()}


def _bytes(shape: str) -> float:
    plain = shape.replace(WORKSPACE, "")
    return sum((_size(dtype) * _count(dims) for dtype, dims in _SHAPE.findall(plain)), 0.0)


def _size(dtype: str) -> float:
    return DTYPE_BYTES[dtype] if dtype in DTYPE_BYTES else int(dtype[1:]) / 8


def _count(dims: str) -> int:
    return math.prod(int(dim) for dim in dims.split(",") if dim)


def _product_flops(line: str, shape: str, operands: Sequence[str]) -> float:
    """2·m·n·k for a cuBLAS matrix product, whose text names the contracted axes; 0 for other instructions."""
    contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', line)
    result = _SHAPE.search(shape)
    first = _SHAPE.search(operands[0]) if operands else None
    if contracted is None or result is None or first is None:
        return 0.0
    dims = [int(dim) for dim in first[2].split(",") if dim]
    return 2.0 * _count(result[2]) * math.prod(dims[int(axis)] for axis in re.findall(r"\d+", contracted[1]))


def _attention_flops(line: str, kind: str, shape: str, operands: Sequence[str]) -> float:
    """FLOPs of a kernel of `unet.fused_attention`, as if every query saw every key that it is given; 0 for other instructions.

    The forward pass has two products, of queries by keys and of weights by values. The backward pass computes the logits again
    and the gradient of the weights, and has one more product for each gradient it returns.
    """
    if not kind.startswith("mosaic_gpu") or "fused_attention" not in line or len(operands) < 3:
        return 0.0
    query, key = ([int(size) for size in dims.split(",")] for _, dims in _SHAPE.findall(" ".join(operands[:2])))
    backward = any(operand.startswith("f32") for operand in operands)
    products = 2 + (len(re.findall(r"\bbf16\[", shape)) if backward else 0)
    return products * 2.0 * math.prod(query) * key[1]
