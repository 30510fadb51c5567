"""Lanes: the parts of a stream that are read apart, so that each of several processes reads its own shards only.

The shards of all epochs, in the order in which they come, are dealt out to the lanes in turn. The rows of a batch come from the
lanes in equal blocks, the first from lane 0. So which text is in which row depends on the number of lanes, and on nothing else of
who reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

from data.documents import DataError

SHUFFLE_WINDOW = 1024
"""Size of the shuffle buffers of all lanes together, in rows."""

_PATIENCE = 8
"""How often a lane reads as many shards as there are, before it has found that no document of any can be used. It meets shards at
random, and not each of them."""


@dataclass(frozen=True)
class Lane:
    """The lane at `index` of `count`. One of one is the whole stream."""

    index: int = 0
    count: int = 1

    def places(self, epoch: int, shards: int) -> range:
        """Its places in the order of the `shards` of an epoch. Dealing goes on where the last epoch ended, so that no lane gets
        more shards than another in the long run."""
        return range((self.index - epoch * shards) % self.count, shards, self.count)

    @property
    def window(self) -> int:
        """Its part of `SHUFFLE_WINDOW`."""
        return (self.index + 1) * SHUFFLE_WINDOW // self.count - self.index * SHUFFLE_WINDOW // self.count

    @property
    def patience(self) -> int:
        """Epochs without a document that can be used, after which there is none. The whole stream has met all in one."""
        return 1 if self.count == 1 else _PATIENCE * self.count


def lanes_of(count: int, batch: int, rows: slice | None) -> range:
    """Those of `count` lanes that the `rows` of a batch come from; None for all rows."""
    each = batch // count
    return range(count) if rows is None else range(rows.start // each, (rows.stop - 1) // each + 1)


def require_lanes(count: int, batch: int, shards: int, name: str) -> None:
    """Raise `DataError` where a stream with so many shards cannot be divided into `count` lanes for batches of `batch` rows."""
    if batch % count:
        raise DataError(
            f"--data.lanes {count} must divide --batch {batch}, whose rows come from the lanes in equal blocks: use one of "
            f"{', '.join(str(n) for n in range(1, min(batch, shards, SHUFFLE_WINDOW) + 1) if batch % n == 0)}"
        )
    if count > max(1, shards):
        raise DataError(
            f"--data.lanes {count} are more than the {shards} shard(s) of {name}, which are dealt out to them: use "
            f"--data.lanes {most_lanes(batch, shards)}"
        )


def most_lanes(batch: int, most: int) -> int:
    """The largest number up to `most`, at least 1, that divides a batch."""
    return max(n for n in range(1, max(1, min(batch, most, SHUFFLE_WINDOW)) + 1) if batch % n == 0)
