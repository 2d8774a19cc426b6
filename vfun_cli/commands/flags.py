"""Flags that several commands share, declared once."""

from pathlib import Path
from typing import Annotated

import typer

from vfun_cli.files import at_home

FAMILY_HELP = "Model family, e.g. wan-s2v; without it the families are listed."

Demo = Annotated[
    bool,
    typer.Option(
        "--demo", help="Use the embedded default: a tiny model and dataset made under ./vfun-demo.", show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.", show_default=False)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", show_default=False)]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Show options with their sources, generated files, the exact command and the plan; "
        "write and start nothing.",
        show_default=False,
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete what is already there.", show_default=False)]


def typed_path(text: str) -> Path:
    """What becomes of a path that is no option of a run: ``parser`` of its declaration.

    Raises:
        BadParameter: it is none.
    """
    try:
        return at_home(text)
    except ValueError as error:
        raise typer.BadParameter(f"{error}.") from None


def typed_name(text: str) -> str:
    """The same for what may be a path or a bare name."""
    return str(typed_path(text))
