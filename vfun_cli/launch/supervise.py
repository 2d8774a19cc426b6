"""Starts the training processes, shows their progress, forwards a wish to stop, and says why they ended."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from vfun_cli import console
from vfun_cli.errors import (
    CheckpointError,
    ConfigError,
    EnvironmentFault,
    FitError,
    MetadataError,
    RunError,
    StoppedAtOnce,
    VfunError,
)
from vfun_cli.run.messages import Outcome, RankError, StopRequest, clear_messages
from vfun_cli.run.rundir import RunDir

POLL_SECONDS = 0.1
LINE_EVERY = 10.0
"""Seconds between progress lines when stderr is not a terminal."""

# Waiting OpenMP threads sleep instead of spinning: on a shared processor they would take the time of the others.
# torchrun answers SIGTERM by a second one to the ranks and SIGKILL after 30 seconds, which no large checkpoint keeps
# to. Without that the launcher just ends, and the ranks notice and save in peace.
_ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "PET_SIGNALS_TO_HANDLE": "SIGINT,SIGHUP,SIGQUIT",
}

_MARK = "_VFUN_JOB"

_ERRORS = {
    error.exit_code: error
    for error in (RunError, ConfigError, MetadataError, FitError, CheckpointError, EnvironmentFault)
}


class Crashed(RunError):
    """A training process died of something that may not happen again: starting over from a checkpoint makes sense."""


class StopRequests:
    """Ctrl-C and preemption become a request that the ranks read; the second one kills every process of the job."""

    def __init__(self, run_dir: RunDir) -> None:
        self.run_dir = run_dir
        self.asked: list[int] = []
        self.job = f"{os.getpid()}-{time.time_ns()}"
        """Marks the environment of all processes of this run."""

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        self.asked.append(number)
        if len(self.asked) > 1:
            kill(self.job)
            return
        if self.run_dir.logs.is_dir():
            self.write()
        console.err.print(
            f"\n{self.reason}: saving at the next step boundary; once more to stop at once without saving."
        )

    @property
    def reason(self) -> str:
        """What the first request was."""
        return "interrupted" if self.asked[0] == signal.SIGINT else "preempted"

    def write(self) -> None:
        """Leave the request for the ranks."""
        StopRequest(reason=self.reason).write(self.run_dir)


@contextmanager
def stop_requests(run_dir: RunDir) -> Iterator[StopRequests]:
    """Take signals until the end of the block; no process of the job outlives it."""
    stop = StopRequests(run_dir)
    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, stop.on_signal) for number in handled}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        kill(stop.job)


def run(argv: list[str], run_dir: RunDir, machine_rank: int, first_step: int, stop: StopRequests) -> Outcome:
    """Run the launch command to its end.

    The launcher gets its own process group, so that Ctrl-C reaches this process alone. If the launcher is ended from
    outside, the ranks save and stop by themselves, and are waited for.

    Raises:
        VfunError: the run failed; the message is the first failing rank's own.
    """
    run_dir.logs.mkdir(parents=True, exist_ok=True)
    clear_messages(run_dir)
    if stop.asked:
        stop.write()
    log = run_dir.launcher_log(machine_rank)
    with log.open("ab") as output:
        start_of_run = output.tell()
        process = subprocess.Popen(
            argv,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ | _ENVIRONMENT | {_MARK: stop.job},
        )
        _watch(process, run_dir, first_step, stop.job)
    kill(stop.job)
    outcome = Outcome.read(run_dir)
    if outcome is not None:
        return outcome
    if process.returncode == 0:  # on a machine that does not see the directory of rank 0
        return Outcome(ending="completed", step=0)
    if len(stop.asked) > 1:
        raise StoppedAtOnce(
            "stopped at once; the steps since the last checkpoint are lost.", hint=f"vfun resume {run_dir.root}"
        )
    raise _failure(run_dir, log, start_of_run, process.returncode)


def members(job: str) -> list[int]:
    """The live processes of a job. Ranks have sessions of their own and may have lost their launcher, so neither
    process group nor ancestry finds them; the mark in their environment does.
    """
    mark = f"{_MARK}={job}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            environment = (folder / "environ").read_bytes()
        except OSError:  # gone, or another user's
            continue
        if mark in environment.split(b"\0"):
            found.append(int(folder.name))
    return found


def kill(job: str) -> None:
    """End every process of a job at once."""
    for process in members(job):
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _watch(process: "subprocess.Popen[bytes]", run_dir: RunDir, first_step: int, job: str) -> None:
    """Follow metrics.jsonl until the launcher ends, and the ranks too if it was ended from outside."""
    follow = _Follower(run_dir.metrics, first_step)
    shown = _Bar(first_step) if console.err.is_terminal else _Lines()
    with shown:
        while process.poll() is None or (process.returncode < 0 and members(job)):
            for record in follow.new():
                shown.show(record)
            time.sleep(POLL_SECONDS)
        for record in follow.new():
            shown.show(record)


class _Follower:
    """New complete lines of a growing JSON-lines file; steps up to ``first_step`` belong to an earlier run."""

    def __init__(self, path: Path, first_step: int) -> None:
        self.path, self.seen, self.offset = path, first_step, 0

    def new(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        if self.path.stat().st_size < self.offset:  # a resumed run first drops the steps after its checkpoint
            self.offset = 0
        with self.path.open("rb") as file:
            file.seek(self.offset)
            whole, _, _ = file.read().rpartition(b"\n")
        self.offset += len(whole) + 1 if whole else 0
        records = []
        for line in whole.splitlines():
            record = json.loads(line)
            if "event" not in record and record["step"] > self.seen:
                self.seen = record["step"]
                records.append(record)
        return records


class _TwoLines(Progress):
    """A bar, and under it the facts of the last step: together they are too long for 80 columns."""

    facts = "loading the model"

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar's line and the facts."""
        yield self.make_tasks_table(self.tasks)
        yield Text(self.facts, style="dim", overflow="ellipsis", no_wrap=True)


class _Bar:
    """A Rich progress bar."""

    def __init__(self, first_step: int) -> None:
        self.progress = _TwoLines(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TimeElapsedColumn(),
            TextColumn("left {task.fields[left]}"),
            console=console.err,
            expand=True,
        )
        self.task: TaskID = self.progress.add_task("train", total=None, completed=first_step, left="?")
        self.started, self.first_step = time.monotonic(), first_step

    def __enter__(self) -> "_Bar":
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def show(self, record: dict[str, Any]) -> None:
        self.progress.facts = _facts(record)
        self.progress.update(
            self.task, completed=record["step"], total=record["total_steps"], left=_left(record), refresh=True
        )


class _Lines:
    """A line every few seconds, for logs."""

    def __init__(self) -> None:
        self.last = -LINE_EVERY

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def show(self, record: dict[str, Any]) -> None:
        if time.monotonic() - self.last < LINE_EVERY and record["step"] != record["total_steps"]:
            return
        self.last = time.monotonic()
        console.err.print(f"step {record['step']}/{record['total_steps']}  {_facts(record)}  left {_left(record)}")


def _facts(record: dict[str, Any]) -> str:
    if "loss" not in record:
        return f"{record['step']} clips encoded"
    facts = [
        f"loss {record['loss']:.4f}",
        f"lr {record['learning_rate']:.1e}",
        f"{record['tokens_per_second']:.0f} tok/s",
    ]
    total = record["seconds"] + record["data_wait"]
    facts.append(f"wait {100 * record['data_wait'] / total:.0f}%" if total else "wait 0%")
    if record.get("mfu") is not None:
        facts.append(f"mfu {100 * record['mfu']:.1f}%")
    if record["memory_bytes"]:
        facts.append(f"mem {record['memory_bytes'] / 2**30:.1f} GiB")
    return "  ".join(facts)


def _left(record: dict[str, Any]) -> str:
    """Time to the end from the plan: the run's FLOPs still to come over the FLOP rate so far."""
    minutes, seconds = divmod(int(record["seconds_left"]), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _failure(run_dir: RunDir, log: Path, start: int, code: int) -> VfunError:
    """The first failing rank's message; without one, what the launcher's log tells."""
    if not log.exists():
        return RunError(
            f"the run directory {run_dir.root} vanished while it was trained in; nothing can be saved there.",
            hint=f"If it was moved, move it back, then: vfun resume {run_dir.root}",
        )
    errors = RankError.read_all(run_dir)
    text = log.read_bytes()[start:].decode(errors="replace")
    killed = re.search(r"rank\s*:\s*(\d+).*?exitcode\s*:\s*-(\d+)", text, re.DOTALL)
    crashed = all(error.crash for error in errors)
    if errors and not (killed and crashed):  # a killed rank leaves no message; its peers only lost the connection
        first = errors[0]
        others = f" ({len(errors) - 1} more ranks failed after it.)" if len(errors) > 1 else ""
        kind = _ERRORS.get(first.exit_code, RunError)
        if first.crash and kind is RunError:
            kind = Crashed
        return kind(f"rank {first.rank}: {first.message}{others}", hint=first.hint or f"The whole log: {log}")
    hint = f"The whole log: {log}. Continue from the last checkpoint: vfun resume {run_dir.root}"
    if killed:
        rank, number = int(killed[1]), int(killed[2])
        name = signal.Signals(number).name
        why = " The host probably ran out of memory." if number == signal.SIGKILL else ""
        return Crashed(f"rank {rank} was ended by {name}.{why}", hint=hint)
    last = [line for line in text.splitlines() if line.strip()][-3:]
    return Crashed(f"the launcher ended with exit code {code}: " + " / ".join(last), hint=hint)
