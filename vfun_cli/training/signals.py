"""Requests to stop: a signal to this process, or the request file that the launching command writes."""

import signal
from pathlib import Path
from types import FrameType

PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopFlag:
    """Remembers that someone asked to stop; read once at every step boundary."""

    def __init__(self, request: Path, *, reads_file: bool) -> None:
        self.request = request
        self.reads_file = reads_file
        """Rank 0 alone looks at the file: one look a step, however many ranks."""
        self.signalled = 0

    def listen(self) -> None:
        """Take preemption signals; a second one acts as usual and ends the process at once."""
        for number in PREEMPTION_SIGNALS:
            signal.signal(number, self._take)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.signalled = 2
        signal.signal(number, signal.SIG_DFL)

    def reason(self) -> int:
        """0 go on, 1 interrupted, 2 preempted."""
        if self.reads_file and self.request.exists():
            asked = self.request.read_text(encoding="utf-8").strip()
            return max(self.signalled, 1 if asked == "interrupted" else 2)
        return self.signalled
