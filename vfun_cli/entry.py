"""The entry point, so small that Ctrl-C is answered before anything large is imported."""

import os
import signal
from types import FrameType

INTERRUPTED = 130


def main() -> None:
    """The vfun command, from the first import to the last byte of output."""
    heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # "nohup vfun &": it is to be ignored
    try:
        if heard:
            signal.signal(signal.SIGINT, _quit)
        from vfun_cli.main import main as command

        if heard:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        command()
    except KeyboardInterrupt:  # once more, while the command was ending
        raise SystemExit(INTERRUPTED) from None
    finally:
        if heard:
            signal.signal(signal.SIGINT, _quit)


def _quit(number: int, frame: FrameType | None) -> None:
    """While nothing runs that could be tidied up; an exception would be lost in whatever is being imported."""
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)
