"""Several processes that share the videos of one command, each on a GPU of its own.

Every one runs the command itself and finds in its environment which part it makes; it says on its stdout, in JSON
lines, how far it is.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import IO

from vfun_cli import children
from vfun_cli.errors import RunError
from vfun_cli.sampling.orders import Tell

SHARE = "_VFUN_SHARE"
"""Which part of how many a process makes, such as ``1/4``."""


def own_share() -> tuple[int, int] | None:
    """The place of this process and how many there are; None for the command itself."""
    stated = os.environ.get(SHARE)
    if stated is None:
        return None
    place, _, count = stated.partition("/")
    return int(place), int(count)


def say_progress(name: str, done: int, total: int) -> None:
    """A ``Tell`` for a part: the command hears it."""
    _say({"name": name, "done": done, "total": total})


def say_made(path: Path) -> None:
    """A video is whole."""
    _say({"made": str(path)})


def _say(message: dict[str, object]) -> None:
    print(json.dumps(message), flush=True)


def run_shares(count: int, *, gpus: bool, tell: Tell) -> Iterator[Path]:
    """Run this command in ``count`` processes; yields each video when it is whole.

    Raises:
        RunError: one failed; the others are ended.
    """
    with tempfile.TemporaryFile() as said, DefaultSelector() as selector:
        processes = [_start(place, count, gpus, said) for place in range(count)]
        try:
            for process in processes:
                assert process.stdout is not None
                selector.register(process.stdout, EVENT_READ, process)
            while selector.get_map():
                for key, _ in selector.select():
                    line = key.fileobj.readline()  # type: ignore[union-attr]
                    if line:
                        yield from _heard(line, tell)
                        continue
                    selector.unregister(key.fileobj)
                    if key.data.wait() != 0:
                        raise _failure(key.data.returncode, said)
        finally:
            for process in processes:
                with suppress(ProcessLookupError):
                    process.terminate()
            for process in processes:
                process.wait()


def _heard(line: bytes, tell: Tell) -> Iterator[Path]:
    message = json.loads(line)
    if "made" in message:
        yield Path(message["made"])
    else:
        tell(message["name"], message["done"], message["total"])


def _start(place: int, count: int, gpus: bool, said: IO[bytes]) -> "subprocess.Popen[bytes]":
    variables = {SHARE: f"{place}/{count}"}
    if gpus:
        visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
        variables["CUDA_VISIBLE_DEVICES"] = visible[place] if visible else str(place)
    argv = children.command("vfun_cli", *sys.argv[1:], variables=variables)
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said, bufsize=0)


def _failure(code: int, said: IO[bytes]) -> RunError:
    """What the process that failed first said, with its own exit code."""
    said.seek(0)
    text = said.read().decode(errors="replace").strip()
    message = next((line for line in text.splitlines() if line.startswith("error: ")), text or f"exit code {code}")
    failed = RunError(f"a process that makes videos has failed: {message.removeprefix('error: ')}")
    failed.exit_code = code if code > 0 else RunError.exit_code
    return failed
