"""Everything about every byte, as a Parquet file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.config.errors import ConfigError, require
from experiments.evaluation.byte_scores import ByteScores, Text

GROUP = 2**18
"""Rows that are written at once."""


def require_writable(path: Path, *, overwrite: bool) -> None:
    """Raise `ConfigError` if `write_per_byte` would fail: without the extra `parquet`, for a file that exists and may not be
    overwritten, or in a folder that does not exist."""
    require_pyarrow("--per-byte")
    require(not path.is_dir(), f"--per-byte {path} is a folder: name a file")
    require(path.parent.is_dir(), f"--per-byte {path}: there is no folder {path.parent}")
    require(overwrite or not path.exists(), f"--per-byte {path} exists: replace it (--overwrite) or name another file")


def require_pyarrow(flag: str) -> None:
    """Raise `ConfigError` if `flag` needs pyarrow and it is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{flag} needs the package pyarrow ({error}): pip install 'caesura-lm[parquet]'") from None


def write_per_byte(path: Path, text: Text, models: Sequence[tuple[str, ByteScores]]) -> None:
    """Write a row for each model, sample and byte.

    Columns: `model`, `sample`, `document` and `offset` of the byte in it, `byte`, `log_prob` and `early_log_prob` in nats (null
    without an early head), `boundary_prob`, `boundary_depth` (how many levels closed a token, the outermost first), `forced`,
    and `boundary_1`, `boundary_2`, … for each level. What belongs to boundaries is null without a token level. The file is
    whole or not there at all.
    """
    import pyarrow
    import pyarrow.parquet

    levels = max(scores.levels for _, scores in models)
    columns = {
        "model": pyarrow.string(),
        "sample": pyarrow.int32(),
        "document": pyarrow.int32(),
        "offset": pyarrow.int64(),
        "byte": pyarrow.uint8(),
        "log_prob": pyarrow.float32(),
        "early_log_prob": pyarrow.float32(),
        "boundary_prob": pyarrow.float32(),
        "boundary_depth": pyarrow.uint8(),
        "forced": pyarrow.bool_(),
        **{f"boundary_{level + 1}": pyarrow.bool_() for level in range(levels)},
    }
    schema = pyarrow.schema(list(columns.items()))
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with pyarrow.parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for name, scores in models:
                for sample in range(len(scores.log_prob)):
                    for first in range(0, text.bytes, GROUP):
                        rows = _rows(text, name, scores, sample, slice(first, first + GROUP))
                        arrays = [_array(rows.get(column), rows["byte"].size, kind) for column, kind in columns.items()]
                        writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(f"--per-byte {path} cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _array(values: np.ndarray | None, size: int, kind):
    import pyarrow

    if values is None:
        return pyarrow.nulls(size, kind)
    # NaN stands for what is not defined.
    return pyarrow.array(values, kind, from_pandas=values.dtype.kind == "f")


def _rows(text: Text, name: str, scores: ByteScores, sample: int, part: slice) -> dict[str, np.ndarray]:
    values = text.values[part]
    rows = {
        "model": np.full(values.size, name, object),
        "sample": np.full(values.size, sample, np.int32),
        "document": text.document[part].astype(np.int32),
        "offset": text.offset[part].astype(np.int64),
        "byte": values,
        "log_prob": scores.log_prob[sample, part],
        "early_log_prob": scores.early_log_prob[sample, part],
    }
    if scores.levels:
        depth = scores.depth[sample, part]
        rows["boundary_prob"] = scores.prob[sample, part]
        rows["boundary_depth"] = depth
        rows["forced"] = ~scores.free[sample, part]
        rows |= {f"boundary_{level + 1}": depth > level for level in range(scores.levels)}
    return rows
