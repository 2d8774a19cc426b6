"""What a preemption signal means while no training process runs: there is nothing to save, so the command just ends."""

import os
import signal
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from vfun_cli.errors import EXIT_PREEMPTED, Interrupted, VfunError
from vfun_cli.run.messages import preemption_signals


class NothingToSave(VfunError):
    """Preempted before the training began, or after it had ended."""

    exit_code = EXIT_PREEMPTED
    usual_hint = "Run the same command again."


class _Preempted(KeyboardInterrupt):
    """Goes where Ctrl-C goes: past every handler of errors; its argument is the signal."""


PREEMPTED = "preempted while no training process was running: there was nothing to save."


def interruption(error: KeyboardInterrupt) -> VfunError:
    """Ctrl-C or a preemption signal as the error that the command ends with."""
    return NothingToSave(PREEMPTED) if isinstance(error, _Preempted) else Interrupted("interrupted.")


@contextmanager
def nothing_to_save(message: str = PREEMPTED) -> Iterator[None]:
    """End the block at a preemption signal; inside, ``supervise.stop_requests`` may take the signals over.

    Raises:
        NothingToSave: there was a signal.
    """
    before = {number: signal.signal(number, _on_signal) for number in preemption_signals()}
    unraisable = sys.unraisablehook

    def on_unraisable(lost: Any) -> None:
        if isinstance(lost.exc_value, _Preempted):
            _send_again(lost.exc_value)
        else:
            unraisable(lost)

    sys.unraisablehook = on_unraisable
    try:
        yield
    except _Preempted:
        raise NothingToSave(message) from None
    finally:
        sys.unraisablehook = unraisable
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
    raise _Preempted(number)


def _send_again(lost: _Preempted) -> None:
    """For an exception that came up where Python drops it, as in a callback during an import or in ``__del__``."""
    threading.Timer(0.01, os.kill, (os.getpid(), lost.args[0])).start()  # when that place has been left
