"""Documents in Parquet files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from data.documents import DataError, checked_size, checked_utf8, shown
from data.left_out import Count, ignored

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

_ROWS = 8
"""Rows that are decoded at a time. Few, since a small file can repeat one long text of its dictionary in all of them."""


def parquet_documents(path: Path, text_field: str, count: Count = ignored) -> Iterator[bytes]:
    """The texts in the column `text_field`: strings, or bytes that are UTF-8. Checksums of pages are checked where there are any.

    Empty texts give no document; nor do null ones, which are counted. Raises `DataError`, with the file and the row.
    """
    pyarrow = _pyarrow(path)
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True, buffer_size=1 << 16) as table:
            _check_column(table.schema_arrow, path, text_field)
            row = 0
            for batch in table.iter_batches(batch_size=_ROWS, columns=[text_field], use_threads=False):
                for value in batch.column(0):
                    content = _bytes_of(value)
                    if content is None:
                        count("rows", 1)
                    elif content:
                        checked_size(len(content), f"{path}, row {row},")
                        yield checked_utf8(content, f"{path}, row {row},")
                    row += 1
            if row != table.metadata.num_rows:
                raise DataError(f"{path} has {row:,} of its {table.metadata.num_rows:,} rows: it is damaged")
    except (pyarrow.ArrowException, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def text_bytes(path: Path, text_field: str, at_most: int) -> int:
    """The number of bytes of all texts, or a number above `at_most` if there are more. Raises `DataError`."""
    size = 0
    for document in parquet_documents(path, text_field):
        size += len(document)
        if size > at_most:
            break
    return size


def _pyarrow(path: Path):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path} needs the package pyarrow: pip install 'caesura-lm[parquet]'") from None
    return pyarrow


def _check_column(schema: pyarrow.Schema, path: Path, text_field: str) -> None:
    """Raises `DataError` unless there is one column of texts called `text_field`."""
    import pyarrow

    names = schema.names
    if text_field not in names:
        fields = shown(", ".join(names))
        raise DataError(
            f"{path} has no text field '{shown(text_field)}': it has {fields}; name one with --data.text-field"
        )
    if names.count(text_field) > 1:
        raise DataError(
            f"{path} has {names.count(text_field)} columns called '{shown(text_field)}'; rename them, and name one with "
            "--data.text-field"
        )
    kind = schema.field(text_field).type
    values = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not any(
        is_kind(values)
        for is_kind in (
            *(pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view),
            *(pyarrow.types.is_binary, pyarrow.types.is_large_binary, pyarrow.types.is_binary_view),
            *(pyarrow.types.is_fixed_size_binary, pyarrow.types.is_null),
        )
    ):
        raise DataError(
            f"the column '{shown(text_field)}' of {path} is of the kind {shown(str(kind))}; texts must be strings, or bytes"
        )


def _bytes_of(value: pyarrow.Scalar) -> bytes | None:
    import pyarrow

    if isinstance(value, pyarrow.DictionaryScalar):
        value = value.value
    return value.as_buffer().to_pybytes() if value.is_valid else None
