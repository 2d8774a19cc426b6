"""Requests to stop: a signal to this process, the request file of the launching command, or the time limit."""

import ctypes
import signal
import time
from types import FrameType

from vfun_cli.run.messages import ENDINGS, PREEMPTION_SIGNALS, StopRequest, preemption_signals
from vfun_cli.run.rundir import RunDir

CONTINUE, INTERRUPTED, PREEMPTED = range(len(ENDINGS))
"""Why a run should stop, by severity: positions in ``ENDINGS``, so that ranks can tell each other numbers."""

LAUNCHER_GONE = signal.SIGUSR2
"""Sent by the kernel when the launcher ends. Not one of the above: it follows them and must not count as a second."""

_PR_SET_PDEATHSIG = 1


class StopFlag:
    """Remembers that someone asked to stop; read once at every step boundary."""

    def __init__(self, run: RunDir, *, reads_file: bool, machine_rank: int = 0, deadline: float | None = None) -> None:
        self.run = run
        self.machine_rank = machine_rank
        self.reads_file = reads_file
        """Whether it looks at the file and the clock. Where the ranks ask each other, one of each machine does."""
        self.deadline = deadline
        """Seconds since 1970."""
        self.signalled = CONTINUE

    def listen(self) -> None:
        """Take preemption signals and the launcher's end; a second signal ends the process at once.

        A second hang-up does not count: the terminal and the shell both send one.
        """
        for number in preemption_signals():
            signal.signal(number, self._take)
        signal.signal(LAUNCHER_GONE, self._launcher_gone)
        # Without this a rank whose launcher was killed would train on, unseen, beside the run's continuation.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(LAUNCHER_GONE))

    def announce(self) -> None:
        """Tell the command that all ranks have come to where they look for requests again and again.

        Until then they may wait for a disk or for each other and hear nothing, so the command ends them by itself.
        """
        if self.reads_file:
            self.run.listening(self.machine_rank).touch()

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.signalled = PREEMPTED
        for each in PREEMPTION_SIGNALS:
            signal.signal(each, signal.SIG_IGN if each == signal.SIGHUP else signal.SIG_DFL)

    def _launcher_gone(self, number: int, frame: FrameType | None) -> None:
        self.signalled = PREEMPTED

    def reason(self) -> int:
        """``CONTINUE``, ``INTERRUPTED`` or ``PREEMPTED``."""
        if not self.reads_file:
            return self.signalled
        if self.deadline is not None and time.time() >= self.deadline:
            return PREEMPTED
        request = StopRequest.read(self.run, self.machine_rank)
        return self.signalled if request is None else max(self.signalled, ENDINGS.index(request.reason))


def leave_signals_to_the_rank() -> None:
    """For helper processes of a rank: a signal to the whole job must not take away what the rank still needs."""
    for number in PREEMPTION_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
