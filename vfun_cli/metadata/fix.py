"""A corrected copy of the metadata: values from the files filled in, rows beyond repair left out."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vfun_cli.errors import ConfigError, MetadataError
from vfun_cli.files import write_output
from vfun_cli.metadata import parquet
from vfun_cli.metadata.checks import Report, RowFacts
from vfun_cli.metadata.codes import Problem
from vfun_cli.metadata.records import NUMBERS, MetadataFormat, Record, own_keys, renames

REPAIRED = frozenset({"unknown-type", "image-as-video", "video-as-image", "wrong-size", "wrong-frames", "wrong-fps"})
"""Errors that the values of the file put right."""
FILLED = ("type", *NUMBERS)


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """What ``write_fixed`` did."""

    output: Path
    kept: int
    changed: int
    """Kept rows that are not as they were."""
    put_right: Mapping[str, int]
    """By code: how many kept rows had that problem and have it no longer; all of them where the file had it."""
    filled_in: Mapping[str, int]
    """By key: rows that had none."""
    corrected: Mapping[str, int]
    """By key: rows that had another value."""
    removed: Mapping[str, int]
    """By key: rows that had one that means nothing for such a file."""
    renamed: Mapping[tuple[str, str], int]
    """By another trainer's key and vfun's: rows."""
    left_out: Mapping[int, tuple[str, ...]]
    """Rows that are not in the copy, with the codes of what is wrong with them."""


def write_fixed(report: Report, output: str | Path) -> Fixed:
    """Write the rows that can be trained, in the order of the input, with FILLED values of the files.

    In the format of the input; of a folder or Parquet, in that of the suffix of ``output``.

    Keys of another trainer become vfun's.

    Raises:
        ConfigError: ``output`` exists (the input never changes), or it is to be of a format that is not written.
        MetadataError: no row is left.
        EnvironmentFault: it cannot be written.
    """
    output = Path(output)
    left_out: dict[int, list[str]] = {}
    for problem in report.errors:
        clip = report.clips.get(problem.row) if problem.row is not None else None
        if problem.row is not None and not (clip and _is_repaired(problem, clip, report)):
            left_out.setdefault(problem.row, []).append(problem.code)
    kept = [record for record in report.metadata.records if record.row not in left_out]
    if not kept:
        raise MetadataError(
            f"{report.metadata.path}: no row is left after leaving out the bad ones.",
            hint="Without --fix, the same command lists them.",
        )
    rows = [_corrected(own_keys(record.raw), report.clips.get(record.row)) for record in kept]
    changes = [set(_changes(row, record)) for row, record in zip(rows, kept, strict=True)]
    kind = report.metadata.format if report.metadata.format in WRITTEN else format_of(output)
    data = rendered(rows, kind, own_keys(dict.fromkeys(report.metadata.columns)))
    write_output(output, data, "--fix", inputs=[report.metadata.path])
    counts = Counter(change for each in changes for change in each)
    by_key = {what: {key: count for (name, key), count in counts.items() if name == what} for what in _KEY_CHANGES}
    right = {(problem.row, problem.code) for problem in report.problems if problem.row not in left_out}
    of_all = {code for row, code in right if row is None}
    return Fixed(
        output=output,
        kept=len(kept),
        changed=sum(map(bool, changes)),
        put_right={
            code: len(kept) if code in of_all else count
            for code, count in Counter(code for _, code in right).items()
            if code in REPAIRED | _ALSO_REPAIRED
        },
        **by_key,
        renamed={key: count for (name, key), count in counts.items() if name == "renamed"},
        left_out={row: tuple(codes) for row, codes in left_out.items()},
    )


_KEY_CHANGES = ("filled_in", "corrected", "removed")
_ALSO_REPAIRED = {"missing-type", "foreign-layout", "wrong-type", "unsupported-type"}
"""In the rows that are kept."""


def _changes(row: Mapping[str, Any], record: Record) -> Iterator[tuple[str, Any]]:
    """What distinguishes a corrected row from what its record says: (how, which key)."""
    before = record.fields
    for key, value in row.items():
        if key in FILLED and key not in before:
            yield "filled_in", key
        elif key in FILLED and value != before[key]:
            yield "corrected", key
    yield from (("removed", key) for key in before.keys() - row.keys())
    yield from (("renamed", pair) for pair in renames(tuple(record.raw)).items())


def _is_repaired(problem: Problem, clip: RowFacts, report: Report) -> bool:
    if clip.kind not in report.media_types:
        return False
    if problem.code == "unsupported-type":  # says image, is a video: the corrected type is fine
        return True
    return problem.code in REPAIRED or (problem.code == "wrong-type" and problem.field in FILLED)


def _corrected(raw: Mapping[str, Any], clip: RowFacts | None) -> dict[str, Any]:
    if clip is None:
        return dict(raw)
    found: dict[str, Any] = {"type": clip.kind, "width": clip.width, "height": clip.height}
    if clip.kind == "video":
        found |= {"frames": clip.frames, "fps": _number(clip.fps)}
    stale = set(FILLED) - set(found)
    return {key: value for key, value in raw.items() if key not in stale} | found


def _number(fps: Fraction) -> int | float:
    return fps.numerator if fps.denominator == 1 else round(float(fps), 6)


WRITTEN: Mapping[MetadataFormat, tuple[str, ...]] = {
    "json": (".json",),
    "jsonl": (".jsonl", ".ndjson"),
    "csv": (".csv",),
}
"""Formats that are written, each with its suffixes."""


def format_of(output: Path) -> MetadataFormat:
    """The format that the suffix of a file to be written asks for; JSON where it says nothing.

    Raises:
        ConfigError: Parquet, which is only read.
    """
    suffix = output.suffix.lower()
    if suffix == parquet.SUFFIX:
        raise ConfigError(f"{output}: Parquet is read, not written.", hint="Name a .json, .jsonl or .csv file.")
    return next((kind for kind, suffixes in WRITTEN.items() if suffix in suffixes), "json")


def rendered(rows: Sequence[Mapping[str, Any]], kind: MetadataFormat, columns: Iterable[str] = ()) -> bytes:
    """Rows as the bytes of a metadata file.

    Args:
        columns: those that come first in a CSV.

    Raises:
        ConfigError: CSV has no place for what a row holds.
    """
    if kind == "csv":
        if nested := [key for row in rows for key, value in row.items() if isinstance(value, list | dict)]:
            raise ConfigError(f"a CSV has no place for a list, as {nested[0]} is.", hint="Write JSON or JSON lines.")
        header = list(dict.fromkeys([*columns, *(key for row in rows for key in row)]))
        text = io.StringIO(newline="")
        # Python puts a cell in quotes for what is in the line's end: a lone \r would be read as one.
        ending = SimpleNamespace(write=lambda line: text.write(line.removesuffix("\r\n") + "\n"))
        writer = csv.DictWriter(ending, header, restval="", lineterminator="\r\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
    try:
        return _json(rows, kind, False).encode()
    except UnicodeEncodeError:  # a lone surrogate in a caption: only its escape can be written
        return _json(rows, kind, True).encode()


def _json(rows: Sequence[Mapping[str, Any]], kind: MetadataFormat, ascii_only: bool) -> str:
    if kind == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    return json.dumps(list(rows), ensure_ascii=ascii_only, indent=2) + "\n"
