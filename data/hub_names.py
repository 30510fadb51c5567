"""Names of data sets on the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass

from data.documents import DataError


@dataclass(frozen=True)
class HubDataset:
    """The location of a data set on the hub.

    `folder`: a folder of the repository ("" for all). `patterns`: file patterns (empty: the first of `hub.FORMATS` that
    occurs). `text_field`: the field with the text. `held_out_repository`: the repository of the held-out split, if it is
    a different one. `revision`: branch, tag or commit ("" for the newest commit when the data set is first listed).
    """

    name: str
    repository: str
    folder: str = ""
    patterns: tuple[str, ...] = ()
    text_field: str = "text"
    held_out_repository: str | None = None
    revision: str = ""


HUB_DATASETS: dict[str, HubDataset] = {
    dataset.name: dataset
    for dataset in (
        HubDataset("codeparrot", "transformersbook/codeparrot", patterns=("*.json.gz",), text_field="content"),
        HubDataset(
            "codeparrot-clean",
            "codeparrot/codeparrot-clean-train",
            patterns=("*.json.gz",),
            text_field="content",
            held_out_repository="codeparrot/codeparrot-clean-valid",
        ),
        HubDataset("fineweb", "HuggingFaceFW/fineweb", folder="sample/10BT", patterns=("*.parquet",)),
        HubDataset("fineweb-100BT", "HuggingFaceFW/fineweb", folder="sample/100BT", patterns=("*.parquet",)),
        HubDataset("fineweb-edu", "HuggingFaceFW/fineweb-edu", folder="sample/10BT", patterns=("*.parquet",)),
        HubDataset("fineweb-edu-100BT", "HuggingFaceFW/fineweb-edu", folder="sample/100BT", patterns=("*.parquet",)),
    )
}


def hub_dataset(name: str) -> HubDataset:
    """The data set of a name `hub:owner/name` or `hub:owner/name/folder`, optionally followed by `@revision`.

    Raises `DataError` for any other name.
    """
    path, separator, revision = name.removeprefix("hub:").partition("@")
    parts = path.split("/")
    if len(parts) < 2 or any(part in ("", ".", "..") for part in parts) or bool(separator) != bool(revision):
        raise DataError(
            f"a hub data set must be hub:owner/name, hub:owner/name/folder or hub:owner/name/folder@revision; got {name!r}"
        )
    return HubDataset(name, "/".join(parts[:2]), folder="/".join(parts[2:]), revision=revision)
