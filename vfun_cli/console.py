"""The two consoles: results on stdout, everything said about the work on stderr."""

import io
import json
import sys
from typing import Any

from rich.console import Console
from rich.markup import escape

from vfun_cli.errors import VfunError

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def never_fail() -> None:
    """Write what the encoding of stdout lacks (a bar, an arrow, a caption) as escapes; Python's stderr does so itself.

    For the start of a process: LANG=C, a Windows code page or PYTHONIOENCODING must not end a command.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


_printed: list[int] = []


def json_objects() -> int:
    """How many JSON objects this process has printed."""
    return len(_printed)


def print_json(content: dict[str, Any]) -> None:
    """One JSON object with the schema number on stdout."""
    _printed.append(len(content))
    text = json.dumps({"schema": 1, **content}, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # JSON has escapes of its own: those of never_fail would break it
        text = json.dumps({"schema": 1, **content})
    sys.stdout.write(text + "\n")


def hint(text: str) -> None:
    """A suggestion, on stderr."""
    err.print(f"[dim]{escape(text)}[/dim]", soft_wrap=True)


def warn(text: str) -> None:
    """Something the user should know that does not stop the command."""
    err.print(f"[yellow]warning:[/yellow] {escape(text)}", soft_wrap=True)


def report(error: VfunError) -> None:
    """What, where, why, and the next command."""
    err.print(f"[bold red]error:[/bold red] {escape(error.message)}", soft_wrap=True)
    if error.hint:
        err.print(f"[cyan]next:[/cyan] {escape(error.hint)}", soft_wrap=True)
