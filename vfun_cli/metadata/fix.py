"""A corrected copy of the metadata: values from the files filled in, rows beyond repair left out."""

import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from vfun_cli.errors import ConfigError, EnvironmentFault, MetadataError
from vfun_cli.metadata.checks import Report, RowFacts
from vfun_cli.metadata.codes import Problem
from vfun_cli.metadata.records import NUMBERS, MetadataFormat, own_keys

REPAIRED = frozenset({"unknown-type", "image-as-video", "video-as-image", "wrong-size", "wrong-frames", "wrong-fps"})
"""Errors that the values of the file put right."""
FILLED = ("type", *NUMBERS)


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """What ``write_fixed`` did."""

    output: Path
    kept: int
    changed: int
    """Kept rows in which a value was filled in or corrected."""
    left_out: Mapping[int, tuple[str, ...]]
    """Rows that are not in the copy, with the codes of what is wrong with them."""


def write_fixed(report: Report, output: str | Path) -> Fixed:
    """Write the rows that can be trained, in the format and order of the input, with FILLED values of the files.

    Keys of another trainer become vfun's.

    Raises:
        ConfigError: ``output`` exists (the input never changes).
        MetadataError: no row is left.
    """
    output = Path(output)
    if output.exists():
        raise ConfigError(f"{output} exists already.", hint="Name a file with --fix that does not exist yet.")
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
    changed = sum(row != dict(record.raw) for row, record in zip(rows, kept, strict=True))
    data = _render(rows, report.metadata.format, own_keys(dict.fromkeys(report.metadata.columns)))
    try:
        with output.open("xb") as file:
            file.write(data)
    except OSError as error:
        raise EnvironmentFault(
            f"{output} cannot be written: {error.strerror or error}.", hint="Choose another file with --fix."
        ) from None
    return Fixed(
        output=output, kept=len(kept), changed=changed, left_out={row: tuple(codes) for row, codes in left_out.items()}
    )


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


def _render(rows: list[dict[str, Any]], kind: MetadataFormat, columns: Iterable[str]) -> bytes:
    if kind == "csv":
        header = list(dict.fromkeys([*columns, *(key for row in rows for key in row)]))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, header, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
    try:
        return _json(rows, kind, False).encode()
    except UnicodeEncodeError:  # a lone surrogate in a caption: only its escape can be written
        return _json(rows, kind, True).encode()


def _json(rows: list[dict[str, Any]], kind: MetadataFormat, ascii_only: bool) -> str:
    if kind == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    return json.dumps(rows, ensure_ascii=ascii_only, indent=2) + "\n"
