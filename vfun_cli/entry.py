"""The entry point, so small that Ctrl-C is answered before anything large is imported."""

import _signal  # type: ignore[import-not-found]  # of what signal is made, which imports for long itself
import os

INTERRUPTED = 130


def main() -> None:
    """The vfun command, from the first import to the last byte of output."""
    number, usual = _signal.SIGINT, _signal.default_int_handler
    heard = _signal.getsignal(number) is usual  # in "nohup vfun &" it is to be ignored
    try:
        if heard:
            _signal.signal(number, _quit)
        from vfun_cli.main import main as command

        if heard:
            _signal.signal(number, usual)
        command()
    except KeyboardInterrupt:  # once more, while the command was ending
        raise SystemExit(INTERRUPTED) from None
    finally:
        if heard:
            _signal.signal(number, _quit)


def _quit(number: int, frame: object) -> None:
    """While nothing runs that could be tidied up; an exception would be lost in whatever is being imported."""
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)
