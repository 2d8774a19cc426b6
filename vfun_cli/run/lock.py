"""One command at a time in a run directory, and none beside training processes that outlived theirs.

The locks belong to open files, so that the system takes them away with the process, however it ends. Each machine of
a job has its own. On a file system that knows no locks there is no protection.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vfun_cli.errors import ConfigError
from vfun_cli.run.rundir import RunDir


@contextmanager
def held(run: RunDir, machine_rank: int) -> Iterator[None]:
    """Keep the run directory to this command until the end of the block.

    Raises:
        ConfigError: another command, or training processes that lost theirs, are at work there.
    """
    command = _open(run, machine_rank, "command")
    ranks = _open(run, machine_rank, "ranks")
    try:
        if not _lock(command, fcntl.LOCK_EX | fcntl.LOCK_NB):
            who = f"another vfun command (process {os.pread(command, 20, 0).decode() or 'unknown'})"
            raise _in_use(run, who, "Wait until it has ended or stop it")
        os.ftruncate(command, 0)
        os.pwrite(command, str(os.getpid()).encode(), 0)
        if not _lock(ranks, fcntl.LOCK_EX | fcntl.LOCK_NB):
            who = "training processes whose vfun command has been killed"
            raise _in_use(run, who, "Wait until they have ended or kill them (pgrep -f vfun_cli.training)")
        fcntl.flock(ranks, fcntl.LOCK_UN)
        yield
    finally:
        os.close(command)
        os.close(ranks)


def take_part(run: RunDir, machine_rank: int) -> None:
    """For a training process: be known to be at work until it ends."""
    _lock(_open(run, machine_rank, "ranks"), fcntl.LOCK_SH)


def _in_use(run: RunDir, who: str, what_to_do: str) -> ConfigError:
    return ConfigError(
        f"{run.root} is in use by {who}.", hint=f"{what_to_do}, or choose another directory with --output-dir."
    )


def _open(run: RunDir, machine_rank: int, kind: str) -> int:
    path: Path = run.root / f".lock-{kind}-{machine_rank}"
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)


def _lock(file: int, how: int) -> bool:
    """Whether the lock was free, or there are no locks here."""
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
