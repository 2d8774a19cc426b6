"""What a preemption signal means while no training process runs: there is nothing to save, so the command just ends."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from vfun_cli.errors import EXIT_PREEMPTED, VfunError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class NothingToSave(VfunError):
    """Preempted before the training began, or after it had ended."""

    exit_code = EXIT_PREEMPTED

    def __init__(self) -> None:
        super().__init__(
            "preempted while no training process was running: there was nothing to save.",
            hint="Run the same command again.",
        )


class _Preempted(KeyboardInterrupt):
    """Goes where Ctrl-C goes: past every handler of errors."""


@contextmanager
def nothing_to_save() -> Iterator[None]:
    """End the block at a preemption signal; inside, ``supervise.stop_requests`` may take the signals over.

    Raises:
        NothingToSave: there was a signal.
    """
    before = {number: signal.signal(number, _on_signal) for number in SIGNALS}
    try:
        yield
    except _Preempted:
        raise NothingToSave from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _on_signal(number: int, frame: FrameType | None) -> None:
    raise _Preempted
