"""Metadata of a folder of media: the rows that it gives, with what the headers of the files say."""

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from vfun_cli.metadata.checks import Report, RowFacts, exact_rate
from vfun_cli.metadata.opening import absolute
from vfun_cli.metadata.records import Metadata, Record


def with_sound_of_videos(metadata: Metadata) -> Metadata:
    """The same where every video without a sound of its own states itself as its sound, whose track is then read."""
    return replace(metadata, records=tuple(map(_with_own_sound, metadata.records)))


def _with_own_sound(record: Record) -> Record:
    fields = record.fields
    if fields.get("type") == "image" or "audio_path" in fields:
        return record
    fields = {"file_path": fields["file_path"], "audio_path": fields["file_path"], **fields}
    return replace(record, fields=fields, raw=fields)


def rows_of(report: Report) -> list[dict[str, Any]]:
    """The rows of a report without errors, each with type, size, length and rate of its file."""
    return [{**record.raw, **_facts(report.clips[record.row])} for record in report.metadata.records]


def _facts(clip: RowFacts) -> dict[str, Any]:
    found: dict[str, Any] = {"type": clip.kind, "width": clip.width, "height": clip.height}
    if clip.kind == "video":
        found["frames"] = clip.frames
        rate = _exact(clip.fps)
        if rate is not None:
            found["fps"] = rate
    return found


def _exact(fps: Fraction) -> int | str | None:
    """A rate as it is read back to the last digit: ``30000/1001``; None for one that would be read as a standard one
    beside it, so that a plan asks the file."""
    stated = fps.numerator if fps.denominator == 1 else str(fps)
    return stated if exact_rate(stated) == fps else None


def with_absolute_paths(row: Mapping[str, Any], root: Path, names: set[str]) -> dict[str, Any]:
    """A row whose files are found from anywhere. ``names``: the fields that name one."""
    return {
        key: absolute(root / value) if key in names and isinstance(value, str) else value for key, value in row.items()
    }
