"""What one process may have at a time: by a lock, or where the disk knows none by a lease.

A lock belongs to an open file. A child process that gets this file as its stdin shares the lock, and so do the
children of that one: it is free when all of them have ended, however they did.

A lease is a numbered file beside the lock's: ``NAME.1``, then ``NAME.2`` and so on. The highest number counts; to take
over is to make the next one, which only one process can. It says who holds it or that it is free, and the holder
changes its first bytes every few seconds. Who is on the same machine looks whether the holder lives, or a process that
has the lock's file as its stdin; who is on another watches the bytes, and no clock of another machine is believed.
"""

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from secrets import token_hex

from vfun_cli import console
from vfun_cli.disks.abilities import LACKS

BEAT = 5.0
"""Seconds between two renewals of a lease."""
SILENCE = 90.0
"""Seconds without one after which a holder on another machine counts as dead; NFS may show a file 60 late."""
LOOK = 0.5
"""Seconds between two looks at another machine's lease."""

_TAKEN = frozenset({errno.EAGAIN, errno.EACCES})
"""How a lock that someone else has is answered; SMB says the second."""
_RECORD = 512
"""Bytes of a holder's description; always as many, so that it can be rewritten on a full disk."""
_BEAT_BYTES = 16
"""Of them, those that change with every beat."""
_FREE = b"free"
"""In place of a holder. Where neither stands, somebody is about to write it or has died of it."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that holds a claim."""

    host: str
    machine: str
    """The boot of the host and the process namespace: where its number means this process."""
    process: int
    started: str
    """When, in ticks since the boot: a later process of the same number has another."""

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"

    @classmethod
    def this(cls) -> "Holder":
        """This process."""
        process = os.getpid()
        return cls(host=socket.gethostname(), machine=_machine(), process=process, started=_started(process) or "")

    @property
    def is_here(self) -> bool:
        """Whether this machine would see the process."""
        return self.machine == _machine()

    @property
    def lives(self) -> bool:
        """Whether the process, which is of this machine, has not ended."""
        return _started(self.process) == self.started


class Taken(Exception):
    """Another process holds the claim, or one that it started does."""

    def __init__(self, holder: Holder | None) -> None:
        super().__init__(str(holder or "an unknown process"))
        self.holder = holder


@contextmanager
def claimed(path: Path) -> Iterator[int]:
    """Hold a claim until the end of the block; yields what to give to a child as its stdin, which is empty.

    Nothing of it stays where the block deletes the file.

    Raises:
        Taken: it is held already.
        OSError: the file cannot be made.
    """
    file, has_lock = _open(path)
    try:
        with nullcontext() if has_lock else _leased(path):
            _describe(file)
            os.lseek(file, 0, os.SEEK_END)
            yield file
    finally:
        os.close(file)


def _open(path: Path) -> tuple[int, bool]:
    """The claim's file, and whether it is locked: False where the disk knows no locks.

    Raises:
        Taken: another process has the lock.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            has_lock = _locked(file, fcntl.LOCK_EX)
            if _is_at(path, file):
                return file, has_lock
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # who held it has deleted it meanwhile


def _is_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False


def share(path: Path) -> None:
    """For a process that works under another's claim: keep it until this one ends, whoever ends first.

    Where it was started by hand there is no claim, and nobody can take one meanwhile.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # stays open
    try:
        if not _locked(file, fcntl.LOCK_SH):
            number, lease = _newest(path)
            if number:
                _start_renewing(lease)
    except Taken:
        os.close(file)  # by those who started this one: its stdin is their file


def _locked(file: int, how: int) -> bool:
    """Whether the disk knows locks.

    Raises:
        Taken: another process has this one.
    """
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            raise Taken(_holder(os.pread(file, _RECORD, 0))) from None
        if error.errno not in LACKS:
            raise
        return False
    return True


# Leases --------------------------------------------------------------------------------------------------------------


@contextmanager
def _leased(path: Path) -> Iterator[None]:
    """Hold the lease until the end of the block.

    Raises:
        Taken: another process has it.
    """
    lease = _take_lease(path)
    done = _start_renewing(lease)
    try:
        yield
    finally:
        done()
        with suppress(OSError):  # then it is found out to be abandoned
            _write(lease, b"\n" + _FREE.ljust(_RECORD - _BEAT_BYTES - 1), _BEAT_BYTES)
            if not path.exists():
                lease.unlink()


def _take_lease(path: Path) -> Path:
    """The file of a lease that is this process's from now on.

    Raises:
        Taken: another process has it.
    """
    while True:
        number, newest = _newest(path)
        if number:
            _require_abandoned(path, newest)
        mine = path.with_name(f"{path.name}.{number + 1}")
        try:
            file = os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            continue
        try:
            _describe(file)
        finally:
            os.close(file)
        found = _leases(path)
        if max(found) == number + 1:  # else the list was an old one, and others have come and gone since
            for older in found.keys() - {number + 1}:
                found[older].unlink(missing_ok=True)
            return mine


def _leases(path: Path) -> dict[int, Path]:
    named = {each.name.removeprefix(f"{path.name}."): each for each in path.parent.iterdir()}
    return {int(number): each for number, each in named.items() if number.isdecimal()}


def _newest(path: Path) -> tuple[int, Path]:
    """The number of the lease that counts and its file; 0 where there was none yet."""
    return max(_leases(path).items(), default=(0, path))


def _require_abandoned(path: Path, lease: Path) -> None:
    """Return when nobody holds the lease.

    Raises:
        Taken: somebody does.
    """
    first = _read(lease)
    holder = _holder(first)
    if holder is not None and not holder.is_here:
        console.hint(f"{path.parent} is held by {holder}, or was until that died; waiting {SILENCE:.0f} s for a sign.")
    until = time.monotonic() + SILENCE
    while time.monotonic() < until:
        now = _read(lease)
        holder = _holder(now)
        if now.partition(b"\n")[2].strip() == _FREE:
            return
        if holder is not None and holder.is_here:
            if holder.lives or _is_stdin_of_any(path):
                raise Taken(holder)
            return
        if now != first:
            raise Taken(holder)
        time.sleep(LOOK)


def _read(lease: Path) -> bytes:
    try:
        return lease.read_bytes()
    except FileNotFoundError:  # somebody has taken over
        return b"\n" + _FREE


def _start_renewing(lease: Path) -> Callable[[], None]:
    """Returns what ends it."""
    done = threading.Event()

    def renew() -> None:
        while not done.wait(BEAT):
            with suppress(OSError):  # the next one may succeed
                _renew(lease)

    def end() -> None:
        done.set()
        thread.join()

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    return end


def _renew(lease: Path) -> None:
    _write(lease, _beat(), 0)


def _write(lease: Path, content: bytes, place: int) -> None:
    file = os.open(lease, os.O_WRONLY)  # opened each time: other machines see what is written when it is closed
    try:
        os.pwrite(file, content, place)
    finally:
        os.close(file)


def _beat() -> bytes:
    return token_hex(_BEAT_BYTES // 2).encode()


def _is_stdin_of_any(path: Path) -> bool:
    """Whether a process of this machine has got the file from who claimed it."""
    wanted = str(path.resolve())
    for link in Path("/proc").glob("[0-9]*/fd/0"):
        with suppress(OSError):  # gone, or another user's
            if str(link.readlink()) == wanted:
                return True
    return False


# Holders -------------------------------------------------------------------------------------------------------------


def _describe(file: int) -> None:
    text = _beat() + b"\n" + json.dumps(asdict(Holder.this())).encode()
    os.pwrite(file, text.ljust(_RECORD), 0)


def _holder(content: bytes) -> Holder | None:
    """Who has written this; None where it is free, empty or half written."""
    try:
        return Holder(**json.loads(content.partition(b"\n")[2]))
    except (ValueError, TypeError):
        return None


def _machine() -> str:
    marks = [socket.gethostname()]
    with suppress(OSError):  # not every sandbox has it
        marks.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with suppress(OSError):
        marks.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(marks)


def _started(process: int) -> str | None:
    """When a process of this machine was started; None if it has ended."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state == "Z" else fields[18]
