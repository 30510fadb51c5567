"""What the devices of a mesh exchange in a compiled step, as a table."""

from __future__ import annotations

import math

from experiments.benchmark.deviceless import NETWORK, TARGETS
from experiments.benchmark.whole_step import StepReport
from experiments.reporting.markdown import table
from experiments.training.sharding import AXES


def exchange_table(report: StepReport, seconds: float) -> str:
    """Collectives by kind, and the time that they take alone, beside a step whose kernels take so many `seconds` by the estimate
    (Markdown); nothing for one device."""
    if math.prod(report.mesh) == 1:
        return ""
    target = next(one for one in TARGETS.values() if one.name == report.target)
    rows = [
        (source, one.kind, one.group, one.count, f"{one.bytes / 1e6:.2f}", f"{one.moved / 1e6:.2f}")
        for source, costs in (("compiled", report.exchanged), ("paper", report.paper))
        for one in costs
    ]
    head = ["count", "collective", "devices", "arrays", "MB", "MB sent by each"]
    links = {"NVLink": target.nvlink, "a network of one port for each GPU": NETWORK}
    speeds = " or ".join(f"{report.moved / rate * 1e3:.2f} ms over {name}" for name, rate in links.items())
    mesh = " x ".join(f"{name} {size}" for name, size in zip(AXES, report.mesh, strict=True))
    return (
        f"{table(head, rows)}\nmesh {mesh}; every device sends {report.moved / 1e9:.3f} GB, {speeds}, beside "
        f"{seconds * 1e3:.2f} ms of kernels that it may overlap with\n"
    )
