"""Disks that are full, cannot be written, or lack something: mounted in memory, or imitated."""

import errno
import fcntl
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def file_system(place: Path, *options: str) -> Iterator[Path]:
    """One mounted at this directory with these options; the test is skipped where that is not allowed."""
    if os.geteuid() != 0:
        pytest.skip("mounting takes root")
    place.mkdir(exist_ok=True)
    chosen = ["-o", ",".join(options)] if options else []
    if subprocess.run(["mount", "-t", "tmpfs", *chosen, "tmpfs", str(place)], check=False).returncode:
        pytest.skip("no mounts here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def starts_with_memory_of(size: str) -> list[str]:
    """What starts a command that finds a /dev/shm of this size; the test is skipped where that is not allowed."""
    mount_and_start = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    words = ["unshare", "--mount", "sh", "-c", mount_and_start, "sh"]
    if shutil.which("unshare") is None or subprocess.run([*words, "true"], check=False).returncode:
        pytest.skip("no namespaces of mounts here")
    return words


def fill(folder: Path) -> None:
    """Leave no room on the disk of a folder."""
    with suppress(OSError), (folder / "the rest").open("wb", buffering=0) as rest:
        while True:
            rest.write(b"x" * 4096)


ABILITIES = ("locks", "modes", "times", "folders", "links", "room")
"""What a disk may lack, as lacking.c names it."""


def without(patch: pytest.MonkeyPatch, *abilities: str, code: int = errno.EPERM) -> None:
    """Imitate disks that lack these abilities, in this process and as far as Python is asked."""
    fsync = os.fsync

    def refuse(*arguments: Any, **named: Any) -> None:
        raise OSError(code, os.strerror(code))

    def of_files_alone(file: int) -> None:
        if stat.S_ISDIR(os.fstat(file).st_mode):
            refuse()
        fsync(file)

    calls = {
        "locks": [(fcntl, "flock", refuse), (fcntl, "lockf", refuse)],
        "modes": [(os, "chmod", refuse), (os, "fchmod", refuse)],
        "times": [(os, "utime", refuse)],
        "folders": [(os, "fsync", of_files_alone)],
        "links": [(os, "link", refuse)],
        "room": [(os, "posix_fallocate", refuse)],
    }
    for ability in abilities:
        for module, name, replacement in calls[ability]:
            patch.setattr(module, name, replacement)


def without_in_children(folder: Path, *abilities: str) -> dict[str, str]:
    """Environment of a process whose disks lack these abilities; nothing it does gets past that."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("imitating disks takes a C compiler")
    library = folder / "lacking.so"
    source = Path(__file__).with_name("lacking.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return {"LD_PRELOAD": str(library), "LACKS": ",".join(abilities)}


def make_read_only(place: Path) -> None:
    """From now on nothing can be written to a file system that was mounted here."""
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
