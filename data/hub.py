"""placeholder"""

from dataclasses import dataclass


@dataclass(frozen=True)
class HubDataset:
    name: str
    repository: str
    patterns: tuple
    text_field: str


HUB_DATASETS = {}


class HubSource: ...
