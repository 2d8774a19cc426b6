"""The rows of a run as its processes read them: one at a time, from a file that machine 0 has written for all.

A rank of a thousand trains a thousandth of the rows, but does not know which before it has planned. As Python's objects
ten million rows take 25 GB of each rank, and minutes to read; of an SQLite file a rank reads what it trains.
"""

import errno
import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from vfun_cli.metadata.records import Metadata, SetOfRows

_TABLES = ("CREATE TABLE rows (row INTEGER PRIMARY KEY, fields TEXT)", "CREATE TABLE about (digest TEXT, said TEXT)")


def store_rows(path: Path, metadata: Metadata, digest: str) -> None:
    """Write the rows to a file, in the place of an earlier one.

    Args:
        digest: what the rows are known by, for those who read them.

    Raises:
        OSError: it cannot be written.
    """
    new = unfinished(path)
    new.unlink(missing_ok=True)
    try:
        with closing(_connect(new, "nolock=1")) as database, database:  # this process alone knows of it
            database.execute("PRAGMA journal_mode = OFF")
            database.execute("PRAGMA synchronous = OFF")
            for table in _TABLES:
                database.execute(table)
            database.executemany("INSERT INTO rows VALUES (?, ?)", _lines(metadata))
            database.execute("INSERT INTO about VALUES (?, ?)", (digest, _said(metadata)))
    except sqlite3.OperationalError as error:
        full = error.sqlite_errorcode == sqlite3.SQLITE_FULL
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(path)) from error
    new.replace(path)


def unfinished(path: Path) -> Path:
    """The same file while it is written."""
    return path.with_name(f".{path.name}.new")


def stored_rows(path: Path, digest: str) -> tuple[Metadata, Callable[[int], Mapping[str, Any]]] | None:
    """What the rows are without their records, and a function that reads the fields of one by its number.

    None where the file is not there, or holds other rows: a network's file system may show that of an earlier launch
    for a while.
    """
    if not path.is_file():
        return None
    database = _connect(path, "mode=ro&immutable=1")  # nobody writes into it: what replaces it is another file
    with suppress(sqlite3.Error, ValueError):
        known, said = database.execute("SELECT digest, said FROM about").fetchone()
        if known == digest:
            return _metadata(json.loads(said)), lambda row: _fields(database, row)
    database.close()
    return None


def _lines(metadata: Metadata) -> Iterator[tuple[int, str]]:
    return ((record.row, json.dumps(dict(record.fields))) for record in metadata.records)


def _fields(database: sqlite3.Connection, row: int) -> Mapping[str, Any]:
    (text,) = database.execute("SELECT fields FROM rows WHERE row = ?", (row,)).fetchone()
    fields: Mapping[str, Any] = json.loads(text)
    return fields


def _said(metadata: Metadata) -> str:
    sets = [vars(each) for each in metadata.sets]
    return json.dumps({"path": str(metadata.path), "format": metadata.format, "rows": metadata.rows, "sets": sets})


def _metadata(said: Mapping[str, Any]) -> Metadata:
    return Metadata(
        path=Path(said["path"]),
        format=said["format"],
        rows=said["rows"],
        records=(),
        problems=(),
        sets=tuple(SetOfRows(**each) for each in said["sets"]),
    )


def _connect(path: Path, how: str) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.absolute().as_uri()}?{how}", uri=True, check_same_thread=False)
