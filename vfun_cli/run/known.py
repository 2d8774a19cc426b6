"""What a process met, as an error that it can tell others."""

from pathlib import Path

from vfun_cli.disks.abilities import HINTS, fault
from vfun_cli.errors import Unforeseen, VfunError, first_line
from vfun_cli.run.memory_errors import memory_error


def known(error: BaseException, where: Path | None = None) -> VfunError:
    """The error itself if it is one of ours, else what is known of it.

    Args:
        where: what was being used, for an error of a disk that names no file.
    """
    if isinstance(error, VfunError):
        return error
    if isinstance(error, OSError) and error.errno in HINTS:
        return fault(error, where=where)
    return memory_error(error) or Unforeseen(f"{type(error).__name__}: {first_line(error)}.")
