"""Metadata: JSON lists, JSON lines, CSV, Parquet and folders, read into records with every bad row reported."""

import codecs
import csv
import hashlib
import io
import json
import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Literal

from vfun_cli import lfs
from vfun_cli.errors import ConfigError, did_you_mean
from vfun_cli.files import open_bounded
from vfun_cli.metadata import parquet
from vfun_cli.metadata.codes import Problem
from vfun_cli.typed_json import is_deeper

MetadataFormat = Literal["json", "jsonl", "csv", "parquet", "folder"]
LARGEST_METADATA = 1 << 34
"""Bytes: a hundred million rows."""
DEEPEST = 50
"""Lists and objects within each other in a row; other trainers have a few."""
NUMBERS = ("width", "height", "frames", "fps")
"""Optional fields that spare a look into the file."""
OTHER_KEYS: Mapping[str, tuple[str, ...]] = {
    "file_path": (
        "video", "video_path", "path", "media_path", "media", "file", "file_name", "filename", "image", "image_path",
    ),
    "text": ("caption", "captions", "cap", "prompt", "text_prompt"),
}  # fmt: skip
"""What other trainers call the fields that every row has; where a row has several, the first counts."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One row of the metadata."""

    row: int
    """Counts from 0 in file order, bad rows included."""
    fields: Mapping[str, Any]
    """What the row says, under vfun's keys; in CSV empty cells are absent and the NUMBERS are numbers."""
    raw: Mapping[str, Any]
    """What the file has, for writing it back."""
    root: Path | None = None
    """Where its paths start from, if its data set has a place of its own."""


@dataclass(frozen=True, kw_only=True)
class SetOfRows:
    """Where the rows of one of several data sets begin."""

    name: str
    first: int
    said: str
    """What else is said of the set, such as how often it is shown."""


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """A metadata file or a folder as read. ``rows`` counts bad rows too."""

    path: Path
    format: MetadataFormat
    rows: int
    records: tuple[Record, ...]
    problems: tuple[Problem, ...]
    columns: tuple[str, ...] = field(default=())
    """The header of a CSV file."""
    sets: tuple[SetOfRows, ...] = ()
    """Where the rows are those of several data sets one after another, or more is said of the one."""

    def set_of(self, row: int) -> int:
        """Which of the data sets a row is of."""
        return max(0, bisect_right(self.sets, row, key=lambda each: each.first) - 1)

    def place(self, row: int) -> str:
        """What a row is called in messages: its number in its own set, counted from 0."""
        if len(self.sets) < 2:
            return f"row {row}"
        found = self.sets[self.set_of(row)]
        return f"row {row - found.first} of {found.name}"

    @property
    def whole(self) -> str:
        """What is meant with problems of no row."""
        return "folder" if self.format == "folder" else "file"


def read_metadata(path: str | Path) -> Metadata:
    """Read JSON, JSON lines, CSV, Parquet or a folder. Never raises for what they hold: bad rows and files become
    problems.

    A ``.csv``, ``.jsonl`` or ``.parquet`` suffix decides the format; otherwise the first characters do.

    Raises:
        EnvironmentFault: it is Parquet, and pyarrow is not installed.
    """
    path = Path(path)
    if is_folder(path):
        from vfun_cli.metadata.folder import read_folder  # which makes what is declared above

        return read_folder(path)
    try:
        with open_bounded(path, LARGEST_METADATA) as file:
            begin = file.read(4)  # of gigabytes that are no text, no more
            if begin == parquet.MAGIC or path.suffix.lower() == parquet.SUFFIX:
                file.seek(0)
                return _read_parquet(path, file)
            if begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in begin:
                message = f"{path}: line 1: not UTF-8 (UTF-16, or no text)"
                return _failed(path, "json", "unparsable-metadata", message)
            file.seek(0)
            return _read_bytes(path, file.read())
    except OSError as error:
        return _failed(path, "json", "unreadable-metadata", f"{path}: {error.strerror or error}")
    except MemoryError:
        return _failed(path, "json", "unreadable-metadata", f"{path}: it does not fit into this machine's memory")


def _read_bytes(path: Path, data: bytes) -> Metadata:
    if data.startswith(lfs.START):
        return _failed(path, "json", "lfs-pointer", f"{path}: {lfs.WHAT}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return _failed(path, "json", "unparsable-metadata", f"{path}: line {line}: not UTF-8 (byte {error.start})")
    kind = _format(path, text)
    if not text.strip():
        return _failed(path, kind, "empty-metadata", f"{path}: the file is empty")
    return _READERS[kind](path, text)


def own_keys(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with vfun's keys in the place of another trainer's; a key in another case is one too."""
    keys = renames(tuple(row))
    return {keys.get(key, key): value for key, value in row.items()} if keys else row


@lru_cache  # the rows of a file have few different sets of keys
def renames(keys: tuple[str, ...]) -> Mapping[str, str]:
    """vfun's key by each key of another trainer that stands in its place."""
    lower = {key.lower(): key for key in keys}
    found = {}
    for own, others in OTHER_KEYS.items():
        there = next((lower[name] for name in (own, *others) if name in lower), own)
        if own not in keys and there != own:
            found[there] = own
    return found


def metadata_digest(path: Path) -> str:
    """SHA-256 of the metadata file's bytes; of a folder, of the records that it gives."""
    if is_folder(path):
        records = [(record.row, record.raw) for record in read_metadata(path).records]
        return hashlib.sha256(json.dumps(records).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_folder(path: Path) -> bool:
    """Whether metadata of this name are a folder of media."""
    return os.path.isdir(path)  # noqa: PTH112 - Path.is_dir raises where it may not look


def root_of(meta: Path, stated: Path | None) -> Path:
    """The folder that the paths in metadata start from: a folder itself, else what is stated, else the file's own."""
    return meta if is_folder(meta) else stated or meta.parent


def find_row(metadata: Metadata, wanted: str, names: Iterable[str]) -> int:
    """The row that ``wanted`` means: its number, or a path or name of a file in one of the fields ``names``.

    Raises:
        ConfigError: there is none, or more than one.
    """
    if re.fullmatch(r"0|[1-9][0-9]{,17}", wanted):  # 00000003 is a name
        return int(wanted)
    files = {
        (record.row, value)
        for record in metadata.records
        for name in names
        if isinstance(value := record.fields.get(name), str)
    }
    for same in (lambda file: file == wanted, lambda file: Path(file).name == wanted, lambda file: _ends(wanted, file)):
        rows = sorted({row for row, file in files if same(file)})
        if len(rows) == 1:
            return rows[0]
        if rows:
            shown = ", ".join(map(str, rows[:10])) + (" …" if len(rows) > 10 else "")
            raise ConfigError(f"{wanted} is in {len(rows)} rows: {shown}.", hint="Name one of them by its number.")
    raise ConfigError(
        f"{metadata.path} has no row with a file {wanted}.{did_you_mean(wanted, (file for _, file in files))}",
        hint="Name a row by its number (from 0), or by its path or file name as the metadata has it.",
    )


def _ends(wanted: str, file: str) -> bool:
    """Whether a path typed from elsewhere (``datasets/train/1.mp4``) or without its suffix means this file."""
    return Path(wanted).parts[-len(Path(file).parts) :] == Path(file).parts or Path(file).stem == wanted


def _format(path: Path, text: str) -> MetadataFormat:
    if path.suffix.lower() == ".csv":
        return "csv"
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return "jsonl"
    start = text.lstrip()[:1]
    return "jsonl" if start == "{" else "json" if start == "[" or path.suffix.lower() == ".json" else "csv"


def _failed(path: Path, kind: MetadataFormat, code: str, message: str) -> Metadata:
    problem = Problem(row=None, code=code, message=message, path=str(path))
    return Metadata(path=path, format=kind, rows=0, records=(), problems=(problem,))


def _collect(
    path: Path, kind: MetadataFormat, rows: Iterator[Record | Problem], columns: tuple[str, ...] = ()
) -> Metadata:
    found = list(rows)
    records = tuple(item for item in found if isinstance(item, Record))
    problems = tuple(item for item in found if isinstance(item, Problem))
    if not found:
        return _failed(path, kind, "empty-metadata", f"{path}: no records")
    foreign = Counter(pair for record in records for pair in renames(tuple(record.raw)).items())
    renamed = "--fix OUT writes a copy with it renamed"
    told = [
        Problem(
            row=None, code="foreign-layout", field=own,
            message=f"{count} of {len(found)} rows have {key!r} where vfun reads {own!r}: {renamed}",
        )
        for (key, own), count in foreign.items()
    ]  # fmt: skip
    problems = (*told, *problems)
    return Metadata(path=path, format=kind, rows=len(found), records=records, problems=problems, columns=columns)


def _parse(text: str) -> Any:
    """JSON, with everything that Python's parser raises on bad input turned into ValueError."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _where(error: ValueError, text: str, line: int = 1) -> str:
    """``line 3, column 7: why`` and the line itself."""
    if not isinstance(error, json.JSONDecodeError):
        return f"line {line}: {error}"
    lines = text.splitlines()
    shown = lines[error.lineno - 1].strip()[:80] if error.lineno <= len(lines) else ""
    return f"line {line + error.lineno - 1}, column {error.colno}: {error.msg}" + (f" in {shown!r}" if shown else "")


def _read_json(path: Path, text: str) -> Metadata:
    try:
        data = _parse(text)
    except ValueError as error:
        return _failed(path, "json", "unparsable-metadata", f"{path}: {_where(error, text)}")
    return _read_value(path, data)


def _read_value(path: Path, data: Any) -> Metadata:
    """The list of records, the one list of records in an object around it, or a record alone."""
    key = _key_of_list(data)
    if key is not None:
        message = f"the list of records lies in an object, under {key!r}: --fix OUT writes the list alone"
        problem = Problem(row=None, code="foreign-layout", message=message, path=str(path))
        inside = _read_value(path, data[key])
        return replace(inside, problems=(problem, *inside.problems))
    if isinstance(data, dict) and own_keys(data).keys() & OTHER_KEYS.keys():
        data = [data]  # one record alone
    if not isinstance(data, list):
        return _failed(
            path, "json", "unparsable-metadata", f"{path}: line 1: a list of records is needed, not {_kind(data)}"
        )
    return _collect(path, "json", (_record(row, item, f"record {row}") for row, item in enumerate(data)))


def _key_of_list(data: Any) -> str | None:
    """Under which key an object that is no record holds its one list of records."""
    if not isinstance(data, dict) or own_keys(data).keys() & OTHER_KEYS.keys():
        return None
    lists = [key for key, value in data.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    return lists[0] if len(lists) == 1 else None


def _read_lines(path: Path, text: str) -> Metadata:
    try:
        data = _parse(text)  # ends at the second line of a JSON lines file
    except ValueError:
        data = None
    if _key_of_list(data) is not None:
        return _read_value(path, data)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows = [_line(row, number, line) for row, (number, line) in enumerate(lines)]
    if all(isinstance(item, Problem) for item in rows):  # not one good line: then it is no JSON lines file
        if data is not None:
            return _read_value(path, data)
        return _failed(path, "jsonl", "unparsable-metadata", f"{path}: {rows[0].message}")  # type: ignore[union-attr]
    return _collect(path, "jsonl", iter(rows))


def _line(row: int, number: int, line: str) -> Record | Problem:
    try:
        return _record(row, _parse(line), f"line {number}")
    except ValueError as error:
        return Problem(row=row, code="malformed-row", message=_where(error, line, number))


def _record(row: int, item: Any, place: str) -> Record | Problem:
    if not isinstance(item, dict):
        return Problem(row=row, code="malformed-row", message=f"{place}: an object is needed, not {_kind(item)}")
    if is_deeper(item, DEEPEST):
        return Problem(row=row, code="malformed-row", message=f"{place}: nested too deeply")
    return Record(row=row, fields=own_keys(item), raw=item)


def _read_parquet(path: Path, file: IO[bytes]) -> Metadata:
    try:
        columns, rows = parquet.read(file)
    except ValueError as error:
        return _failed(path, "parquet", "unparsable-metadata", f"{path}: {error}")
    if not own_keys(dict.fromkeys(columns)).keys() & {"file_path", "text", "type"}:
        message = f"{path}: no column file_path, text or type among {len(columns)}"
        return _failed(path, "parquet", "unparsable-metadata", message)
    try:
        return _collect(path, "parquet", (_parquet_row(row, said) for row, said in enumerate(rows)))
    except ValueError as error:  # pages are read only now
        return _failed(path, "parquet", "unparsable-metadata", f"{path}: {error}")


def _parquet_row(row: int, said: Mapping[str, Any] | str) -> Record | Problem:
    if isinstance(said, str):
        return Problem(row=row, code="malformed-row", message=f"record {row}: {said}")
    return _record(row, said, f"record {row}")


def _read_csv(path: Path, text: str) -> Metadata:
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        table = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except csv.Error as error:
        return _failed(path, "csv", "unparsable-metadata", f"{path}: line {reader.line_num}: {error}")
    columns = tuple(cell.strip() for cell in table[0][1])
    if repeated := sorted({name for name in columns if columns.count(name) > 1}):
        return _failed(
            path, "csv", "unparsable-metadata", f"{path}: line 1: column {repeated[0]!r} appears more than once"
        )
    if not own_keys(dict.fromkeys(columns)).keys() & {"file_path", "text", "type"}:
        return _failed(
            path, "csv", "unparsable-metadata", f"{path}: line 1: no header with file_path, text and type in it"
        )
    return _collect(path, "csv", (_cells(row, columns, *line) for row, line in enumerate(table[1:])), columns)


def _cells(row: int, columns: tuple[str, ...], number: int, cells: list[str]) -> Record | Problem:
    if len(cells) != len(columns):
        message = f"line {number}: {len(cells)} cells under {len(columns)} columns"
        return Problem(row=row, code="malformed-row", message=message)
    raw = dict(zip(columns, cells, strict=True))
    # An empty caption is a caption; any other empty cell is an absent value.
    values = {key: cell_value(value) if key in NUMBERS else value for key, value in own_keys(raw).items()}
    return Record(row=row, fields={k: v for k, v in values.items() if v != "" or k == "text"}, raw=raw)


def cell_value(cell: str) -> Any:
    """The number in a CSV cell; what is none stays text, for a check to say so."""
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell.strip()


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


_READERS = {"json": _read_json, "jsonl": _read_lines, "csv": _read_csv}
