"""What a preemption signal means while no training process runs: there is nothing to save, so the command just ends."""

import os
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from vfun_cli.errors import EXIT_PREEMPTED, VfunError
from vfun_cli.run.messages import preemption_signals


class NothingToSave(VfunError):
    """Preempted before the training began, or after it had ended."""

    exit_code = EXIT_PREEMPTED
    usual_hint = "Run the same command again."


class _Preempted(KeyboardInterrupt):
    """Goes where Ctrl-C goes: past every handler of errors."""


@contextmanager
def nothing_to_save(
    message: str = "preempted while no training process was running: there was nothing to save.",
) -> Iterator[None]:
    """End the block at a preemption signal; inside, ``supervise.stop_requests`` may take the signals over.

    Raises:
        NothingToSave: there was a signal.
    """
    before = {number: signal.signal(number, _on_signal) for number in preemption_signals()}
    try:
        yield
    except _Preempted:
        raise NothingToSave(message) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_terminal(number: int) -> None:
    """After a hang-up, let nothing be written to the terminal that is gone: each attempt would be an error."""
    if number != signal.SIGHUP:
        return
    with suppress(OSError), Path(os.devnull).open("wb") as nowhere:
        for stream in (1, 2):
            if stat.S_ISCHR(os.fstat(stream).st_mode):  # a closed terminal no longer says that it is one
                os.dup2(nowhere.fileno(), stream)


def _on_signal(number: int, frame: FrameType | None) -> None:
    leave_terminal(number)
    raise _Preempted
