"""File systems of their own, in memory: a full one, or one that cannot be written, which even root's writes fail on."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def make_read_only(place: Path) -> None:
    """From now on nothing can be written to a file system that was mounted here."""
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
