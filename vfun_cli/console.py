"""The two consoles: results on stdout, everything said about the work on stderr."""

import json
import sys
from typing import Any

from rich.console import Console
from rich.markup import escape

from vfun_cli.errors import VfunError

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


_printed: list[int] = []


def json_objects() -> int:
    """How many JSON objects this process has printed."""
    return len(_printed)


def print_json(content: dict[str, Any]) -> None:
    """One JSON object with the schema number on stdout."""
    _printed.append(len(content))
    json.dump({"schema": 1, **content}, sys.stdout, ensure_ascii=False)
    sys.stdout.write("\n")


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
