"""Sudden death: some work is killed at every touch of the file system in turn."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.copyfile", "shutil.rmtree")
_REMOVALS = ("os.remove", "os.rmdir")


def lives(work: Callable[[], object], at: int, root: Path) -> bool:
    """Do the work in a child that kills itself at its ``at``-th touch of anything below ``root``; whether it lived."""
    child = os.fork()
    if child == 0:
        left = [at]

        def touch(event: str, arguments: tuple[Any, ...]) -> None:
            below = event in _EVENTS and any(str(root) in str(argument) for argument in arguments)
            if below or (event in _REMOVALS and arguments[-1] != -1):  # rmtree names what it removes below a descriptor
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(touch)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def each_death(
    prepare: Callable[[], object], work: Callable[[], object], after: Callable[[], object], root: Path
) -> int:
    """Kill the work at each of its touches in turn, on a place that is prepared anew; how often it was killed.

    Args:
        after: the next command, and what must hold then; also called once after the work has lived.
    """
    deaths, lived = 0, False
    while not lived:
        prepare()
        lived = lives(work, deaths + 1, root)
        after()
        deaths += not lived
    return deaths
