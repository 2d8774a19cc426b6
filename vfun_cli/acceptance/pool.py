"""Runs the rows, several at a time, until all have run or the time is over."""

import os
import signal
import site
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vfun_cli import children
from vfun_cli.acceptance.rows import RUNS, Row
from vfun_cli.acceptance.verdicts import MEASURED, Outcome, Verdict, judge
from vfun_cli.devices import cpu_cores
from vfun_cli.run import metrics_file
from vfun_cli.run.rundir import RunDir

POLL_SECONDS = 0.05
LONGEST = 900
"""Seconds that a row may take; the one with a compiler took 258 on two busy cores."""
LEAST = 10
"""With fewer seconds left nothing is begun: hardly a row takes less."""
END = 5
"""Seconds for a command to end after each request to stop; so long before the end of the time they are asked."""


class Running:
    """A row on its way: its commands, one after another."""

    def __init__(self, row: Row, place: Path, threads: int) -> None:
        self.row, self.place, self.threads = row, place, threads
        self.log = log_of(row, place)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.began = time.monotonic()
        self.exit_codes: list[int] = []
        self.said_before = 0
        self.process = self._start()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.began

    def _start(self) -> "subprocess.Popen[bytes]":
        module, *arguments = self.row.commands[len(self.exit_codes)]
        self.said_before = self.log.stat().st_size if self.log.exists() else 0
        argv = children.command(module, *arguments, variables={**self._variables(), **self.row.variables})
        with self.log.open("ab") as log:
            return subprocess.Popen(
                argv, cwd=self.place, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _variables(self) -> dict[str, str]:
        """Libraries and vfun keep what they remember here and not in the user's home; rows share the cores."""
        caches = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME", "CUDA_CACHE_PATH")
        folders = {name: str(self.place / "caches" / name.lower()) for name in caches}
        return {
            "HOME": str(self.place),
            "PYTHONUSERBASE": site.getuserbase(),
            children.THREADS: str(self.threads),
            **folders,
        }

    def advance(self) -> bool:
        """Look whether a command has ended, and start the next one; whether all is done."""
        code = self.process.poll()
        if code is None:
            return False
        self.exit_codes.append(code)
        if code or len(self.exit_codes) == len(self.row.commands):
            return True
        self.process = self._start()
        return False

    def outcome(self, *, too_long: bool = False) -> Outcome:
        """What it did until now."""
        said = self.log.read_bytes()[self.said_before :].decode(errors="replace")
        records = _records(run_of(self.row, self.place)) if self.row.losses else []
        return Outcome(
            exit_codes=tuple(self.exit_codes),
            said=said,
            losses={record["step"]: record["loss"] for record in records},
            last_step={name: records[-1].get(name) for name in MEASURED} if records else {},
            weights=tuple(run_of(self.row, self.place).root / name for name in self.row.weights),
            seconds=self.seconds,
            too_long=too_long,
        )


def end(rows: Sequence[Running]) -> None:
    """Stop what still runs of these: vfun ends its ranks at once when it is asked twice."""
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGKILL):
        left = [running.process for running in rows if running.process.poll() is None]
        for process in left:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        asked = time.monotonic()
        for process in left:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, asked + END - time.monotonic()))


@dataclass(kw_only=True)
class Pool:
    """The rows that run, and what came of those that ran."""

    place: Path
    """The working directory of all commands, and where everything is written."""
    lacks: Mapping[str, str]
    """What rows may need and is not here, with the reason."""
    deadline: float
    """When the last row ends, on the monotonic clock."""
    tell: Callable[[Row, Verdict], None] = lambda row, verdict: None
    """Hears of each verdict."""
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    running: list[Running] = field(default_factory=list)

    def run(self, rows: Sequence[Row], jobs: int) -> None:
        """Give each row a verdict.

        Args:
            jobs: rows at a time.
        """
        waiting, threads = list(rows), max(1, cpu_cores() // jobs)
        try:
            while waiting or self.running:
                for running in list(self.running):
                    self._look_at(running)
                if time.monotonic() > self.deadline - END:
                    self._end_all()
                while (row := self._ready(waiting, jobs)) is not None:
                    waiting.remove(row)
                    hindrance = self._hindrance(row)
                    if hindrance is None:
                        self.running.append(Running(row, self.place, threads))
                    else:
                        self._settle(row, hindrance)
                time.sleep(POLL_SECONDS)
        finally:
            end(self.running)

    def _ready(self, waiting: Sequence[Row], jobs: int) -> Row | None:
        """The first row that may begin: what it comes after, or is compared with, has a verdict."""
        if len(self.running) >= jobs or any(running.row.alone for running in self.running):
            return None
        for row in waiting:
            if row.alone and self.running:
                return None
            if all(other is None or other in self.verdicts for other in (row.after, row.reference)):
                return row
        return None

    def _hindrance(self, row: Row) -> Verdict | None:
        """Why a row does not run."""
        if missing := [self.lacks[need] for need in row.needs if need in self.lacks]:
            return Verdict(kind="skipped", why="; ".join(missing))
        if time.monotonic() > self.deadline - LEAST:
            return Verdict(kind="not run", why="out of time")
        if row.after is not None and self.verdicts[row.after].kind != "right":
            return Verdict(kind="skipped", why=f"{row.after} is {self.verdicts[row.after].kind}")
        return None

    def said(self, row: Row) -> str:
        """All that the row's commands and the launcher of its run said."""
        files = (log_of(row, self.place), run_of(row, self.place).launcher_log())
        return "".join(file.read_text(encoding="utf-8", errors="replace") for file in files if file.exists())

    def _look_at(self, running: Running) -> None:
        """Take it off the list if it is done, or has taken too long."""
        row, done = running.row, running.advance()
        if not done and running.seconds < LONGEST:
            return
        end([running])
        self.running.remove(running)
        self.outcomes[row.name] = outcome = running.outcome(too_long=not done)
        self._settle(row, judge(row, outcome, self.outcomes.get(row.reference or "")))

    def _end_all(self) -> None:
        """No time is left for those that run."""
        end(self.running)
        for running in self.running:
            self._settle(running.row, Verdict(kind="not run", why=f"out of time after {running.seconds:.0f} s"))
        self.running.clear()

    def _settle(self, row: Row, verdict: Verdict) -> None:
        self.verdicts[row.name] = verdict
        self.tell(row, verdict)


def log_of(row: Row, place: Path) -> Path:
    """What the commands of a row said."""
    return place / "logs" / f"{row.name}.log"


def run_of(row: Row, place: Path) -> RunDir:
    """The run of a row."""
    return RunDir(place / RUNS / row.name)


def _records(run: RunDir) -> list[dict[str, Any]]:
    """Of its steps, as far as it came."""
    if not run.metrics.exists():
        return []
    records = [metrics_file.parse(line) for line in run.metrics.read_bytes().splitlines()]
    return [record for record in records if record is not None and "event" not in record]
