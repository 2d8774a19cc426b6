"""``vfun import``: a launch script of the originals as a vfun command."""

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vfun_cli import children, console
from vfun_cli.commands.flags import Debug, Json, typed_path
from vfun_cli.config.resolve import SETTINGS_FILE
from vfun_cli.errors import ConfigError
from vfun_cli.files import require_place, write_output

if TYPE_CHECKING:
    from vfun_cli.scripts.translate import Translation

COLOURS = {"kept": "green", "translated": "cyan", "without effect": "dim", "differs": "yellow", "refused": "bold red"}


def import_script(
    script: Annotated[
        Path,
        typer.Argument(
            parser=typed_path, metavar="SCRIPT", help="A shell script that starts a training.", show_default=False
        ),
    ],
    family: Annotated[
        str | None,
        typer.Option("--family", help="The model's family, if the script does not tell.", show_default=False),
    ] = None,
    launch: Annotated[
        int | None,
        typer.Option("--launch", min=1, metavar="N", help="Which of several trainings it starts.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            parser=typed_path,
            metavar="FOLDER",
            help=f"Write {SETTINGS_FILE} into this folder; no file is overwritten.",
            show_default=False,
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Run the command with --dry-run; its exit code is this one's.", show_default=False
        ),
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Read a launch script of the original trainers, and print the vfun command, its vfun.toml and what becomes of
    each option. The script is read as text; nothing of it runs.

    Examples: [bold]vfun import train_s2v.sh[/bold] · [bold]vfun import train_s2v.sh --check[/bold] ·
    [bold]vfun import train_control.sh --out .[/bold]
    """
    from vfun_cli.scripts.translate import translate
    from vfun_cli.scripts.write import command_line, toml

    place = None if out is None else out / SETTINGS_FILE
    if place is not None:
        require_place(place, "--out", inputs=[script])
    found = translate(script, family=family, number=launch)
    settings = toml(found)
    checked = None
    if json:
        checked = _check(found, as_json=True) if check and not found.refused else None
        console.print_json(
            {
                "script": str(script),
                "line": found.launch.line,
                "command": found.command,
                "family": found.family,
                "command_line": command_line(found),
                "toml": settings,
                "options": {one.name: one.word.text if one.word else _plain(one.value) for one in found.settings},
                "variables": list(found.variables),
                "environment": {name: word.text for name, word in found.environment.items()},
                "rows": [row.to_json() for row in found.rows],
                "remarks": [vars(remark) for remark in found.remarks],
                "check": None if checked is None else {"exit_code": checked.returncode, "output": checked.stdout},
            }
        )
    else:
        _show(found, command_line(found), settings)
    if place is not None:
        write_output(place, settings.encode(), "--out", inputs=[script])
        console.hint(f"written: {place}")
    if found.refused:
        lines = ", ".join(f"line {row.line}" for row in found.refused if row.line is not None)
        raise ConfigError(
            f"{len(found.refused)} of what {script} asks for vfun does not do{f' ({lines})' if lines else ''}: "
            "the command above goes without.",
            hint="The rows marked refused say why, and what to do.",
        )
    if check and not json:
        checked = _check(found, as_json=False)
    if checked is not None and checked.returncode:
        raise typer.Exit(checked.returncode)


def _plain(value: Any) -> Any:
    from vfun_cli.config.options import plain

    return plain(value)


def _check(found: "Translation", *, as_json: bool) -> "subprocess.CompletedProcess[str]":
    """The command with ``--dry-run``, in a process of its own; for people it prints what it always does.

    Raises:
        ConfigError: the script uses a variable that is not set here.
    """
    from vfun_cli.scripts.write import arguments

    unset = [name for name in found.variables if name not in os.environ]
    if unset:
        raise ConfigError(
            f"{found.script} does not say what {', '.join(f'${name}' for name in unset)} is, and it is not set here.",
            hint="; ".join(f"export {name}=..." for name in unset),
        )
    variables = {name: word.filled_in(os.environ) for name, word in found.environment.items()}
    words = [*arguments(found, os.environ), "--dry-run", *(["--json"] if as_json else [])]
    console.flush()
    return subprocess.run(
        children.command("vfun_cli", *words, variables=variables), text=True, check=False, capture_output=as_json
    )


def _show(found: "Translation", command: str, settings: str) -> None:
    from rich.table import Table
    from rich.text import Text

    out = console.out
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    table.add_column("line", justify="right", no_wrap=True)
    table.add_column("the original", ratio=1, overflow="fold")
    table.add_column("vfun", ratio=1, overflow="fold")
    before = ""
    for row in found.rows:
        name = "" if row.outcome == before else row.outcome
        before = row.outcome
        line = "" if row.line is None else str(row.line)
        same = row.outcome == "kept" and row.original.replace("_", "-") == row.vfun.replace("_", "-")
        table.add_row(
            Text(name, COLOURS[row.outcome]), line, row.original, Text("the same", "dim") if same else row.vfun
        )
    out.print(table)
    for remark in found.remarks:
        out.print(f"line {remark.line}: {remark.what}: {remark.why}", soft_wrap=True)
    out.print(Text(f"\n{SETTINGS_FILE}", "bold"))
    out.print(settings, soft_wrap=True)
    out.print(Text("Command", "bold"))
    out.print(command, soft_wrap=True)
