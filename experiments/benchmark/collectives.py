"""Collectives of a training step: read from a compiled program, and counted on paper from where its parameters lie."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from estimators.sharding import DATA, FSDP, TENSOR
from experiments.training.sharding import PlacedLeaf, division_of, parts_of
from unet.tensor import is_shared

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

DTYPE_BYTES = {"pred": 1, "bf16": 2}
"""Bytes of dtypes whose names do not include the number of bits."""

_LINE = re.compile(rf"= (?P<shape>\(.*?\)|\S+) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\((?P<rest>.*)$")
_SHAPE = re.compile(r"\b(pred|bf16|f16|f32|f64|[su]\d+)\[([\d,]*)\]")

_PIECES = {"qkv": 3, "gate_up": 2, "value_gate": 2}
"""Weights that a shared layer takes apart: of each piece a device has its own heads or units."""


@dataclass(frozen=True)
class Collective:
    """One array that devices exchange: the `kind` of exchange, the bytes of the whole array, which every device of a group of
    `group` devices has a part or a summand of, and the number of its elements."""

    kind: str
    bytes: int
    group: int
    size: int

    @property
    def moved(self) -> float:
        """Bytes that each device sends, in a ring: (n - 1)/n of the array, twice that for an all-reduce."""
        return (2 if self.kind == "all-reduce" else 1) * self.bytes * (self.group - 1) / self.group


def collectives_of(program: str) -> list[Collective]:
    """Every array that the devices of an optimized program exchange, those of all branches of conditionals included. One that a
    loop exchanges counts once."""
    found = []
    for line in program.splitlines():
        match = _LINE.search(line)
        if match is None:
            continue
        kind, group = match["kind"], _group(match["rest"])
        shapes = _SHAPE.findall(match["shape"])
        if match["start"] and kind != "all-reduce":
            # The operands come first, then as many results.
            shapes = shapes[len(shapes) // 2 :]
        for dtype, dimensions in shapes:
            size = math.prod(int(one) for one in dimensions.split(",") if one)
            size *= group if kind == "reduce-scatter" else 1
            found.append(Collective(kind, size * _width(dtype), group, size))
    return [one for one in found if one.group > 1]


def _width(dtype: str) -> int:
    return DTYPE_BYTES[dtype] if dtype in DTYPE_BYTES else int(re.sub(r"\D", "", dtype)) // 8


def _group(text: str) -> int:
    """The devices of each group: of `replica_groups={{0,1},{2,3}}`, of `[4,2]<=[8]` for four groups of two, or of
    `mesh['a'=4,'b'=2] {'b'}`."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return len(listed[1].split(","))
    if counted := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
        return int(counted[2])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", named[2]))
    return 2 if "source_target_pairs" in text else 1


def on_paper(
    leaves: Iterable[PlacedLeaf], mesh: Mapping[str, int], *, widths: Sequence[int] = (4,)
) -> list[Collective]:
    """The collectives of parameters and gradients in a step: of a leaf that is divided over `FSDP`, an all-gather and a
    reduce-scatter, and an all-reduce of its part over `DATA`; of a whole leaf, one all-reduce. Where devices along `TENSOR` share
    the layer of a leaf that is not divided over it, they add up its gradient. Beside them a step exchanges scalars alone, and
    numbers for each position of a sequence where returns are centred over the batch.

    `widths`: bytes of each number of a block's leaf for each time that it is gathered. A compiler for GPUs keeps the forward and
    the backward pass apart, and gathers in the dtype of the products, but for blocks that are computed again: those it gathers
    then as they are stored. On a CPU it merges the two passes.
    """
    found = []
    for leaf in leaves:
        size = math.prod(leaf.shape)
        parts = parts_of(leaf.spec, mesh)
        if parts > 1:
            each = [size * width for width in widths] if ".blocks[" in leaf.path else [leaf.bytes]
            found += [Collective("all-gather", gathered, parts, size) for gathered in each]
            found.append(Collective("reduce-scatter", leaf.bytes, parts, size))
            found.append(Collective("all-reduce", leaf.bytes // parts, mesh[DATA], size // parts))
        else:
            found.append(Collective("all-reduce", leaf.bytes, mesh[DATA] * mesh[FSDP], size))
        division = division_of(leaf.spec)
        if is_shared(leaf.path) and (division is None or TENSOR not in division[1]):
            pieces = next((count for name, count in _PIECES.items() if f".{name}." in leaf.path), 1)
            found += [Collective("all-reduce", leaf.bytes // pieces, mesh[TENSOR], size // pieces)] * pieces
    return [one for one in found if one.group > 1]


def of_shared_layers(
    layers: int, shape: tuple[int, int, int], mesh: Mapping[str, int], *, width: int, backward: bool = True
) -> list[Collective]:
    """The sums over `TENSOR` in a step: one of the outputs of each shared layer (attention or MLP), and one of the gradient of
    its inputs. `shape`: that of the hidden states on one device; `width`: bytes of each number."""
    size = math.prod(shape)
    one = Collective("all-reduce", size * width, mesh[TENSOR], size)
    return [one] * layers * (2 if backward else 1) if mesh[TENSOR] > 1 else []


@dataclass(frozen=True)
class CollectiveCost:
    """The collectives of one kind among groups of one size: how many arrays, their bytes, and what each device sends of them."""

    kind: str
    group: int
    count: int
    bytes: int
    moved: float


def costs_by_kind(collectives: Sequence[Collective]) -> list[CollectiveCost]:
    """Totals by kind and size of the groups."""
    keys = sorted({(KINDS.index(one.kind), one.group) for one in collectives})
    costs = []
    for kind, group in keys:
        same = [one for one in collectives if one.kind == KINDS[kind] and one.group == group]
        total = sum(one.bytes for one in same), sum(one.moved for one in same)
        costs.append(CollectiveCost(KINDS[kind], group, len(same), *total))
    return costs
