"""Opening what others wrote without waiting for ever, and writing what was asked for without losing anything."""

import errno
import io
import os
import re
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import IO

from vfun_cli.disks.abilities import fsync
from vfun_cli.errors import ConfigError, EnvironmentFault, first_line

LONGEST_NAME = 255
"""Bytes of a name between slashes."""


class NotRegular(OSError):
    """A directory, a pipe or a device: to read it might never end."""


def regular_status(path: str | Path) -> os.stat_result:
    """The status of a regular file.

    Raises:
        NotRegular: it is something else.
        OSError: it is not there, or its path cannot be one.
    """
    try:
        status = os.stat(path)  # noqa: PTH116 - pathlib costs a tenth of reading a header
    except ValueError as error:  # a null character, or half of one
        raise OSError(errno.EINVAL, f"no path of a file ({error})", str(path)) from None
    if not stat.S_ISREG(status.st_mode):
        what = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise NotRegular(errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL, what, str(path))
    return status


def has_too_long_a_name(path: str) -> bool:
    """Whether no file system has such a file; to ask whether it exists is an error there, not a no."""
    return any(len(name) > LONGEST_NAME for name in os.fsencode(path).split(b"/"))


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it, in which it will be made."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


def at_home(path: str | Path) -> Path:
    """A path as people write it, with ~ for their home directory wherever no shell has replaced it.

    Raises:
        ValueError: it is empty, or there is no such home directory.
    """
    if not str(path) or "\0" in str(path):
        raise ValueError("it is empty, or holds a zero byte")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: {first_line(error)}") from None


def possible(path: str | Path) -> Path:
    """The same of a path that a file can have, so that it can be asked for without an error of the system.

    Raises:
        ValueError: as of :func:`at_home`, or a name in it is too long.
    """
    found = at_home(path)
    if has_too_long_a_name(str(found)):
        raise ValueError(f"a name in it has more than {LONGEST_NAME} bytes")
    return found


def open_bounded(path: Path, most: int) -> IO[bytes]:
    """A regular file, to be read.

    Raises:
        OSError: it is none, cannot be read, or has more than ``most`` bytes.
    """
    size = regular_status(path).st_size
    if size > most:
        raise OSError(errno.EFBIG, f"{size:,} bytes are too many: at most {most:,} are read", str(path))
    return path.open("rb") if size else io.BytesIO()  # some of /proc state no size, and wait for ever


def require_place(
    path: Path, option: str, *, ours: re.Pattern[bytes] | None = None, inputs: Iterable[Path] = ()
) -> None:
    """Refuse a file that ``option`` names as an output if something would be lost there.

    A file that exists is replaced only if it is empty or begins with ``ours``, as vfun's earlier output does; one of
    ``inputs`` never is, under whatever name.

    Raises:
        ConfigError: it cannot be written there.
    """
    another = f"Name another file with {option}."
    try:
        status = path.stat()
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise ConfigError(f"{path} cannot be written: there is no folder {path.parent}.", hint=another) from None
        return
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path} cannot be written: {why}.", hint=another) from None
    if not stat.S_ISREG(status.st_mode):
        what = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise ConfigError(f"{path} cannot be written: it is {what}.", hint=another)
    if any(each.exists() and each.samefile(path) for each in inputs):
        raise ConfigError(f"{path} is what this command reads: it is never written to.", hint=another)
    if status.st_size and not (ours is not None and ours.match(_begin(path))):
        what = "" if ours is None else f", and {option} did not write it"
        raise ConfigError(f"{path} exists already{what}.", hint=f"{another} Or move this one away.")


PICTURE, VIDEO = ".png", ".mp4"
"""How files end that show what a model has made."""


def partial_of(path: Path) -> Path:
    """What a file is called until it is whole; the ending may say in which format it is written."""
    return path.with_name(f".{path.name}")


def _begin(path: Path) -> bytes:
    with suppress(OSError), path.open("rb") as file:
        return file.read(1 << 12)
    return b""


def write_output(
    path: Path,
    content: bytes,
    option: str,
    *,
    ours: re.Pattern[bytes] | None = None,
    inputs: Iterable[Path] = (),
) -> None:
    """Write a whole file or none, where :func:`require_place` finds nothing to lose.

    Raises:
        ConfigError: something would be lost.
        EnvironmentFault: the disk is full, or the folder may not be written.
    """
    require_place(path, option, ours=ours, inputs=inputs)
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".vfun-{token_hex(8)}")
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            fsync(file.fileno())  # a full disk may say so only now
        partial.replace(target)
    except OSError as error:
        raise EnvironmentFault(
            f"{path} cannot be written: {error.strerror or error}.", hint=f"Name another file with {option}."
        ) from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
