"""Several processes that share the videos of one command, each on a GPU of its own.

Every one runs the command itself, finds in its environment which of the videos are its own, and tells the command on
its stdout, in JSON lines, what happens.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from selectors import EVENT_READ, DefaultSelector
from typing import IO

from vfun_cli import children, console
from vfun_cli.errors import FitError, RunError, VfunError
from vfun_cli.run.memory_errors import memory_line
from vfun_cli.run.messages import preemption_signals
from vfun_cli.sampling.events import SMALLER, Event

SHARE = "_VFUN_SHARE"
"""Which videos a process makes, by their places in the command's list, such as ``0,2,4``."""

AGAIN = "The same command again makes what is not there yet."

Process = subprocess.Popen[bytes]


def own_share() -> list[int] | None:
    """The videos of this process; None for the command itself."""
    stated = os.environ.get(SHARE)
    return None if stated is None else [int(place) for place in stated.split(",")]


def leave_signals() -> None:
    """To the command, which ends its processes: a terminal and a scheduler send them to all of a job at once."""
    for number in (signal.SIGINT, *preemption_signals()):
        signal.signal(number, signal.SIG_IGN)


def tell(event: Event) -> None:
    """Let the command know."""
    print(json.dumps(asdict(event)), flush=True)


def run_shares(places: Sequence[int], count: int, *, gpus: bool) -> Iterator[tuple[int, Event]]:
    """Have ``count`` processes make the videos; yields the place of a process and what it tells.

    Raises:
        VfunError: one failed; the others are ended.
    """
    with ExitStack() as stack:
        selector = stack.enter_context(DefaultSelector())
        logs = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(count)]
        processes: list[Process] = []
        stack.callback(_end, processes)
        for number, log in enumerate(logs):
            processes.append(_start(number, places[number::count], log, gpus=gpus))
            selector.register(_stdout(processes[-1]), EVENT_READ, number)
        while selector.get_map():
            for key, _ in selector.select():
                number = key.data
                line = _stdout(processes[number]).readline()
                if line:
                    for event in _events(line):
                        yield number, event
                    continue
                selector.unregister(key.fileobj)
                if processes[number].wait() != 0:
                    raise _failure(number, processes[number].returncode, _text(logs[number]))
        for said in dict.fromkeys(said for log in logs for said in _text(log).splitlines()):  # by all of them: once
            console.err.print(said, soft_wrap=True)


def _start(number: int, places: Sequence[int], log: IO[bytes], *, gpus: bool) -> Process:
    variables = {SHARE: ",".join(map(str, places))}
    if gpus:
        visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
        variables["CUDA_VISIBLE_DEVICES"] = visible[number] if visible else str(number)
    argv = children.command("vfun_cli", *sys.argv[1:], variables=variables)
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, bufsize=0)


def _stdout(process: Process) -> IO[bytes]:
    assert process.stdout is not None
    return process.stdout


def _end(processes: Sequence[Process]) -> None:
    """At once, also in the middle of a step: nothing of theirs is lost but the videos that they are at."""
    for process in processes:
        with suppress(ProcessLookupError):
            process.kill()
    for process in processes:
        process.wait()


def _events(line: bytes) -> Iterator[Event]:
    """What a line tells; nothing, of one that another library or the end of the command has printed."""
    with suppress(ValueError, TypeError):
        yield Event(**json.loads(line))


def _text(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read().decode(errors="replace").strip()


def _failure(number: int, code: int, said: str) -> VfunError:
    """What ended a process, from its exit code and its last words."""
    ended = f"process {number}, which makes a part of the videos,"
    if code < 0:
        name = signal.Signals(-code).name
        if code == -signal.SIGKILL or memory_line(said):
            return FitError(f"{ended} was ended by {name}: the host probably ran out of memory.", hint=SMALLER)
        return RunError(f"{ended} was ended by {name}.", hint=AGAIN)
    words = [line for line in said.splitlines() if line.strip()] or ["it said nothing"]
    told = next((line.removeprefix("error: ") for line in words if line.startswith("error: ")), words[-1])
    failed = RunError(f"{ended} failed: {told.rstrip('.')}.", hint=AGAIN)
    failed.exit_code = code
    return failed
