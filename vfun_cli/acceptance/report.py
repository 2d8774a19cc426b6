"""What is seen of an acceptance run: lines and a bar while it goes, a table, one JSON and the failures at its end."""

import shlex
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from vfun_cli import console
from vfun_cli.acceptance.pool import Pool
from vfun_cli.acceptance.rows import VFUN, Row
from vfun_cli.acceptance.verdicts import KINDS, Verdict

STYLES = dict(zip(KINDS, ("green", "bold red", "yellow", "yellow"), strict=True))


class _Now(ProgressColumn):
    """What runs, and the time that is left."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.pool = pool

    def render(self, task: Task) -> Text:
        minutes, seconds = divmod(max(0, int(self.pool.deadline - time.monotonic())), 60)
        return Text(f"{len(self.pool.running)} running  out of time in {minutes}:{seconds:02d}")


@contextmanager
def shown(rows: Sequence[Row], pool: Pool) -> Iterator[None]:
    """A line on stderr for each verdict; on a terminal a bar below them."""
    columns = (MofNCompleteColumn(), BarColumn(bar_width=None), _Now(pool), TimeElapsedColumn())
    bar = Progress(*columns, console=console.err, expand=True, disable=not console.err.is_terminal)
    task = bar.add_task("rows", total=len(rows))
    width = max(len(row.name) for row in rows)

    def tell(row: Row, verdict: Verdict) -> None:
        console.err.print(_line(row, verdict, pool, width), soft_wrap=True)
        bar.update(task, completed=len(pool.verdicts))

    pool.tell = tell
    with bar:
        yield


def _line(row: Row, verdict: Verdict, pool: Pool, width: int) -> Text:
    off = f"off {verdict.deviation:.1e} of {row.bound:g}" if verdict.deviation is not None else ""
    facts = "  ".join(filter(None, (f"{_seconds(row, pool):>3} s" if _seconds(row, pool) else "", off, verdict.why)))
    return Text.assemble((f"{verdict.kind:8}", STYLES[verdict.kind]), f" {row.name:{width}}  {facts}")


def _seconds(row: Row, pool: Pool) -> str:
    outcome = pool.outcomes.get(row.name)
    return "" if outcome is None else f"{outcome.seconds:.0f}"


def listed(rows: Sequence[Row]) -> Table:
    """The rows, before anything ran."""
    found = _table("row", "proves")
    for row in rows:
        found.add_row(row.name, row.proves)
    return found


def summary(rows: Sequence[Row], pool: Pool) -> Table:
    """Every row and what came of it, in the order in which they tell most."""
    found = _table("row", "", "s", "off", "bound")
    for row in rows:
        verdict = pool.verdicts[row.name]
        found.add_row(
            row.name,
            Text(verdict.kind, STYLES[verdict.kind]),
            _seconds(row, pool),
            "" if verdict.deviation is None else f"{verdict.deviation:.1e}",
            f"{row.bound:g}" if row.is_bounded else "",
        )
    return found


def reasons(rows: Sequence[Row], pool: Pool) -> list[str]:
    """Why rows are not right."""
    verdicts = [(row.name, pool.verdicts[row.name]) for row in rows]
    return [f"{name} is {verdict.kind}: {verdict.why}" for name, verdict in verdicts if verdict.kind != "right"]


def _table(*columns: str) -> Table:
    found = Table(box=None, pad_edge=False)
    for name in columns:
        found.add_column(name, overflow="fold")
    return found


def counts(pool: Pool) -> Mapping[str, int]:
    """How many rows are right, wrong, skipped, and did not run."""
    found = Counter(verdict.kind for verdict in pool.verdicts.values())
    return {kind: found[kind] for kind in KINDS}


def record(rows: Sequence[Row], pool: Pool) -> list[dict[str, Any]]:
    """What came of each row that has a verdict, as JSON."""
    return [_row(row, pool) for row in rows if row.name in pool.verdicts]


def _row(row: Row, pool: Pool) -> dict[str, Any]:
    verdict, outcome = pool.verdicts[row.name], pool.outcomes.get(row.name)
    found: dict[str, Any] = {
        "name": row.name,
        "proves": row.proves,
        "commands": [typed(command) for command in row.commands],
        "verdict": verdict.kind,
        "why": verdict.why or None,
    }
    if row.is_bounded:
        found |= {"reference": row.reference, "deviation": verdict.deviation, "bound": row.bound}
    if outcome is not None:
        found |= {
            "seconds": round(outcome.seconds, 1),
            "exit_codes": list(outcome.exit_codes),
            "losses": {str(step): loss for step, loss in outcome.losses.items()},
            "last_step": dict(outcome.last_step),
        }
        if row.says_how_far_off:
            found["said"] = outcome.said.splitlines()
    return found


def typed(command: Sequence[str]) -> str:
    """As people type it."""
    start = ["vfun"] if command[0] == VFUN else ["python", "-m", command[0]]
    return shlex.join([*start, *command[1:]])


def failures(rows: Sequence[Row], pool: Pool) -> str:
    """Of each wrong row its commands, and all that they and their ranks said."""
    parts = []
    for row in rows:
        verdict = pool.verdicts.get(row.name)
        if verdict is not None and verdict.kind == "wrong":
            commands = "".join(f"$ {typed(command)}\n" for command in row.commands)
            parts.append(f"==== {row.name}: {verdict.why}\n{commands}{pool.said(row)}")
    return "\n".join(parts)
