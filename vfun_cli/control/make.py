"""Making the control clips of a folder: some processes beside one another, each file whole or not at all."""

import json
import subprocess
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from vfun_cli import children
from vfun_cli.control.clips import Clip, statement
from vfun_cli.control.kinds import Settings
from vfun_cli.disks.abilities import fault
from vfun_cli.errors import CheckpointError, RunError, VfunError
from vfun_cli.files import partial_of
from vfun_cli.metadata.opening import absolute

PATIENCE = 120.0
"""Seconds without a frame after which a process is taken to hang; the first one waits for imports and weights too."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """What became of a clip."""

    clip: Clip
    frames: int = 0
    broken: str | None = None
    """Why there is no control clip."""


def make(clips: Iterable[Clip], settings: Settings, workers: int, tell: Callable[[Made], None]) -> None:
    """Make control clips; files that cannot be used are told and keep no other from being made.

    Args:
        tell: gets each when it is finished.

    Raises:
        EnvironmentFault: nothing more can be written.
        CheckpointError: the model cannot be used.
    """
    with _Workers(settings) as processes, ThreadPoolExecutor(workers) as threads:
        waiting = [threads.submit(processes.make, clip) for clip in clips]
        try:
            for done in as_completed(waiting):
                tell(done.result())
        except BaseException:  # Ctrl-C too: no thread waits for a process that goes on
            threads.shutdown(wait=False, cancel_futures=True)
            processes.end()
            raise


class _Workers:
    """One process for each calling thread, started when needed and killed when it hangs."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._statement = settings, str(settings)
        self._own = threading.local()
        self._all: list[subprocess.Popen[bytes]] = []
        self._partials: set[Path] = set()
        self._ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Kill all, and leave no half files."""
        self._ended = True
        for process in list(self._all):
            process.kill()
            process.wait()
        for partial in list(self._partials):
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def make(self, clip: Clip) -> Made:
        """One clip, by the process of this thread.

        Raises:
            VfunError: nothing more can be made.
        """
        partial = partial_of(clip.target)
        self._partials.add(partial)
        try:
            comment = statement(self._statement, clip.source.stat().st_size)
            answer = self._ask([*map(absolute, (clip.source, clip.target, partial)), comment])
        except TimeoutError:
            self._drop()
            answer = {"broken": f"no frame came for {PATIENCE:g} s"}
        except (EOFError, BrokenPipeError):
            self._drop()
            answer = {"broken": "the process that read it died"}
        except OSError as error:
            answer = {"broken": error.strerror or str(error)}
        if "failed" in answer:
            raise _failure(answer)
        if "broken" in answer:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
        self._partials.discard(partial)
        return Made(clip=clip, frames=answer.get("frames", 0), broken=answer.get("broken"))

    def _ask(self, request: list[str]) -> dict[str, Any]:
        process = self._process()
        children.ask(process, request)
        while "frame" in (answer := self._answer(process)):
            pass
        return answer

    def _answer(self, process: "subprocess.Popen[bytes]") -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(children.answer(process, PATIENCE))
        return answer

    def _process(self) -> "subprocess.Popen[bytes]":
        process: subprocess.Popen[bytes] | None = getattr(self._own, "process", None)
        if process is None:
            if self._ended:
                raise EOFError
            process = children.answering("vfun_cli.control.worker")
            self._own.process = process
            self._all.append(process)
            if self._ended:  # meanwhile
                self._drop()
                raise EOFError
            children.ask(process, self._settings.to_json())
            if "failed" in (answer := self._answer(process)):
                raise _failure(answer)
        return process

    def _drop(self) -> None:
        process: subprocess.Popen[bytes] | None = getattr(self._own, "process", None)
        if process is not None:
            process.kill()
            process.wait()
            self._own.process = None


def _failure(answer: dict[str, Any]) -> VfunError:
    if "errno" in answer:
        return fault(OSError(answer["errno"], answer["failed"], answer["path"]))
    if answer.get("exit_code") == CheckpointError.exit_code:
        return CheckpointError(answer["failed"], hint=answer["hint"])
    return RunError(answer["failed"], hint=answer.get("hint"))
