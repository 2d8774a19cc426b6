"""What the processes of a job tell each other: small files in the run directory, each written whole and read as a type.

Readers take what is missing or damaged as not said.
"""

import json
import os
import signal
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from vfun_cli.disks.abilities import fsync
from vfun_cli.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED
from vfun_cli.run.rundir import RunDir, write_atomically

EXIT_CODES = {"completed": 0, "interrupted": EXIT_INTERRUPTED, "preempted": EXIT_PREEMPTED}
"""How work ends without an error, by severity, and what its command exits with then."""

ENDINGS = tuple(EXIT_CODES)

ERROR_SPACE = 1 << 16
"""Characters kept free for the error of each rank."""

PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""What a scheduler, a system that shuts down or a terminal that is closed sends: save and stop."""

Message = TypeVar("Message")


def preemption_signals() -> tuple[signal.Signals, ...]:
    """Those that this process takes: nohup has it ignore the end of its terminal."""
    ignores_hangup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(number for number in PREEMPTION_SIGNALS if number != signal.SIGHUP or not ignores_hangup)


@dataclass(frozen=True, kw_only=True)
class StopRequest:
    """From the command to the ranks of its machine, and by them to all: save and stop at the next step boundary."""

    reason: str
    """``interrupted`` or ``preempted``."""

    def __post_init__(self) -> None:
        if self.reason not in ENDINGS[1:]:
            raise ValueError(f"{self.reason!r} is none of {ENDINGS[1:]}")

    def write(self, run: RunDir, machine_rank: int = 0) -> None:
        """Leave it for the ranks."""
        _write(run.stop_request(machine_rank), self)

    @classmethod
    def read(cls, run: RunDir, machine_rank: int = 0) -> "StopRequest | None":
        """The request, if there is one; a file that says nothing else still asks to stop."""
        path = run.stop_request(machine_rank)
        if not path.exists():
            return None
        return _read(path, cls) or cls(reason="preempted")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """From the ranks of a machine to its command: how their work ended without an error."""

    ending: str
    """One of ``ENDINGS``."""
    step: int
    """The last step that is saved; of a cache, clips that were encoded."""

    def __post_init__(self) -> None:
        if self.ending not in ENDINGS:
            raise ValueError(f"{self.ending!r} is none of {ENDINGS}")

    @property
    def exit_code(self) -> int:
        """What the command exits with."""
        return EXIT_CODES[self.ending]

    def write(self, run: RunDir, machine_rank: int = 0) -> None:
        """Leave it for the command."""
        _write(run.outcome(machine_rank), self)

    @classmethod
    def read(cls, run: RunDir, machine_rank: int = 0) -> "Outcome | None":
        """The outcome, once there is one."""
        return _read(run.outcome(machine_rank), cls)


@dataclass(frozen=True, kw_only=True)
class RankError:
    """From a rank to the command: the error that ended it."""

    rank: int
    time: float
    """Seconds since 1970."""
    message: str
    hint: str | None
    exit_code: int
    crash: bool
    """Not an error that the user can act on: it may not happen again."""
    traceback: str
    cause: int | None = None
    """The rank that failed, where that is another: all ended together with its error."""

    @staticmethod
    def reserve(run: RunDir, rank: int) -> None:
        """Take the room that an error needs: a full disk is the error that would find none.

        Raises:
            OSError: there is none already.
        """
        space = run.rank_error_space(rank)
        space.parent.mkdir(parents=True, exist_ok=True)
        space.write_text(" " * ERROR_SPACE, encoding="ascii")

    @staticmethod
    def release(run: RunDir, rank: int) -> None:
        """Give the room back where all went well."""
        run.rank_error_space(rank).unlink(missing_ok=True)

    def write(self, run: RunDir) -> None:
        """Leave it for the command, in the room that was reserved for it.

        Raises:
            OSError: it cannot be written.
        """
        space = run.rank_error_space(self.rank)
        if not space.exists():
            self.reserve(run, self.rank)
        text = json.dumps(asdict(self))
        if len(text) > ERROR_SPACE:  # the end of a traceback says most; a character may take 12 of them in JSON
            text = json.dumps(asdict(replace(self, traceback=self.traceback[-ERROR_SPACE // 16 :])))
        with space.open("r+", encoding="ascii") as file:
            file.write(text)
        space.replace(run.rank_error(self.rank))

    @classmethod
    def read_all(cls, run: RunDir, ranks: Iterable[int] | None = None) -> "list[RankError]":
        """Of all ranks that left one, of every machine or of these ranks; the first first."""
        paths = run.rank_errors() if ranks is None else [run.rank_error(rank) for rank in ranks]
        return sorted(_read_all(paths, cls), key=lambda error: error.time)


@dataclass(frozen=True, kw_only=True)
class FillReport:
    """From a rank that filled a cache to the others and to the command: what it did."""

    rank: int
    ending: str
    """One of ``ENDINGS``."""
    encoded: int
    """Clips."""
    needed: int
    """Entries that the run asks for of this rank's clips."""

    def write(self, run: RunDir) -> None:
        """Leave it for the command."""
        _write(run.fill_report(self.rank), self)

    @classmethod
    def read_all(cls, run: RunDir) -> "list[FillReport]":
        """Of all ranks that are done."""
        return _read_all(run.fill_reports(), cls)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why an attempt to train ended, as one machine tells it to the others."""

    kind: str
    """One of ``FAILURES``."""
    time: float
    """Seconds since 1970."""
    message: str
    hint: str | None
    exit_code: int

    def __post_init__(self) -> None:
        if self.kind not in FAILURES:
            raise ValueError(f"{self.kind!r} is none of {FAILURES}")

    @property
    def order(self) -> tuple[int, float]:
        """The least is the cause of the others."""
        return FAILURES.index(self.kind), self.time


FAILURES = ("error", "killed", "crash")
"""An error that the user can act on; a process that was killed, whose peers fail because they lost it; an error that
may not happen again, and may be such a loss."""

STATES = ("begins", "works", "failing", "failed", "ended")
"""Of a machine: it checks what it is to do; its launcher is at work; something has failed, so its ranks end, and
machine 0 waits for the others; its attempt is over; so is its command."""

REPORT_SPACE = 4096
"""Bytes of a machine's report at least, so that a full disk does not stop its signs of life."""


@dataclass(frozen=True, kw_only=True)
class MachineReport:
    """From the command of a machine to those of the others: that it lives, and how its ranks do."""

    machine: int
    state: str
    """One of ``STATES``."""
    attempt: int
    """Which launch of the job this is about, from 1."""
    beat: str
    """Another one with every sign of life."""
    command: str
    """An id of the command: one that was started anew has another."""
    job: str | None = None
    """The id of machine 0's command in whose job this one takes part; None before it has heard of one."""
    step: int | None = None
    """Of machine 0: the checkpoint that a later attempt goes on from; None: where the job began."""
    failure: Failure | None = None
    """Why its attempt is over; of machine 0, once it ``failed``, why all have ended."""

    def __post_init__(self) -> None:
        if self.state not in STATES:
            raise ValueError(f"{self.state!r} is none of {STATES}")

    def write(self, run: RunDir) -> None:
        """Say it, in place: NFS shows what is in a file when that is closed, but a renamed file up to a minute late.
        When this returns, the disk has it.

        Raises:
            OSError: it cannot be written; a run directory that has vanished is not made anew.
        """
        run.logs.mkdir(exist_ok=True)
        text = json.dumps(asdict(self)).ljust(REPORT_SPACE).encode("ascii")
        file = os.open(run.machine_report(self.machine), os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.pwrite(file, text, 0)
            os.ftruncate(file, len(text))
            fsync(file)
        finally:
            os.close(file)

    @classmethod
    def read(cls, run: RunDir, machine: int) -> "MachineReport | None":
        """What a machine said last, if it can be read at this moment."""
        return _read(run.machine_report(machine), cls._of)

    @classmethod
    def _of(cls, *, failure: dict[str, Any] | None, **said: Any) -> "MachineReport":
        return cls(**said, failure=None if failure is None else Failure(**failure))


def named_machines(machines: Sequence[int]) -> str:
    """These, for messages."""
    return f"machine{'' if len(machines) == 1 else 's'} {', '.join(map(str, machines))}"


def clear_messages(run: RunDir, machine_rank: int = 0, *, ranks_elsewhere: Collection[int] = ()) -> None:
    """Delete what earlier processes of this machine said.

    Args:
        ranks_elsewhere: those of other machines, which delete what theirs said.
    """
    said = [*run.rank_errors(), *run.rank_error_spaces(), *run.fill_reports()]
    elsewhere = {path for rank in ranks_elsewhere for path in run.files_of_rank(rank)}
    own = [run.stop_request(machine_rank), run.listening(machine_rank), run.outcome(machine_rank)]
    for path in [*own, *(set(said) - elsewhere)]:
        path.unlink(missing_ok=True)


def _write(path: Path, message: Any) -> None:
    write_atomically(path, json.dumps(asdict(message)))


def _read(path: Path, kind: Callable[..., Message]) -> Message | None:
    try:
        return kind(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _read_all(paths: list[Path], kind: Callable[..., Message]) -> list[Message]:
    return [message for path in paths if (message := _read(path, kind)) is not None]
