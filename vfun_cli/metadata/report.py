"""A validation report for people (Rich) and for programs (JSON)."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vfun_cli.files import write_output
from vfun_cli.metadata.checks import Report, describe, printable
from vfun_cli.metadata.codes import CODES, Problem, Severity, explain
from vfun_cli.metadata.fields import texts_of
from vfun_cli.metadata.fix import Fixed

COLOURS: dict[Severity, str] = {"error": "red", "warning": "yellow", "note": "cyan"}
ORDER = {severity: place for place, severity in enumerate(COLOURS)}
CAPTION_STEPS = (0, 50, 100, 200, 400, 800)
"""Characters."""
BAR = 24
MOST_LINES = 12
"""Of one row in the table: of a folder as a whole there may be one for every file."""
MOST_ROWS = 20
"""That are named where any number may be meant."""


def to_json(report: Report, fixed: Fixed | None = None) -> dict[str, Any]:
    """The object that ``validate-meta --json`` prints, without its ``schema``; ``fixed`` is what ``--fix`` did."""
    return {
        "rows": report.rows,
        "first_row": 0,
        "ok": report.ok,
        "problems": [problem_json(problem) for problem in report.problems],
        "counts": dict(Counter(problem.code for problem in report.problems)),
        "totals": totals(report),
        "fixed": None if fixed is None else _fixed_json(fixed),
    }


def _fixed_json(fixed: Fixed) -> dict[str, Any]:
    return {
        "output": printable(str(fixed.output)),
        "rows": fixed.kept,
        "changed": fixed.changed,
        "put_right": dict(fixed.put_right),
        "filled_in": dict(fixed.filled_in),
        "corrected": dict(fixed.corrected),
        "removed": dict(fixed.removed),
        "renamed": [{"from": old, "to": new, "rows": rows} for (old, new), rows in fixed.renamed.items()],
        "left_out": [{"row": row, "codes": list(dict.fromkeys(codes))} for row, codes in fixed.left_out.items()],
    }


def problem_json(problem: Problem) -> dict[str, Any]:
    """One problem as an object of printable texts."""
    return {
        "row": problem.row,
        "field": problem.field,
        "code": problem.code,
        "severity": problem.severity,
        "path": printable(problem.path) if problem.path is not None else None,
        "message": printable(problem.message),
    }


PROBLEMS = re.compile(rb'\{"row": (null|\d+), "field": (null|"\w*"), "code": "[a-z-]+", "severity": "')
"""How a file of problems begins."""


def write_problems(report: Report, path: Path) -> None:
    """All problems as JSON lines, in the place of earlier ones.

    Raises:
        ConfigError: the file is something else.
        EnvironmentFault: it cannot be written.
    """
    lines = "".join(json.dumps(problem_json(problem), ensure_ascii=False) + "\n" for problem in report.problems)
    write_output(path, lines.encode(), "--problems", ours=PROBLEMS, inputs=[report.metadata.path])


def totals(report: Report) -> dict[str, Any]:
    """Clips, hours, sizes, frame rates and caption lengths of the rows without errors."""
    good = [clip for row, clip in sorted(report.clips.items()) if row not in report.bad_rows]
    videos = [clip for clip in good if clip.kind == "video" and clip.fps]
    return {
        "videos": len(videos),
        "images": sum(clip.kind == "image" for clip in good),
        "frames": sum(clip.frames for clip in videos),
        "hours": round(float(sum(clip.frames / clip.fps for clip in videos)) / 3600, 6),
        "sizes": _counted(f"{clip.width}x{clip.height}" for clip in good),
        "frame_rates": _counted(f"{float(clip.fps):.5g}" for clip in videos),
        "seconds": _min_median_max([float(clip.frames / clip.fps) for clip in videos]),
        "caption_characters": _min_median_max(_caption_lengths(report)),
    }


def render(report: Report, console: Console, *, worst: int = 10) -> None:
    """Counts by code, the worst rows, totals and histograms."""
    if not report.rows:
        for problem in report.problems:  # of the file as a whole: there is nothing to count
            said = f"{describe(problem)}\n  {CODES[problem.code].fix}"
            console.print(Text("error:", "red"), said, soft_wrap=True)
        return
    if report.problems:
        console.print(_codes_table(report))
        console.print(_worst_table(report, worst))
    _render_totals(report, console)
    good, bad = report.ok, len(report.bad_rows)
    verdict = Text(f"{good} of {report.rows} rows are good", "green")
    if bad:
        verdict = Text.assemble((f"{bad} of {report.rows} rows cannot be trained on", "red"), f", {good} can")
    elif report.errors:
        whole = (f"the {report.metadata.whole} as a whole cannot be trained on", "red")
        verdict = Text.assemble(whole, f", {good} of {report.rows} rows are good")
    warned = sum(problem.severity == "warning" for problem in report.problems)
    console.print(Text.assemble(verdict, f", {warned} warning{'s' if warned > 1 else ''}" if warned else ""))


def render_fixed(fixed: Fixed, console: Console) -> None:
    """What ``--fix`` wrote and which rows it left out."""
    lines = [f"wrote {fixed.output}: {_rows(fixed.kept)}, {fixed.changed} of them changed"]
    for what, counts in (
        ("put right", fixed.put_right), ("corrected", fixed.corrected), ("filled in", fixed.filled_in),
        ("removed", fixed.removed), ("renamed", {f"{old} to {new}": n for (old, new), n in fixed.renamed.items()}),
    ):  # fmt: skip
        if counts:
            lines.append(f"  {what}: {', '.join(f'{name} in {_rows(count)}' for name, count in counts.items())}")
    if fixed.left_out:
        lines.append(f"  left out: {_rows(len(fixed.left_out))} (counted from 0)")
    by_code: dict[str, list[int]] = {}
    for row, codes in sorted(fixed.left_out.items()):
        for code in dict.fromkeys(codes):
            by_code.setdefault(code, []).append(row)
    for code, rows in by_code.items():
        more = " …" if len(rows) > MOST_ROWS else ""
        lines.append(f"    {code}: {_rows(len(rows))}: {', '.join(map(str, rows[:MOST_ROWS]))}{more}")
    console.print("\n".join(lines), soft_wrap=True)


def _rows(count: int) -> str:
    return f"{count} row{'s' * (count != 1)}"


def codes_json(name: str) -> dict[str, Any]:
    """The same as an object, for programs."""
    codes = CODES.values() if name == "all" else [explain(name)]
    return {"codes": [dict(vars(code)) for code in codes]}


def render_code(name: str, console: Console) -> None:
    """One code of ``--explain``, or the list of them for ``all``.

    Raises:
        ConfigError: an unknown code.
    """
    if name == "all":
        table = Table("code", "severity", "what it means", title="Problem codes", title_justify="left")
        for code in CODES.values():
            table.add_row(code.name, Text(code.severity, COLOURS[code.severity]), code.explanation)
        console.print(table)
        return
    code = explain(name)
    console.print(Text.assemble((code.name, "bold"), " (", (code.severity, COLOURS[code.severity]), ")"))
    for label, text in (("what", code.explanation), ("example", code.example), ("fix", code.fix)):
        console.print(f"  {label:8}{text}")


def summary_of_warnings(report: Report) -> list[str]:
    """One line a code, the commonest first: ``silent-audio: 12 rows, first row 3: nothing is louder …``."""
    warnings = [problem for problem in report.problems if problem.severity == "warning"]
    lines = []
    for code, count in Counter(problem.code for problem in warnings).most_common():
        first = next(problem for problem in warnings if problem.code == code)
        where = f"{count} row{'s' if count > 1 else ''}, {'first ' if count > 1 else ''}row {first.row}: "
        if first.row is None:
            where = f"{count} times, first " if count > 1 else ""
        lines.append(f"{code}: {where}{printable(first.message)}")
    return lines


def _codes_table(report: Report) -> Table:
    table = Table("code", "severity", "count", "first row", "example", title="Problems", title_justify="left")
    table.columns[2].justify = table.columns[3].justify = "right"
    first: dict[str, Problem] = {}
    counts = Counter(problem.code for problem in report.problems)
    for problem in report.problems:
        first.setdefault(problem.code, problem)
    for code in sorted(counts, key=lambda name: (ORDER[CODES[name].severity], -counts[name], name)):
        severity, row = CODES[code].severity, first[code].row
        table.add_row(
            code, Text(severity, COLOURS[severity]), str(counts[code]), "" if row is None else str(row),
            printable(first[code].message),
        )  # fmt: skip
    return table


def _worst_table(report: Report, worst: int) -> Table:
    """Rows with most errors first, then most warnings."""
    by_row: dict[int | None, list[Problem]] = {}
    for problem in report.problems:
        by_row.setdefault(problem.row, []).append(problem)

    def badness(item: tuple[int | None, list[Problem]]) -> tuple[int, ...]:
        counts = Counter(problem.severity for problem in item[1])
        return tuple(-counts[severity] for severity in COLOURS)

    rows = sorted(by_row.items(), key=badness)
    table = Table("row", "problems", title="Worst rows, counted from 0", title_justify="left")
    for row, problems in rows[:worst]:
        problems.sort(key=lambda problem: ORDER[problem.severity])
        lines = [Text(_without_row(problem), COLOURS[problem.severity]) for problem in problems[:MOST_LINES]]
        if len(problems) > MOST_LINES:
            lines.append(Text(f"and {len(problems) - MOST_LINES} more"))
        table.add_row(report.metadata.whole if row is None else str(row), Text("\n").join(lines))
    if len(rows) > worst:
        table.caption = f"and {len(rows) - worst} more rows"
    return table


def _without_row(problem: Problem) -> str:
    return describe(problem).removeprefix(f"row {problem.row}").removeprefix(", ").removeprefix(": ")


def _render_totals(report: Report, console: Console) -> None:
    found = totals(report)
    if not found["videos"] and not found["images"]:
        return
    grid = Table.grid(padding=(0, 2))
    grid.add_row("videos", f"{found['videos']} ({found['hours'] * 60:.1f} minutes, {found['frames']} frames)")
    if found["images"]:
        grid.add_row("images", str(found["images"]))
    grid.add_row("sizes", _few(found["sizes"]))
    grid.add_row("frame rates", _few(found["frame_rates"]))
    if found["seconds"]:
        low, middle, high = found["seconds"]
        grid.add_row("seconds a clip", f"{low:.2f} to {high:.2f}, median {middle:.2f}")
    console.print(grid)
    console.print(_histogram("caption characters", _caption_lengths(report), plain=console.options.ascii_only))


def _caption_lengths(report: Report) -> list[int]:
    """Characters of every caption of the rows without errors."""
    good = (record for record in report.metadata.records if record.row not in report.bad_rows)
    return [len(text) for record in good for text in texts_of(record.fields)]


def _histogram(title: str, values: Sequence[int], *, plain: bool) -> Table:
    block, sliver = "#|" if plain else "█▏"
    table = Table.grid(padding=(0, 2))
    edges = [*CAPTION_STEPS, math.inf]
    counts = [sum(low <= value < high for value in values) for low, high in pairwise(edges)]
    for step, (low, count) in enumerate(zip(CAPTION_STEPS, counts, strict=True)):
        high = f"-{CAPTION_STEPS[step + 1] - 1}" if step + 1 < len(CAPTION_STEPS) else " and more"
        length = round(BAR * count / max(1, *counts))
        table.add_row(
            title if step == 0 else "", f"{low}{high}", block * length or (sliver if count else ""), str(count)
        )
    return table


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _few(counts: dict[str, int], most: int = 6) -> str:
    shown = ", ".join(f"{name} ({count})" for name, count in list(counts.items())[:most])
    return shown + (f", {len(counts) - most} more" if len(counts) > most else "")


def _min_median_max(values: Sequence[float]) -> list[float] | None:
    """[least, median, most]."""
    ordered = sorted(values)
    return [ordered[0], ordered[len(ordered) // 2], ordered[-1]] if ordered else None
