"""Decoding every frame of every file in processes that can be killed: decoders hang and crash on broken files."""

import os
import subprocess
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from vfun_cli import children
from vfun_cli.devices import cpu_cores
from vfun_cli.metadata.facts import Failure
from vfun_cli.metadata.remembered import OnProgress, remembered

Kind = Literal["visual", "audio"]


@dataclass(frozen=True, kw_only=True)
class DeepFacts:
    """A file that could be decoded to its end."""

    frames: int
    """Video frames; for sound, samples."""


def decode_many(
    wanted: Iterable[tuple[str, Kind]],
    *,
    timeout: float = 60.0,
    threads: int | None = None,
    cache: Path | None = None,
    progress: OnProgress | None = None,
) -> dict[tuple[str, str], DeepFacts | Failure]:
    """Decode each (path, kind) once, in one killable process per CPU; ``timeout`` is in seconds a file."""
    keys = list(dict.fromkeys(wanted))
    with _Workers(timeout) as workers:
        found = remembered(
            [(path, f"deep-{kind}") for path, kind in keys],
            workers.decode,
            to_text=str,
            from_text=str,
            cache=cache,
            threads=threads or cpu_cores(),
            progress=progress,
        )
    return {key: _unpack(found[key[0], f"deep-{key[1]}"]) for key in keys}


def _unpack(answer: str) -> DeepFacts | Failure:
    """``120`` is a number of frames, ``decode-error|why`` a failure."""
    if answer.isdigit():
        return DeepFacts(frames=int(answer))
    code, _, message = answer.partition("|")
    return Failure(code=code, message=message)


class _Workers:
    """One decoding process per calling thread, started when needed and killed when it takes too long."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._own = threading.local()
        self._all: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._all:
            self._kill(process)

    def decode(self, key: tuple[str, str]) -> str:
        """The answer for one file, see ``_unpack``."""
        path, kind = key
        process = self._process()
        try:
            children.ask(process, [path, kind.removeprefix("deep-")])
            answer = children.answer(process, self._timeout)
        except TimeoutError:
            self._drop(process)
            return f"decode-timeout|decoding took longer than {self._timeout:g} s"
        except (EOFError, BrokenPipeError):
            self._drop(process)
            return f"decode-crash|the decoder died (exit status {process.returncode})"
        return answer.decode("utf-8", "replace")

    def _process(self) -> subprocess.Popen[bytes]:
        process: subprocess.Popen[bytes] | None = getattr(self._own, "process", None)
        if process is None or process.poll() is not None:
            process = children.answering("vfun_cli.metadata.decoder")
            self._own.process = process
            self._all.append(process)
            self._read_ready(process)
        return process

    def _read_ready(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for the imports: they do not count against a file's time."""
        assert process.stdout is not None
        while (piece := os.read(process.stdout.fileno(), 1)) not in (b"\n", b""):
            assert piece

    def _drop(self, process: subprocess.Popen[bytes]) -> None:
        self._kill(process)
        self._all.remove(process)
        self._own.process = None

    @staticmethod
    def _kill(process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
