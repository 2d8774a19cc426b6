"""One launch of the training processes: started, watched, told to stop, and why they ended."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from vfun_cli import console
from vfun_cli.config import cluster
from vfun_cli.devices import oom_kills
from vfun_cli.errors import (
    RunError,
    StoppedAtOnce,
)
from vfun_cli.launch import progress
from vfun_cli.launch.machines import Machine, error_of, failure_of
from vfun_cli.launch.preemption import leave_terminal
from vfun_cli.run.memory_errors import does_not_fit, memory_line
from vfun_cli.run.messages import (
    EXIT_CODES,
    PREEMPTION_SIGNALS,
    Failure,
    Outcome,
    StopRequest,
    clear_messages,
    preemption_signals,
)
from vfun_cli.run.ownership import MEMORY
from vfun_cli.run.rundir import RunDir

POLL_SECONDS = 0.1

KILLED_AFTER = 25
"""Seconds that torchrun surely leaves to the other ranks after one has failed: it kills them after 30."""

_MARK = "_VFUN_JOB"


class Crashed(RunError):
    """A training process died of something that may not happen again: starting over from a checkpoint makes sense."""


class StopRequests:
    """Ctrl-C and preemption become a request that the ranks read; the second one kills every process of the job, and so
    does the first while they are starting: there is nothing to save, and they may wait where they hear nothing.

    A hang-up is never the second one: the terminal and the shell both send it. Nor is any preemption signal where a
    launcher has started a process for each rank: the scheduler sends it to all, and the launcher passes it on.
    """

    def __init__(self, run_dir: RunDir, machine_rank: int) -> None:
        self.run_dir = run_dir
        self.machine_rank = machine_rank
        self.asked: list[int] = []
        self.told = False
        started_by_launcher = cluster.read(os.environ).local_rank is not None
        self.repeated = PREEMPTION_SIGNALS if started_by_launcher else (signal.SIGHUP,)
        """Signals that are never the second request."""
        self.job = f"{os.getpid()}-{time.time_ns()}"
        """Marks the environment of all processes of this run."""

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """The signal handler. It prints nothing: it may have come in the middle of something that is printed."""
        leave_terminal(number)
        if self.asked and number in self.repeated:
            return
        self.asked.append(number)
        if self.at_once:
            kill(self.job)
        else:
            self.write()

    @property
    def at_once(self) -> bool:
        """Whether there was a second one."""
        return len(self.asked) > 1

    @property
    def reason(self) -> str:
        """What the first request was."""
        return "interrupted" if self.asked[0] == signal.SIGINT else "preempted"

    def write(self) -> None:
        """Leave the request for the ranks; on a full disk an empty file, which asks to stop too."""
        try:
            StopRequest(reason=self.reason).write(self.run_dir, self.machine_rank)
        except OSError:
            with suppress(OSError):  # the second request needs no file
                self.run_dir.stop_request(self.machine_rank).touch()

    def tell(self) -> None:
        """Say once what the first request does."""
        if self.asked and not self.told:
            self.told = True
            console.err.print(
                f"\n{self.reason}: saving at the next step boundary; once more to stop at once without saving.",
                soft_wrap=True,
            )


@contextmanager
def stop_requests(run_dir: RunDir, machine_rank: int = 0) -> Iterator[StopRequests]:
    """Take signals until the end of the block; no process of the job on this machine outlives it."""
    stop = StopRequests(run_dir, machine_rank)
    handled = (signal.SIGINT, *preemption_signals())
    before = {number: signal.signal(number, stop.on_signal) for number in handled}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        kill(stop.job)


def launch(
    argv: list[str],
    machine: Machine,
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
        VfunError: the run failed; the message is the first failing rank's own, of whichever machine.
    """
    run_dir = machine.run
    run_dir.logs.mkdir(parents=True, exist_ok=True)
    clear_messages(run_dir, machine.number, ranks_elsewhere=machine.ranks_elsewhere)
    if stop.asked:
        stop.write()
    written = {log: log.stat().st_size for log in _logs(machine) if log.exists()}
    killed_before = oom_kills()
    with run_dir.launcher_log(machine.number).open("ab") as output:
        process = subprocess.Popen(
            argv,
            stdout=output,
            stderr=output,
            stdin=stdin,
            start_new_session=True,
            env=os.environ | {_MARK: stop.job},
        )
        machine.started()
        too_early = _watch(process, machine, first_step, stop)
    kill(stop.job)
    outcome = Outcome.read(run_dir, machine.number)
    if outcome is not None:
        return outcome
    if not stop.at_once:
        memory_ran_out = oom_kills() > killed_before
        own = (
            _nothing_to_save(stop.reason, way_on())
            if too_early
            else _failure(machine, written, process.returncode, way_on, memory_ran_out=memory_ran_out)
        )
        failure = machine.agree(own, given_up=lambda: stop.at_once)
    if stop.at_once:
        raise StoppedAtOnce("stopped at once; what was done since the last checkpoint is lost.", hint=way_on())
    if failure.kind == "error" or stop.asked:  # whoever asked to stop wants no restart
        raise error_of(failure)
    raise Crashed(failure.message, hint=failure.hint)


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


def _watch(process: "subprocess.Popen[bytes]", machine: Machine, first_step: int, stop: StopRequests) -> bool:
    """Show progress until the launcher ends, and the ranks too if it was ended from outside.

    Returns:
        Whether all were ended since a request to stop came while they were starting.
    """
    listening, too_early = machine.run.listening(machine.number), False
    with progress.shown(machine.run.metrics, first_step) as show_new:
        while process.poll() is None or (process.returncode < 0 and members(stop.job)):
            show_new()
            too_early |= bool(stop.asked) and not listening.exists()
            if not too_early:
                with suppress(OSError):  # a terminal that was closed must not end the run
                    stop.tell()
                    machine.tell()
            if stop.at_once or too_early or machine.must_end():
                process.kill()  # before the ranks: its log then holds only what they died of by themselves
                kill(stop.job)  # again: it may have been on its way into exec, without the mark
            time.sleep(POLL_SECONDS)
        show_new()
    return too_early


def _nothing_to_save(reason: str, hint: str) -> Failure:
    """What a request to stop ends with where it came while the ranks were starting."""
    message = f"{reason} before the work had begun: there was nothing to save."
    return Failure(kind="error", time=time.time(), message=message, hint=hint, exit_code=EXIT_CODES[reason])


def _failure(
    machine: Machine, written: Mapping[Path, int], code: int, way_on: Callable[[], str], *, memory_ran_out: bool
) -> Failure | None:
    """What the first failing rank of this machine met; without a message, what the logs tell.

    None where all ranks were ended here since another machine had failed.

    Args:
        written: how long each log was before the launch.
        memory_ran_out: the kernel has ended a process for that since the launch.
    """
    log = machine.run.launcher_log(machine.number)
    if not log.exists():
        return Failure(
            kind="error",
            time=time.time(),
            message=f"the run directory {machine.run.root} vanished while it was trained in; "
            "nothing can be saved there.",
            hint="If it was moved, resume it at its new place: the checkpoints that it had are whole.",
            exit_code=RunError.exit_code,
        )
    hint = f"The whole log is {log}. {way_on()}"
    errors = machine.errors()
    texts = {each: each.read_bytes()[written.get(each, 0) :].decode(errors="replace") for each in _logs(machine)}
    text = texts[log]
    killed = _killed(text, machine.ranks.start)
    # A killed rank leaves no message, and its peers fail because they lost it. But the launcher kills too: ranks that
    # still hang a while after one of them has failed.
    if errors and (killed is None or time.time() - errors[0].time > KILLED_AFTER):
        first = errors[0]
        culprit = first.rank if first.cause is None else first.cause
        after = sum(error.cause is None for error in errors[1:])
        return Failure(
            kind="crash" if first.crash else "error",
            time=first.time,
            message=f"{machine.rank(culprit)}: {first.message}"
            + (f" ({after} more ranks failed after it.)" if after else ""),
            hint=first.hint or hint,
            exit_code=first.exit_code,
        )
    if machine.ended_ranks and killed is None:
        return None
    if killed or code < 0:
        rank, number = killed or (None, -code)
        ended = f"{machine.launcher if rank is None else machine.rank(rank)} was ended by {_signal_name(number)}"
        own = texts.get(machine.run.rank_log(rank), "") if rank else text
        cause = _want_of_memory(number, own, memory_ran_out=memory_ran_out)
        if cause is not None:
            return failure_of(does_not_fit(cause, f"{ended}: "))
        message = f"{ended}.{' The host probably ran out of memory.' if number == signal.SIGKILL else ''}"
    elif (line := memory_line("\n".join(texts.values()))) is not None:
        return failure_of(does_not_fit(line))
    else:
        cause = _first_exception(text) or " / ".join([line for line in text.splitlines() if line.strip()][-3:])
        message = f"{machine.launcher} ended with exit code {code}: {cause.rstrip('.') or 'it said nothing'}."
    return Failure(
        kind="killed" if killed else "crash",
        time=time.time(),
        message=message,
        hint=hint,
        exit_code=RunError.exit_code,
    )


def _logs(machine: Machine) -> list[Path]:
    """Of the launcher and rank 0, and of each other rank of this machine that has written one."""
    elsewhere = {machine.run.rank_log(rank) for rank in machine.ranks_elsewhere}
    own = [log for log in machine.run.rank_logs() if log not in elsewhere]
    return [machine.run.launcher_log(machine.number), *own]


def _killed(text: str, first_rank: int) -> tuple[int, int] | None:
    """The first rank that a signal ended, and the signal, as torchrun reports it, or accelerate of a single process.

    Args:
        first_rank: of this machine.
    """
    others, _, cause = text.partition("Root Cause")
    for part in (cause, others):
        if found := re.search(r"rank\s*:\s*(\d+) \(local_rank: \d+\)\s*exitcode\s*:\s*-(\d+)", part):
            return int(found[1]), int(found[2])
    # What torchrun says at once, of the first; the rest it says when it has ended the others.
    if found := re.search(r"failed \(exitcode: -(\d+)\) local_rank: (\d+)", text):
        return first_rank + int(found[2]), int(found[1])
    found = re.search(r"died with (?:<Signals\.\w+: |unknown signal )(\d+)", text)
    return (0, int(found[1])) if found else None


def _want_of_memory(number: int, text: str, *, memory_ran_out: bool) -> str | None:
    """What tells that a process got a signal for want of memory; None where nothing does.

    Args:
        text: what the process wrote.
    """
    if number == signal.SIGKILL:
        return "the kernel ended it" if memory_ran_out else None
    if number == signal.SIGBUS:  # a page of a mapped file that cannot be had
        return f"{MEMORY} is full, or a file was cut while it was read"
    return memory_line(text) if number == signal.SIGABRT else None  # C++ ends so what nobody catches


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _first_exception(text: str) -> str | None:
    """What the first traceback ends with: the cause; those after it only tell of the first."""
    _, traceback, after = text.partition("Traceback (most recent call last):\n")
    return next((line for line in after.splitlines() if line and not line[0].isspace()), None) if traceback else None
