"""Requests to stop: a signal to this process, the request file of the launching command, or the time limit."""

import ctypes
import signal
import time
from pathlib import Path
from types import FrameType

INTERRUPTED, PREEMPTED = 1, 2
"""Why a run should stop, ordered by weight; 0 is no reason."""

PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
LAUNCHER_GONE = signal.SIGUSR2
"""Sent by the kernel when the launcher ends. Not one of the above: it follows them and must not count as a second."""

_PR_SET_PDEATHSIG = 1


class StopFlag:
    """Remembers that someone asked to stop; read once at every step boundary."""

    def __init__(self, request: Path, *, reads_file: bool, deadline: float | None = None) -> None:
        self.request = request
        self.reads_file = reads_file
        """One rank of each machine looks at the file and the clock."""
        self.deadline = deadline
        """Seconds since 1970."""
        self.signalled = 0

    def listen(self) -> None:
        """Take preemption signals and the launcher's end; a second signal ends the process at once."""
        for number in PREEMPTION_SIGNALS:
            signal.signal(number, self._take)
        signal.signal(LAUNCHER_GONE, self._launcher_gone)
        # Without this a rank whose launcher was killed would train on, unseen, beside the run's continuation.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(LAUNCHER_GONE))

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.signalled = PREEMPTED
        for each in PREEMPTION_SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    def _launcher_gone(self, number: int, frame: FrameType | None) -> None:
        self.signalled = PREEMPTED

    def reason(self) -> int:
        """0 go on, ``INTERRUPTED`` or ``PREEMPTED``."""
        if not self.reads_file:
            return self.signalled
        if self.deadline is not None and time.time() >= self.deadline:
            return PREEMPTED
        try:
            asked = self.request.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return self.signalled
        return max(self.signalled, INTERRUPTED if asked == "interrupted" else PREEMPTED)


def leave_signals_to_the_rank() -> None:
    """For helper processes of a rank: a signal to the whole job must not take away what the rank still needs."""
    for number in PREEMPTION_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
