"""Answers to questions about a step: remembered on disk, otherwise measured in a process of its own."""

import hashlib
import json
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from vfun_cli import __version__, children, devices
from vfun_cli.errors import CheckpointError, ConfigError, RunError, Unforeseen, VfunError
from vfun_cli.forecast.request import Measured, Question
from vfun_cli.run.rundir import write_atomically

FOLDER = Path("~/.cache/vfun/forecasts")
FORMAT = 8
"""Raise it when something is measured otherwise."""
PACKAGES = ("torch", "diffusers", "peft", "deepspeed", "accelerate")
"""On whose versions the answers depend."""
_ERRORS: Mapping[int, type[VfunError]] = {each.exit_code: each for each in (ConfigError, CheckpointError)}


class Measurer:
    """Answers questions; the process that measures is started by the first one whose answer is not known."""

    def __init__(self, *, keeps: bool = True, knows: bool = True) -> None:
        """Of one command.

        Args:
            keeps: whether answers are written to the disk.
            knows: whether those that were are taken from it.
        """
        self.keeps = keeps
        self.knows = knows
        self.process: subprocess.Popen[str] | None = None

    def ask(self, question: Question) -> Measured:
        """The answer.

        Raises:
            ConfigError: options that choose nothing in this model.
            CheckpointError: no model can be made of its configuration.
            RunError: the process has died.
        """
        place = _place(question)
        known = _read(place) if self.knows else None
        if known is not None:
            return known
        measured = self._measure(question)
        if self.keeps and place is not None:
            with suppress(OSError):  # it only spares seconds
                write_atomically(place, json.dumps(asdict(measured)))
        return measured

    def _measure(self, question: Question) -> Measured:
        if self.process is None:
            self.process = subprocess.Popen(
                children.command("vfun_cli.forecast.measuring", variables=_QUIET),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):
            print(json.dumps(question.to_json()), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            _, said = self.process.communicate()
            last = (said.strip().splitlines() or ["it said nothing"])[-1]
            raise RunError(
                f"the process that measures a step ended: {last}.",
                hint="--no-fit-check starts the run without a forecast.",
            )
        answer: dict[str, Any] = json.loads(line)
        if "measured" in answer:
            return Measured.from_json(answer["measured"])
        raise _ERRORS.get(answer["exit_code"], Unforeseen)(answer["error"], hint=answer["hint"])

    def close(self) -> None:
        """End the process, if it was started."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()


_QUIET = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


@contextmanager
def measuring(*, keeps: bool = True, knows: bool = True) -> Iterator[Measurer]:
    """A measurer that goes with the block. ``keeps``, ``knows``: see there."""
    measurer = Measurer(keeps=keeps, knows=knows)
    try:
        yield measurer
    finally:
        measurer.close()


def _place(question: Question) -> Path | None:
    """The file of an answer; None for a user without a home."""
    asked = json.dumps([FORMAT, __version__, _versions(), question.to_json()], sort_keys=True)
    try:
        folder = FOLDER.expanduser()
    except RuntimeError:
        return None
    return folder / f"{hashlib.sha256(asked.encode()).hexdigest()[:32]}.json"


@cache
def _versions() -> dict[str, str]:
    return devices.installed_versions(PACKAGES)


def _read(place: Path | None) -> Measured | None:
    if place is None:
        return None
    try:
        return Measured.from_json(json.loads(place.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None
