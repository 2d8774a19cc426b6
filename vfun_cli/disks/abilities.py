"""Which errors mean that a disk lacks an ability and which mean that it failed, and what a missing ability costs.

NFS without a lock service and Lustre mounted without ``flock`` know no locks; Windows drives, SMB shares and buckets
mounted through FUSE know no permissions and flush no directories. Each of these costs one guarantee. A full disk, a
broken one and one that cannot be written are failures everywhere.
"""

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any

from vfun_cli.errors import EnvironmentFault

LACKS = frozenset(
    {
        errno.EACCES, errno.EBADF, errno.EINVAL, errno.EISDIR, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP,
        errno.ENOTTY, errno.EOPNOTSUPP, errno.EPERM,
    }
)  # fmt: skip
"""How disks answer what they do not know, asked of a file that was opened or made for it."""

ROOM = "Make room there, then give the same command again."
PERMISSION = "Mend its permissions, or name another place."
ELSE = "The same command with --debug shows where."
DAMAGE = "That disk, or its server, has a fault: the system's log (dmesg) may say more."
HINTS = {
    errno.ENOSPC: ROOM,
    errno.EDQUOT: f"Your quota of that disk is used up. {ROOM}",
    errno.EROFS: PERMISSION,
    errno.EACCES: PERMISSION,
    errno.EPERM: PERMISSION,
    errno.EIO: DAMAGE,
    errno.ESTALE: DAMAGE,
    **dict.fromkeys(
        (errno.EEXIST, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
        "Name another place, or move what is there away.",
    ),
}
"""What to do about the failures of a disk."""


@dataclass(frozen=True, kw_only=True)
class Ability:
    """Something that vfun asks of a disk and can do without."""

    name: str
    without: str
    """What its absence costs."""
    use: Callable[[Path, int], object]
    """Raises OSError where it is missing; takes an open file's path and descriptor."""


ABILITIES = (
    Ability(
        name="locks",
        without="a second command is kept out by a lease, and after a crash one on another machine waits 90 seconds",
        use=lambda path, file: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB),
    ),
    Ability(
        name="changes of permissions",
        without="who may read the files is settled by how it is mounted",
        use=lambda path, file: path.chmod(stat.S_IMODE(os.fstat(file).st_mode)),
    ),
    Ability(
        name="flushing of directories",
        without="a power cut can undo the newest checkpoint",
        use=lambda path, file: _fsync_directory(path.parent),
    ),
)
_PROBE = b"\0" * 4096


def fault(error: OSError, *, where: Path | None = None) -> EnvironmentFault:
    """The error of the system as one that a user can act on.

    Args:
        where: what was being used, for an error that names no file.
    """
    name = named_by(error) or where
    about = f" about {os.fsdecode(name)}" if isinstance(name, (str, bytes, Path)) else ""
    hint = HINTS.get(error.errno or 0, ELSE)
    return EnvironmentFault(f'the system says "{error.strerror or error}"{about}.', hint=hint)


def named_by(error: OSError) -> Any:
    """The file that an error of the system is about, if it names one: of a copy it names both, the source first, and of
    these the other one is on the disk that is full.
    """
    name = error.filename2 if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else None
    return name or error.filename


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let errors of the system say which file they are about; those of writing do not by themselves."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def if_able() -> Iterator[None]:
    """Do the block's one operation where the disk knows it; a failing disk is an error as ever."""
    try:
        yield
    except OSError as error:
        if error.errno not in LACKS:
            raise


def missing(folder: Path) -> list[Ability]:
    """What the disk of a folder lacks, tried with a file of its own that is gone afterwards.

    Raises:
        OSError: nothing can be written there.
    """
    path = folder / f".vfun-write-test-{token_hex(8)}"
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.write(file, _PROBE)
        fsync(file)
        return [ability for ability in ABILITIES if _lacks(partial(ability.use, path, file))]
    finally:
        os.close(file)
        path.unlink(missing_ok=True)


def has_record_locks(path: Path) -> bool:
    """Whether the disk of a file has the locks that databases use."""
    with path.open("rb") as file:
        return not _lacks(lambda: fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB))


def _lacks(use: Callable[[], object]) -> bool:
    try:
        use()
    except BlockingIOError:  # someone has locked it
        return False
    except OSError as error:
        if error.errno not in LACKS:
            raise
        return True
    return False


def fsync(file: int) -> None:
    """Make what was written to a file survive a power cut."""
    with if_able():
        os.fsync(file)


def fsync_directory(directory: Path) -> None:
    """Make renames and new names in a directory survive a power cut."""
    with if_able():
        _fsync_directory(directory)


def _fsync_directory(directory: Path) -> None:
    file = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextmanager
def permissions_optional() -> Iterator[None]:
    """For a library that changes permissions where it could do without."""
    change = os.chmod

    def change_if_able(*arguments: Any, **named: Any) -> None:
        with if_able():
            change(*arguments, **named)

    os.chmod = change_if_able
    try:
        yield
    finally:
        os.chmod = change


def make_usual(path: Path) -> None:
    """Give a file that a library made for its owner alone the permissions of any new file there."""
    usual = path.with_name(f".{path.name}.{token_hex(8)}")
    usual.touch()  # asking for the umask would change it, for all threads, and a folder may have rules of its own
    mode = stat.S_IMODE(usual.stat().st_mode)
    usual.unlink()
    with if_able():
        path.chmod(mode)


def reserve(file: int, size: int) -> None:
    """Take the room for a file: a full disk is noticed here, not after minutes of writing."""
    with if_able():
        os.posix_fallocate(file, 0, size)


def copy_folder(source: Path, target: Path) -> None:
    """The contents of a folder, without the times and modes that not every disk can take; ``target`` may be there."""
    target.mkdir(exist_ok=True)
    for path in source.iterdir():
        if path.is_dir():
            copy_folder(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)
