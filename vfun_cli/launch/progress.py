"""How far the training is: a bar on a terminal, a line every few seconds where none is."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from vfun_cli import console
from vfun_cli.run import metrics_file

LINE_EVERY = 10.0
"""Seconds between progress lines when stderr is not a terminal."""


@contextmanager
def shown(metrics: Path, first_step: int) -> Iterator[Callable[[], None]]:
    """To be called whenever there may be new lines in the metrics file: it shows them."""
    steps = NewSteps(metrics, first_step, before=stamp(metrics))
    with Bar(first_step) if console.err.is_terminal else Lines() as display:

        def show_new() -> None:
            # It only reports: a line that is not what it should be, a file that is gone or a terminal that was closed
            # must not end the job.
            with suppress(OSError, KeyError, TypeError, ValueError):
                for record in steps.read():
                    display.show(record)

        yield show_new


class NewSteps:
    """New steps in a growing JSON-lines file; those up to ``first_step`` belong to an earlier launch.

    Args:
        before: the stamp of the file as an earlier launch left it. Nothing in it is new until it changes: a run that
            continues from an older checkpoint begins by dropping the steps after it.
    """

    def __init__(self, path: Path, first_step: int, *, before: "Stamp | None" = None) -> None:
        self.path, self.seen, self.offset = path, first_step, 0
        self.before = before
        self.held_out: dict[str, float | None] = {}
        """The newest held-out loss, if there is one; every step shows it."""

    def read(self) -> list[dict[str, Any]]:
        """Those that came since the last call."""
        if stamp(self.path) == self.before:
            return []
        self.before = None
        with self.path.open("rb") as file:
            file.seek(self.offset)
            whole, _, _ = file.read().rpartition(b"\n")
        self.offset += len(whole) + 1 if whole else 0
        records = []
        for line in whole.split(b"\n"):
            record = metrics_file.parse(line)
            if record is None:
                continue
            if record.get("event") == "held-out" and record["weights"] == "trained":
                self.held_out = {"held_out": record["loss"]}
            if "event" not in record and record["step"] > self.seen:
                self.seen = record["step"]
                records.append(record | self.held_out)
        return records


Stamp = tuple[int, int, int]


def stamp(path: Path) -> Stamp | None:
    """What changes with a file; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


class _TwoLines(Progress):
    """A bar, and under it the facts of the last step: together they are too long for 80 columns. The held-out loss of
    a run that has one comes below.
    """

    facts = "loading the model"

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar's line and the facts."""
        yield self.make_tasks_table(self.tasks)
        yield Text(self.facts, style="dim", overflow="ellipsis", no_wrap=True)


class Bar:
    """A Rich progress bar."""

    def __init__(self, first_step: int) -> None:
        self.progress = _TwoLines(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[pace]}"),
            TimeElapsedColumn(),
            TextColumn("left {task.fields[left]}"),
            console=console.err,
            expand=True,
        )
        self.task: TaskID = self.progress.add_task("train", total=None, completed=first_step, pace="", left="?")
        self.started, self.first_step = time.monotonic(), first_step

    def __enter__(self) -> "Bar":
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            self.progress.stop()

    def show(self, record: dict[str, Any]) -> None:
        """The last step, as ``metrics.jsonl`` has it."""
        self.progress.facts = "\n".join(filter(None, (_facts(record), _held_out(record))))
        self.progress.update(
            self.task,
            completed=record["step"],
            total=record["total_steps"],
            pace=_pace(record),
            left=_left(record),
            refresh=True,
        )


class Lines:
    """A line every few seconds, for logs."""

    def __init__(self) -> None:
        self.last = -LINE_EVERY

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def show(self, record: dict[str, Any]) -> None:
        """The last step, as ``metrics.jsonl`` has it."""
        if time.monotonic() - self.last < LINE_EVERY and record["step"] != record["total_steps"]:
            return
        self.last = time.monotonic()
        said = [
            f"step {record['step']}/{record['total_steps']}",
            _pace(record),
            _facts(record),
            _held_out(record),
            f"left {_left(record)}",
        ]
        console.err.print("  ".join(filter(None, said)), soft_wrap=True)


def _facts(record: dict[str, Any]) -> str:
    if "loss" not in record:
        return f"{record['step']} clips encoded"
    facts = [
        f"loss {_loss(record['loss'])}",
        f"lr {record['learning_rate']:.1e}",
        f"{record['tokens_per_second']:.0f} tok/s",
    ]
    total = _seconds(record)
    facts.append(f"wait {100 * record['data_wait'] / total:.0f}%" if total else "wait 0%")
    if record.get("mfu") is not None:
        facts.append(f"mfu {100 * record['mfu']:.1f}%")
    if record["memory_bytes"]:
        facts.append(f"mem {record['memory_bytes'] / 2**30:.1f} GiB")
    return "  ".join(facts)


def _held_out(record: dict[str, Any]) -> str:
    """The newest held-out loss, on a line of its own where a line has an end."""
    return f"held-out loss {_loss(record['held_out'])}" if "held_out" in record else ""


def _loss(value: float | None) -> str:
    return "nan" if value is None else f"{value:.4f}"


def _seconds(record: dict[str, Any]) -> float:
    """Of a step, with the wait for its clips."""
    return float(record["seconds"] + record["data_wait"])


def _pace(record: dict[str, Any]) -> str:
    """Seconds a step; a cache is filled clip by clip."""
    if "loss" not in record:
        return ""
    seconds = _seconds(record)
    return f"{seconds:.{1 if seconds >= 10 else 2}f} s/step"


def _left(record: dict[str, Any]) -> str:
    """Time to the end from the plan: the run's FLOPs still to come over the FLOP rate so far."""
    minutes, seconds = divmod(int(record["seconds_left"]), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
