"""A stream in memory that knows what was read of it."""

import numpy as np

from data import Shard
from data.documents import AbstractSource


class Recorded(AbstractSource):
    """A stream of documents in shards, which knows the shards that were opened."""

    name = "recorded"
    streamed = True

    def __init__(self, shards=7, documents=6):
        rng, self.opened = np.random.default_rng(0), []
        self.texts = {
            f"{shard}": [b"%d/%d " % (shard, i) + rng.bytes(40).hex().encode() for i in range(documents)]
            for shard in range(shards)
        }

    def shards(self):
        return [Shard(name, 100) for name in self.texts]

    def documents(self, shard):
        self.opened.append(shard.name)
        return iter(self.texts[shard.name])
