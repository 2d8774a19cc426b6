"""Command signatures made from the declarations in ``config``: each option is written once."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import typer

from vfun_cli.config.optimizers import OPTIMIZER_FLAGS
from vfun_cli.config.options import Opt, default_of, options, plain_kind
from vfun_cli.config.originals import FLAGS
from vfun_cli.config.strategies import STRATEGY_FLAGS
from vfun_cli.errors import ConfigError, as_flag
from vfun_cli.families import FAMILIES

Command = Callable[..., None]

CHOOSING_FLAGS: Mapping[str, Mapping[str, str]] = {"strategy": STRATEGY_FLAGS, "optimizer": OPTIMIZER_FLAGS}
"""Flags that stand for a value of an option."""


def hyphenate(arguments: Sequence[str]) -> list[str]:
    """``--video_sample_size=640`` pasted from an old script becomes ``--video-sample-size=640``.

    An option with a value that is also a switch (``Opt.switch``) gets that value where it stands alone or is negated.
    A list may be written with spaces, as the original scripts take it: see :func:`_spaced`.
    """
    switches = {as_flag(name): (opt.switch, opt.choices) for name, (_, _, opt) in options().items() if opt.switch}
    lists = {as_flag(name) for name, (_, kind, _) in options().items() if plain_kind(kind) is tuple}
    result: list[str] = []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        position += 1
        if argument == "--":
            return [*result, *arguments[position - 1 :]]
        if not argument.startswith("--"):
            result.append(argument)
            continue
        name, equals, value = argument.partition("=")
        name = name.replace("_", "-")
        negated = name.replace("--no-", "--", 1)
        following = arguments[position] if position < len(arguments) else ""
        if negated != name and negated in switches:
            name, equals, value = negated, "=", switches[negated][0][0]
        elif not equals and name in switches and following not in switches[name][1]:
            equals, value = "=", switches[name][0][1]
        elif not equals and name in lists and following and not following.startswith("-"):
            more = _spaced(arguments, position)
            result += [part for word in (following, *more) for part in (name, word)]
            position += 1 + len(more)
            continue
        result.append(name + equals + value)
    return result


def _spaced(arguments: Sequence[str], position: int) -> list[str]:
    """What follows the first value of a list up to the next option: ``--trainable_modules "a" "b"``.

    Only where the command's own argument, such as the family, was there before: it could be one of these words.
    """
    own = [word for word in arguments[1:position] if word in FAMILIES] or [*arguments[1:2]]
    if not own or own[0].startswith("-"):
        return []
    return list(takewhile(lambda word: not word.startswith("-"), arguments[position + 1 :]))


def with_options(command: str, *, choosing_flags: bool = False) -> Callable[[Command], Command]:
    """Give a command the options declared for it; the body receives those typed, in ``given``.

    The body's own parameters stay. ``given`` holds option values by name, only those that were typed. A body with a
    parameter ``originals`` takes the original scripts' other flags too, and receives those typed in it.
    """

    def decorate(body: Command) -> Command:
        received = inspect.signature(body).parameters
        own = [parameter for name, parameter in received.items() if name not in ("given", "originals")]
        declared = _parameters(command, choosing_flags=choosing_flags)
        others = [_original_flag(name) for name in FLAGS] if "originals" in received else []

        @functools.wraps(body)
        def run(**values: Any) -> None:
            typed = {parameter.name: values.pop(parameter.name) for parameter in declared}
            flags = {parameter.name: values.pop(parameter.name) for parameter in others}
            if others:
                values["originals"] = {name: value for name, value in flags.items() if value is not None}
            body(given=_given(typed), **values)

        parameters = [*own, *declared, *others]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _given(typed: dict[str, Any]) -> dict[str, Any]:
    """Typed options only, flags that stand for a value of one folded into it."""
    given = {name: value for name, value in typed.items() if value is not None and value != []}
    for option, flags in CHOOSING_FLAGS.items():
        chosen = {value for name, value in flags.items() if given.pop(name, False)}
        chosen |= {given[option]} if option in given else set()
        if len(chosen) > 1:
            raise ConfigError(f"more than one {option} was asked for: {', '.join(sorted(chosen))}.", hint="Keep one.")
        if chosen:
            given[option] = chosen.pop()
    return given


def _parameters(command: str, *, choosing_flags: bool) -> list[inspect.Parameter]:
    found = []
    if choosing_flags:
        for option, flags in CHOOSING_FLAGS.items():
            panel = options()[option][2].panel
            found += [_flag(name, panel, _flag_help(name, f"--{option} {value}")) for name, value in flags.items()]
    for name, (_, kind, opt) in options(command).items():
        found.append(_parameter(name, kind, opt))
    return found


def _original_flag(name: str) -> inspect.Parameter:
    kind = bool if FLAGS[name].switch else str
    return _keyword(name, Annotated[kind | None, typer.Option(as_flag(name), hidden=True)])


def _flag_help(name: str, meant: str) -> str:
    return f"The original scripts' word for {meant}." if name.startswith("use_") else f"Short for {meant}."


def _parameter(name: str, kind: Any, opt: Opt) -> inspect.Parameter:
    help_text = opt.help
    if opt.choices:
        help_text += f" One of: {', '.join(opt.choices)}."
    if opt.unit:
        help_text += f" In {opt.unit}."
    if opt.bounds:
        help_text += f" [{opt.bounds}]"
    default = default_of(name)
    if isinstance(default, bool):
        default = "on" if default else "off"
    if default not in (None, (), ""):
        shown = ",".join(default) if isinstance(default, tuple) else default
        help_text += f" [default: {shown}, unless the family says otherwise]"
    if opt.switch is not None:
        help_text += f" {_no(name)} means {opt.switch[0]}."
    variables = " ".join(opt.variables)
    if variables:
        help_text += f" [${variables}]"
    declaration = typer.Option(
        *_names(name, kind, opt),
        help=help_text,
        metavar="WORD" if opt.choices else _METAVARS.get(plain_kind(kind)),
        rich_help_panel=opt.panel,
        show_default=False,
    )
    return _keyword(name, Annotated[_typer_type(kind), declaration])


_METAVARS = {int: "N", float: "NUMBER", str: "TEXT", Path: "PATH", tuple: "LIST"}
"""What a value is, in the help."""


def _names(name: str, kind: Any, opt: Opt) -> list[str]:
    names = [name, *opt.other_names]
    return [f"{as_flag(each)}/{_no(each)}" if kind is bool else as_flag(each) for each in names]


def _no(name: str) -> str:
    return as_flag(f"no_{name}")


def _flag(name: str, panel: str, help_text: str) -> inspect.Parameter:
    declaration = typer.Option(
        as_flag(name), help=help_text, rich_help_panel=panel, hidden=name.startswith("use_"), show_default=False
    )
    return _keyword(name, Annotated[bool | None, declaration])


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _typer_type(kind: Any) -> Any:
    plain = plain_kind(kind)
    if plain is tuple:
        return list[str] | None
    # A path is text until parse() has made one of it: Typer's would turn an empty one into the working directory.
    return {int: int | None, float: float | None, bool: bool | None, str: str | None, Path: str | None}[plain]
