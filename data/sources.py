"""From the name of a data set to its source."""

from __future__ import annotations

from pathlib import Path

from data.builtin import StandardLibraryCode, StandardLibraryDocs
from data.documents import AbstractSource
from data.files import Files
from data.hub import HubSource
from data.hub_names import HUB_DATASETS, hub_dataset


def open_source(
    name: str, *, text_field: str | None = None, cache: Path | None = None, cache_bytes: int = 8 * 2**30
) -> AbstractSource:
    """The source called `name`.

    `docs` and `stdlib` come with Python. `codeparrot`, `codeparrot-clean`, `fineweb`, `fineweb-edu` (samples of ten billion
    tokens), `fineweb-100BT`, `fineweb-edu-100BT` and `hub:owner/name/folder@revision` (folder and revision are optional) are
    data sets of the Hugging Face hub, of which `cache` keeps up to `cache_bytes`. Every other name is the path of a file, a
    folder or a glob. `text_field` is the field of structured files with the text (default: that of the named data set, else
    `text`). Raises `DataError` if there is no such source.
    """
    if name == "docs":
        return StandardLibraryDocs()
    if name == "stdlib":
        return StandardLibraryCode()
    if name in HUB_DATASETS:
        dataset = HUB_DATASETS[name]
    elif name.startswith("hub:"):
        dataset = hub_dataset(name)
    else:
        return Files(name, text_field or "text")
    return HubSource(dataset, text_field=text_field or dataset.text_field, cache=cache, cache_bytes=cache_bytes)
