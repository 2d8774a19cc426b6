"""``metrics.jsonl``: one JSON object a line, written as the run goes. It only reports: nothing in it stops a run.

A kill, a full disk or a power cut may leave half a line, bytes that are no text, or zeros. Readers pass over what is no
record; a run that goes on drops it.
"""

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Any

from vfun_cli.disks.abilities import fsync
from vfun_cli.errors import first_line


def parse(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None if it is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """What a file holds, in order; none where it cannot be read."""
    with suppress(OSError), path.open("rb") as file:
        yield from (record for line in file if (record := parse(line)) is not None)


class MetricsFile:
    """The file, open for more. What cannot be written is told once and left out."""

    def __init__(self, path: Path, *, last_step: int = 0) -> None:
        """Open it to write what comes after ``last_step``."""
        self.path = path
        self.torn = False
        """Whether the last line is only begun."""
        self.told = False
        self.file: int | None = None
        with only_reports(f"{path} cannot be shortened to step {last_step}"):
            _keep_steps(path, last_step)
        with self._only_reports():
            self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def write(self, record: dict[str, Any]) -> None:
        """One more line: strict JSON, in which what is no finite number is null."""
        if self.file is None:
            return
        line = b"\n" * self.torn + json.dumps(_finite(record), allow_nan=False).encode() + b"\n"
        self.torn = True
        with self._only_reports():
            self.torn = os.write(self.file, line) < len(line)

    def close(self) -> None:
        """No more lines come."""
        if self.file is not None:
            os.close(self.file)
            self.file = None

    @contextmanager
    def _only_reports(self) -> Iterator[None]:
        with only_reports(f"{self.path} cannot be written", told=self.told) as failed:
            yield
        self.told |= bool(failed)


@contextmanager
def only_reports(what: str, *, told: bool = False) -> Iterator[list[Exception]]:
    """A block whose failure is said and costs no more than the report.

    Args:
        what: cannot be done then.
        told: whether that was said already.
    """
    failed: list[Exception] = []
    try:
        yield failed
    except Exception as error:
        failed.append(error)
        if not told:
            _warn(f"{what}: {first_line(error)}. The run goes on without")


def _keep_steps(path: Path, last_step: int) -> None:
    """Drop the records of later steps, which the run writes again, and what is no record."""
    if not path.exists():
        return
    shorter = path.with_name(f".{path.name}.{token_hex(8)}")
    dropped = 0
    try:
        with path.open("rb") as old, shorter.open("wb") as new:
            for line in old:
                record = parse(line)
                dropped += record is None
                if record is not None and record["step"] <= last_step:
                    new.write(line.rstrip(b"\r\n") + b"\n")
            new.flush()
            fsync(new.fileno())
        shorter.replace(path)
    finally:
        shorter.unlink(missing_ok=True)
    if dropped:
        _warn(f"{dropped} damaged lines of {path} were dropped")


def _warn(text: str) -> None:
    print(f"warning: {text}.", file=sys.stderr, flush=True)


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None
