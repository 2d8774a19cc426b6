"""One launch of the training processes: started, watched, told to stop, and why they ended."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

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
from vfun_cli.launch import progress
from vfun_cli.run.messages import Outcome, RankError, StopRequest, clear_messages
from vfun_cli.run.rundir import RunDir

POLL_SECONDS = 0.1

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


def launch(
    argv: list[str],
    run_dir: RunDir,
    machine_rank: int,
    first_step: int,
    stop: StopRequests,
    *,
    stdin: int,
    way_on: Callable[[], str],
) -> Outcome:
    """Run the launch command to its end.

    The launcher gets its own process group, so that Ctrl-C reaches this process alone. If the launcher is ended from
    outside, the ranks save and stop by themselves, and are waited for.

    Args:
        stdin: the claim of the run directory, which the launcher and the ranks keep if this process is killed.
        way_on: the hint after a failure that says nothing better, asked for when it has happened.

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
            stdin=stdin,
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
        raise StoppedAtOnce("stopped at once; what was done since the last checkpoint is lost.", hint=way_on())
    raise _failure(run_dir, log, start_of_run, process.returncode, way_on)


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
    """Show progress until the launcher ends, and the ranks too if it was ended from outside."""
    with progress.shown(run_dir.metrics, first_step) as show_new:
        while process.poll() is None or (process.returncode < 0 and members(job)):
            show_new()
            time.sleep(POLL_SECONDS)
        show_new()


def _failure(run_dir: RunDir, log: Path, start: int, code: int, way_on: Callable[[], str]) -> VfunError:
    """The first failing rank's message; without one, what the launcher's log tells."""
    if not log.exists():
        return RunError(
            f"the run directory {run_dir.root} vanished while it was trained in; nothing can be saved there.",
            hint="If it was moved, resume it at its new place: the checkpoints that it had are whole.",
        )
    hint = f"The whole log is {log}. {way_on()}"
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
        return kind(f"rank {first.rank}: {first.message}{others}", hint=first.hint or hint)
    if killed:
        rank, number = int(killed[1]), int(killed[2])
        name = signal.Signals(number).name
        why = " The host probably ran out of memory." if number == signal.SIGKILL else ""
        return Crashed(f"rank {rank} was ended by {name}.{why}", hint=hint)
    last = [line for line in text.splitlines() if line.strip()][-3:]
    return Crashed(f"the launcher ended with exit code {code}: " + " / ".join(last), hint=hint)
