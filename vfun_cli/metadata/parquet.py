"""Rows of a Parquet file, read with pyarrow, which only those need who have such files."""

from collections.abc import Iterator, Mapping
from datetime import date, time
from decimal import Decimal
from importlib.util import find_spec
from typing import IO, Any

from vfun_cli.errors import EnvironmentFault, first_line

MAGIC = b"PAR1"
"""How a Parquet file begins, and ends."""
SUFFIX = ".parquet"
ROWS_AT_ONCE = 4096


def read(file: IO[bytes]) -> tuple[tuple[str, ...], Iterator[Mapping[str, Any] | str]]:
    """The names of the columns, and the rows: what each has but nulls, or in words why it cannot be read.

    Lists and structs become lists and dictionaries; dates and decimals, texts.

    Raises:
        ValueError: the file is damaged; also from the iterator.
        EnvironmentFault: pyarrow is not installed.
    """
    if find_spec("pyarrow") is None:
        raise EnvironmentFault(
            "Parquet metadata need the Python package pyarrow, which is not installed.",
            hint="pip install 'vfun[parquet]'",
        )
    from pyarrow import parquet

    try:
        opened = parquet.ParquetFile(file)
        columns = tuple(opened.schema_arrow.names)
    except (OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"no Parquet that can be read: {first_line(error)}") from None
    if repeated := sorted({name for name in columns if columns.count(name) > 1}):
        raise ValueError(f"column {repeated[0]!r} appears more than once")
    return columns, _rows(opened)


def _rows(opened: Any) -> Iterator[Mapping[str, Any] | str]:
    try:
        for batch in opened.iter_batches(ROWS_AT_ONCE, use_threads=False):
            columns = [_values(column) for column in batch.columns]
            for place in range(batch.num_rows):
                yield _row({name: values[place] for name, values in zip(batch.schema.names, columns, strict=True)})
    except (OSError, NotImplementedError) as error:
        raise ValueError(f"damaged: {first_line(error)}") from None


def _values(column: Any) -> list[Any]:
    """What a column holds in Python's types; values that have none stay pyarrow's."""
    try:
        values: list[Any] = column.to_pylist()
    except (ValueError, NotImplementedError):  # nanoseconds, say
        values = list(column)
    return values


def _row(values: Mapping[str, Any]) -> Mapping[str, Any] | str:
    row = {}
    for name, value in values.items():
        if value is None:
            continue
        try:
            row[name] = _plain(value)
        except TypeError as error:
            return f"column {name!r} holds {error}, which no metadata has"
    return row


def _plain(value: Any) -> Any:
    """The value as JSON would have it; raises TypeError with the name of a type that it has not."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    raise TypeError(type(value).__name__)
