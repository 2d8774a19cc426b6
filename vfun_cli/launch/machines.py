"""Several machines in one job: the command of each knows how the others do, and all end, or start over, as one.

Machine 0 looks at what all others report in the run directory, and they look at machine 0. Where an attempt to train
fails on one machine, each ends its own ranks and says what they met; machine 0 names the cause, and that is what every
command ends with. If it is one that allows another attempt, all begin that after the last has ended the former, from
the checkpoint that machine 0 names.

Where a scheduler starts machines again one by one, new commands meet some that are still ending. A job is that of one
command of machine 0, and every report says of which: what belongs to another one counts for nothing.

No clock of another machine is believed: whoever changes its report lives, and whoever does not has gone. Nor is a
silence while this machine's own reports do not get through: then the disk is at fault, not the machine.
"""

import _thread
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count
from secrets import token_hex

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
    first_line,
)
from vfun_cli.launch.preemption import NothingToSave, interruption
from vfun_cli.run import locate, ownership
from vfun_cli.run.messages import STATES, Failure, MachineReport, RankError, named_machines
from vfun_cli.run.rundir import RunDir

BEAT = 2.0
"""Seconds between two signs of life."""
LOOK = 1.0
"""Seconds between two looks at the others."""
GRACE = 3
"""Looks for which the ranks may say what they met, after something has failed."""
SILENT = 18
"""Looks without a sign of life after which a machine has gone: with a beat before them, and two graces after them (of
machine 0 and of those that hear of it there), all end within 30 seconds."""
IN_TIME = 2 * BEAT
"""Seconds after which a sign of life of this machine is late: the disk, or the way to it, stands still."""
MOST_PATIENCE = 60
"""Looks that others get at most beside ``SILENT`` for as long as this machine's own signs of life were late."""
SAID_AFTER = 15
"""Looks without any report of a machine after which people are told who is waited for."""
COMES_WITHIN = 1800
"""Looks, of a second each, within which every machine must have begun: a container image is fetched in minutes."""
MEETS_WITHIN = 600
"""Looks within which ranks must have started that all machines are starting: they do when their launchers have met."""

_ERRORS = {
    error.exit_code: error
    for error in (
        RunError,
        ConfigError,
        MetadataError,
        FitError,
        CheckpointError,
        EnvironmentFault,
        NothingToSave,
        StoppedAtOnce,
    )
}


class Machine:
    """This machine among those of a job, in the eyes of its command."""

    def __init__(self, run: RunDir, number: int = 0, *, machines: int = 1, processes: int = 1) -> None:
        """One of a job, by default the only one.

        Args:
            machines: of the job.
            processes: of all machines together.
        """
        self.run = run
        self.number = number
        each = processes // machines
        self.ranks = range(number * each, (number + 1) * each)
        self.ranks_elsewhere = set(range(processes)) - set(self.ranks)
        others = range(1, machines) if number == 0 else range(1)
        self.peers = list(others) if machines > 1 else []
        """The machines that this one looks at."""
        self.ended_ranks = False
        """Whether the ranks of this attempt were ended here, since something had failed."""
        command = ownership.new_id()
        job = command if number == 0 else None
        self._report = MachineReport(machine=number, state="begins", attempt=1, beat="", command=command, job=job)
        self._written = time.monotonic()
        """When a sign of life of this machine got through last."""
        self._writing = threading.Lock()
        self._before = {peer: MachineReport.read(run, peer) for peer in self.peers}
        """What an earlier command of a machine may have said."""
        former = MachineReport.read(run, number)
        self._former = former.job if former is not None else None
        """The job of this machine's earlier command, which this one takes no part in."""
        self._heard: dict[int, MachineReport] = {}
        self._unchanged = dict.fromkeys(self.peers, 0)
        """Looks since a machine last changed its report; below zero where it gets that many more."""
        self._next_look = 0.0
        self._looks_at_failure = 0
        self._told = False
        self._met = False
        """Whether the launchers of this attempt have met: they start their ranks then."""
        self._looks_apart = 0
        self._prepares = True
        """Whether this command has not come to launch anything yet."""
        self._ends_with: Failure | None = None
        """What another machine met meanwhile."""

    @property
    def attempt(self) -> int:
        """Which launch of the job this is, from 1."""
        return self._report.attempt

    def rank(self, number: int) -> str:
        """A rank of the job, for messages of all machines."""
        return f"rank {number}" + (f" on machine {number // len(self.ranks)}" if self.peers else "")

    @property
    def launcher(self) -> str:
        """What has started the ranks here, for the same."""
        return "the launcher" + (f" on machine {self.number}" if self.peers else "")

    # What this machine says ------------------------------------------------------------------------------------------

    @contextmanager
    def taking_part(self) -> Iterator[None]:
        """Give signs of life until the end of the block, and say how that ended.

        Raises:
            VfunError: another machine failed before this one had come to launch anything (``launches``).
        """
        if not self.peers:
            yield
            return
        done = threading.Event()
        thread = threading.Thread(target=self._beat, args=(done,), name="signs of life", daemon=True)
        thread.start()
        failure = None
        try:
            yield
        except BaseException as error:
            if self._ends_with is not None and isinstance(error, KeyboardInterrupt):
                failure = self._ends_with
                raise error_of(failure) from None
            failure = self._of_this_machine(failure_of(error))
            raise
        finally:
            done.set()
            thread.join()
            self._say(state="ended", failure=failure)

    def _of_this_machine(self, failure: Failure) -> Failure:
        """What this command met, as the others say it; what all agreed on says already where it was met."""
        agreed = self._report.failure
        if agreed is not None and agreed.message == failure.message:
            return failure
        return replace(failure, message=f"machine {self.number}: {failure.message}")

    def _beat(self, done: threading.Event) -> None:
        self._say()
        for number in count(1):
            if done.wait(BEAT / 2):
                return
            if self._prepares:
                self._heed()
            if number % 2 == 0:
                self._say()

    def _heed(self) -> None:
        """End what this command does, as Ctrl-C would, where another machine has failed or gone: to check rows or every
        byte of a checkpoint takes minutes.
        """
        self.look()
        failure = self._cause(None) or (self._lost() if self._gone() else None)
        with self._writing:
            if failure is not None and self._prepares:
                self._prepares, self._ends_with = False, failure
                _thread.interrupt_main()

    def launches(self) -> None:
        """From here on whoever watches the ranks looks at the other machines (``must_end``)."""
        with self._writing:
            self._prepares = False

    def started(self) -> None:
        """Say that the launcher of this attempt has been started here."""
        if self.peers:
            self._say(state="works")

    def _say(self, **changed: object) -> None:
        with self._writing:
            self._report = replace(self._report, **changed, beat=token_hex(8))  # type: ignore[arg-type]
            with suppress(OSError):  # the next sign of life may succeed
                self._report.write(self.run)
                self._written = time.monotonic()

    # What the others say ---------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Read what the others report. A report that cannot be read says nothing, not that its machine has gone."""
        late = time.monotonic() - self._written
        for peer in self.peers:
            said, before = MachineReport.read(self.run, peer), self._heard.get(peer, self._before[peer])
            if said == before or (said is not None and not self._takes_part(peer, said)):
                if late <= IN_TIME:
                    self._unchanged[peer] += 1
                elif peer in self._heard:  # whatever keeps this machine's may keep the others' as long
                    self._unchanged[peer] = -min(int(late), MOST_PATIENCE)
            elif said is None:
                continue
            else:
                self._hear(peer, said)

    def _takes_part(self, peer: int, said: MachineReport) -> bool:
        """Whether a report is from a command of this job: not from one that is still ending, nor from one that was
        started anew alone in the place of a lost one.
        """
        heard = self._heard.get(peer)
        if heard is not None and said.command != heard.command and (heard.state != "ended" or heard.failure):
            return False
        if self.number == 0:
            return said.job in (None, self._report.command)
        # Its end concerns whoever waits for it; and if the ranks here have met others, then those of this command.
        return said.command != self._former or said.failure is not None or self._met

    def _hear(self, peer: int, said: MachineReport) -> None:
        known = self._heard.get(peer)
        if self.number != 0 and (known is None or known.command != said.command):  # it may have started over before
            with self._writing:
                self._report = replace(self._report, attempt=said.attempt, job=said.command)
        self._heard[peer], self._unchanged[peer] = said, 0

    def must_end(self) -> bool:
        """Whether the ranks here are to be ended: something has failed, and they had time to say what they met."""
        if self.peers and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LOOK
            self.look()
            self._looks_apart += self._waits_to_meet()
            if self._looks_at_failure:
                self._looks_at_failure += 1
            elif self._sees_failure():
                self._looks_at_failure = 1
                self._say(state="failing")  # so that the others' time begins now, too
            self.ended_ranks = self._looks_at_failure > GRACE
        return self.ended_ranks

    def _waits_to_meet(self) -> bool:
        """Whether all machines start their ranks, and none has: what machine 0 sees, where the launchers meet."""
        self._met |= self.run.rank_error_space(self.ranks.start).exists()
        works = [said.state == "works" for said in self._heard.values()]
        return self.number == 0 and not self._met and all(works) and len(works) == len(self.peers)

    def tell(self) -> None:
        """Say once who is waited for, and when all have come."""
        absent = self._absent(SAID_AFTER)
        if absent and not self._told:
            self._told = True
            ends = f"Without {'it' if len(absent) == 1 else 'them'} this ends in {COMES_WITHIN // 60} minutes."
            console.hint(f"waiting for {named_machines(absent)}: {self._what_is_known(absent)} {ends}")
        elif self._told and len(self._heard) == len(self.peers):
            self._told = False
            console.hint("all machines have come.")

    def _what_is_known(self, absent: Sequence[int]) -> str:
        """With what earlier commands there ended: perhaps this job's own, which began before this one."""
        before = [said.failure for peer in absent if (said := self._before[peer]) is not None]
        ended = [f"The last one there ended with this: {failure.message}" for failure in before if failure is not None]
        return " ".join([f"no vfun command has reported from there in {self.run.logs}.", *ended])

    def errors(self) -> list[RankError]:
        """What the ranks of this machine met, the first first."""
        # By name: a hundred machines that list the files of a thousand ranks once a second keep a disk busy.
        return RankError.read_all(self.run, self.ranks if self.peers else None)

    def _sees_failure(self) -> bool:
        heard = self._heard.values()
        missing = self._gone() or self._absent(COMES_WITHIN) or self._looks_apart >= MEETS_WITHIN
        return bool(missing or self.errors()) or any(map(self._has_failed, heard))

    def _has_failed(self, said: MachineReport) -> bool:
        if said.state == "ended":
            return said.failure is not None
        return said.state not in STATES[:2] and said.attempt == self.attempt

    def _has_ended_attempt(self, said: MachineReport) -> bool:
        return said.state == "ended" or (said.state == "failed" and said.attempt == self.attempt)

    def _gone(self) -> list[int]:
        """Machines that began and give no sign of life any more."""
        return [peer for peer, said in self._heard.items() if said.state != "ended" and self._unchanged[peer] >= SILENT]

    def _absent(self, looks: int) -> list[int]:
        """Machines that did not begin within so many looks."""
        return [peer for peer in self.peers if peer not in self._heard and self._unchanged[peer] >= looks]

    # What comes of it ------------------------------------------------------------------------------------------------

    def agree(self, own: Failure | None, *, given_up: Callable[[], bool] = lambda: False) -> Failure:
        """Why the attempt is over, the same on all machines: waits until all that are in it have ended theirs.

        Args:
            own: what was met here; None if the ranks were ended only since another machine had failed.
            given_up: asked while waiting; ends it with what was met here.
        """
        cause = None
        if self._heard:  # otherwise the others have not come yet, or never will
            self._say(state="failing" if self.number == 0 else "failed", failure=own)
            while cause is None and not given_up():
                self.look()
                cause = self._decide(own) if self.number == 0 else self._decided(own)
                time.sleep(0.0 if cause else LOOK)
        cause = cause or own or self._lost()
        if self.peers:
            self._say(state="failed", failure=cause)
        return cause

    def _decide(self, own: Failure | None) -> Failure | None:
        gone = self._gone()
        if not all(self._has_ended_attempt(said) for peer, said in self._heard.items() if peer not in gone):
            return None
        if gone:
            return self._lost()
        return self._cause(own) or self._lost()

    def _cause(self, own: Failure | None) -> Failure | None:
        """Of what was met here and what the others that have failed say, that which the rest comes of."""
        met = [own, *(said.failure for said in self._heard.values() if self._has_failed(said))]
        return min((failure for failure in met if failure), key=lambda failure: failure.order, default=None)

    def _decided(self, own: Failure | None) -> Failure | None:
        said = self._heard[0]
        if self._has_ended_attempt(said) or said.attempt > self.attempt:
            return said.failure or own or self._lost()
        return self._lost() if self._gone() else None

    def _lost(self) -> Failure:
        """That machines have gone, never came or do not find each other."""
        hint = "Look after it, then start the same command on all machines."
        if gone := self._gone():
            each = "its vfun command or the whole machine has died, or no longer reaches"
            message = f"{named_machines(gone)} {_have(gone)} gone without a word: {each} {self.run.root}."
        elif absent := self._absent(COMES_WITHIN):
            late = f"{named_machines(absent)} {_have(absent)} not come within {COMES_WITHIN // 60} minutes"
            message = f"{late}: {self._what_is_known(absent)}"
        elif self._looks_apart >= MEETS_WITHIN:
            message = f"all machines have begun, but their launchers have not met within {MEETS_WITHIN // 60} minutes."
            hint = "Every machine must reach --main-process-ip at --main-process-port: mend that, then start all again."
        else:
            message = f"the machines lost each other: a vfun command has died, or no longer reaches {self.run.root}."
        return Failure(
            kind="error",  # nobody there starts over
            time=time.time(),
            message=message,
            hint=f"{hint} {locate.way_on(self.run)}",
            exit_code=RunError.exit_code,
        )

    def next_attempt(self, step: int | None) -> int | None:
        """Begin the next attempt with all others; returns the step of the checkpoint that it goes on from.

        Args:
            step: as machine 0 finds it, whose word counts.

        Raises:
            VfunError: machine 0 begins none.
        """
        self.ended_ranks, self._looks_at_failure, self._looks_apart, self._met = False, 0, 0, False
        if not self._heard:
            return step
        attempt = self.attempt + 1
        while self.number != 0 and (said := self._heard[0]).attempt < attempt:
            if said.state == "ended" or self._gone():
                raise error_of(said.failure or self._lost())
            time.sleep(LOOK)
            self.look()
        step = step if self.number == 0 else said.step
        self._say(attempt=attempt, state="begins", step=step, failure=None)
        return step


def _have(machines: Sequence[int]) -> str:
    return "has" if len(machines) == 1 else "have"


def error_of(failure: Failure) -> VfunError:
    """A failure as the command ends with it."""
    return _ERRORS.get(failure.exit_code, RunError)(failure.message, hint=failure.hint)


def failure_of(error: BaseException) -> Failure:
    """An error as the other machines hear of it; none of them starts over for it."""
    if isinstance(error, KeyboardInterrupt):
        known: VfunError = interruption(error)
    else:
        known = error if isinstance(error, VfunError) else RunError(f"{type(error).__name__}: {first_line(error)}.")
    return Failure(kind="error", time=time.time(), message=known.message, hint=known.hint, exit_code=known.exit_code)
