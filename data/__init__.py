"""Text for byte-level language models: data sources, protocols that make training sequences (rows), a deterministic loader."""

from data.coverage import Coverage
from data.documents import BOS, AbstractSource, DataError, Shard
from data.fixed import FixedSplits
from data.loader import Batch, Batches, Split, WorkerError, load, open_batches
from data.rows import HeldOutRow, MemoryRows, Protocol, Row
from data.sources import open_source

__all__ = [
    "BOS",
    "AbstractSource",
    "Batch",
    "Batches",
    "Coverage",
    "DataError",
    "FixedSplits",
    "HeldOutRow",
    "MemoryRows",
    "Protocol",
    "Row",
    "Shard",
    "Split",
    "WorkerError",
    "load",
    "open_batches",
    "open_source",
]
