"""``--help``: for people in whole words at any width, for programs as an object."""

import re
import shutil
import textwrap
from typing import Any

import typer
from rich.text import Text
from typer.core import TyperArgument, TyperCommand, TyperGroup

from vfun_cli import console

ASKING = {"--help", "-h"}
WIDEST = 100
"""Columns; longer lines are hard to read."""
NAMES = 28
"""Columns of the names; longer ones have a line of their own."""
INDENT = 2

_MARKUP = re.compile(r"\[/?bold\]")


class _Helpful:
    """Replaces what Typer prints, which cuts long names."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help of the command."""
        if ctx.find_root().obj:  # --json
            console.print_json({"help": _described(self, ctx)})
        else:
            console.out.print(_page(self, ctx), soft_wrap=True)

    def get_help_option(self, ctx: Any) -> Any:
        """Typer's, but that nothing is printed beside our own: it would end in a broken pipe in ``--help | head``."""
        option = super().get_help_option(ctx)  # type: ignore[misc]  # of TyperCommand or TyperGroup, beside this one
        if option is not None:
            option.callback = _show
        return option


def _show(ctx: Any, option: Any, asked: bool) -> None:
    if asked and not ctx.resilient_parsing:
        ctx.get_help()
        raise typer.Exit


class Command(_Helpful, TyperCommand):
    """One command."""


class Group(_Helpful, TyperGroup):
    """Commands under one name."""


def _described(command: Any, ctx: Any) -> dict[str, Any]:
    """All there is to know of a command."""
    return {
        "command": ctx.command_path,
        "text": _plain(command.help),
        "parameters": [
            {"names": names_of(parameter), "takes": _takes(parameter), "help": parameter.help}
            for parameter in _shown(command, ctx)
        ],
        "commands": {name: _plain(one.help).splitlines()[0] for name, one in getattr(command, "commands", {}).items()},
    }


def _page(command: Any, ctx: Any) -> Text:
    """Usage, what the command does, its parameters by panel, its commands."""
    width = min(shutil.get_terminal_size().columns, WIDEST)
    page = Text()
    usage = " ".join([ctx.command_path, "[OPTIONS]", *_positions(command)])
    _append(page, textwrap.fill(f"usage: {usage}", width, subsequent_indent=" " * INDENT, break_on_hyphens=False))
    for paragraph in _plain(command.help).split("\n\n"):
        _append(page, "")
        _append(page, textwrap.fill(" ".join(paragraph.split()), width, break_on_hyphens=False))
    for panel, entries in _panels(command, ctx).items():
        _append(page, "")
        _append(page, panel, "bold")
        for names, text in entries:
            _append_entry(page, names, text, width)
    page.rstrip()
    return page


def _positions(command: Any) -> list[str]:
    """What follows the options in the line of usage."""
    arguments = [parameter for parameter in command.params if isinstance(parameter, TyperArgument)]
    if isinstance(command, TyperGroup):
        return ["COMMAND", "..."]
    names = [(names_of(argument)[0], argument.required) for argument in arguments]
    return [name if required or name.startswith("[") else f"[{name}]" for name, required in names]


def _panels(command: Any, ctx: Any) -> dict[str, list[tuple[str, str]]]:
    """Names and texts under their headings, in the order of their declaration."""
    panels: dict[str, list[tuple[str, str]]] = {}
    for parameter in _shown(command, ctx):
        usual = "Arguments" if isinstance(parameter, TyperArgument) else "Options"
        names = " / ".join(names_of(parameter)) + (f" {taken}" if (taken := _takes(parameter)) else "")
        default = parameter.show_default and parameter.default not in (None, False)
        text = (parameter.help or "") + (f" [default: {parameter.default}]" if default else "")
        panels.setdefault(parameter.rich_help_panel or usual, []).append((names, text))
    for name, one in getattr(command, "commands", {}).items():
        panels.setdefault(one.rich_help_panel or "Commands", []).append((name, _plain(one.help).splitlines()[0]))
    return panels


def _append_entry(page: Text, names: str, text: str, width: int) -> None:
    """Names at the left and the text beside them, or under them where they are long."""
    lines = textwrap.wrap(text, max(width - NAMES - 2 * INDENT, 20), break_on_hyphens=False)
    margin = " " * (NAMES + 2 * INDENT)
    indent = " " * INDENT
    start = textwrap.fill(names, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    page.append(start, "cyan")
    if len(names) <= NAMES:
        page.append(margin[len(start) :])
    else:
        page.append("\n" + margin)
    _append(page, f"\n{margin}".join(lines))


def _append(page: Text, text: str, style: str = "") -> None:
    page.append(text + "\n", style)


def _shown(command: Any, ctx: Any) -> list[Any]:
    return [parameter for parameter in command.get_params(ctx) if not parameter.hidden]


def names_of(parameter: Any) -> list[str]:
    """What is typed for an option, or what stands for an argument."""
    if isinstance(parameter, TyperArgument):
        return [parameter.metavar or parameter.name.upper()]
    return [*parameter.opts, *parameter.secondary_opts]


def _takes(parameter: Any) -> str:
    """The word for the value, nothing for a switch."""
    if isinstance(parameter, TyperArgument) or parameter.is_flag:
        return ""
    return str(parameter.metavar or parameter.name.upper())


def _plain(text: str | None) -> str:
    return _MARKUP.sub("", text or "").strip()
