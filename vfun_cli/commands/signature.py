"""Command signatures made from the declarations in ``config``: each option is written once."""

import functools
import inspect
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer

from vfun_cli import console
from vfun_cli.config.options import IGNORED_FLAGS, Opt, default_of, options
from vfun_cli.config.strategies import STRATEGY_FLAGS
from vfun_cli.disks.abilities import fault
from vfun_cli.errors import EXIT_INTERRUPTED, ConfigError, RunError, VfunError

Command = Callable[..., None]


def hyphenate(arguments: Sequence[str]) -> list[str]:
    """``--video_sample_size=640`` pasted from an old script becomes ``--video-sample-size=640``.

    An option with a value that is also a switch (``Opt.switch``) gets that value where it stands alone or is negated.
    """
    switches = {_long(name): (opt.switch, opt.choices) for name, (_, _, opt) in options().items() if opt.switch}
    result: list[str] = []
    for position, argument in enumerate(arguments):
        if argument == "--":
            return [*result, *arguments[position:]]
        if not argument.startswith("--"):
            result.append(argument)
            continue
        name, equals, value = argument.partition("=")
        name = name.replace("_", "-")
        negated = name.replace("--no-", "--", 1)
        following = arguments[position + 1] if position + 1 < len(arguments) else ""
        if negated != name and negated in switches:
            name, equals, value = negated, "=", switches[negated][0][0]
        elif not equals and name in switches and following not in switches[name][1]:
            equals, value = "=", switches[name][0][1]
        result.append(name + equals + value)
    return result


def with_options(
    command: str, *, ignored_flags: bool = False, strategies: bool = False
) -> Callable[[Command], Command]:
    """Give a command the options declared for it; the body receives those typed, in ``given``.

    The body's own parameters stay. ``given`` holds option values by name, only those that were typed.
    """

    def decorate(body: Command) -> Command:
        own = [parameter for parameter in inspect.signature(body).parameters.values() if parameter.name != "given"]
        declared = _parameters(command, ignored_flags=ignored_flags, strategies=strategies)

        @functools.wraps(body)
        def run(**values: Any) -> None:
            typed = {name: values.pop(name) for name in [parameter.name for parameter in declared]}
            with_boundary(lambda **rest: body(given=_given(typed), **rest))(**values)

        parameters = [*own, *declared]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def with_boundary(body: Command) -> Command:
    """Errors that a user can act on end as one message and their exit code; ``--debug`` shows the traceback."""

    @functools.wraps(body)
    def run(**values: Any) -> None:
        try:
            body(**values)
        except (VfunError, OSError) as caught:
            error = caught if isinstance(caught, VfunError) else fault(caught)
            if values.get("debug"):
                console.err.print_exception()
            console.report(error)
            if values.get("json"):
                content = {"exit_code": error.exit_code, "message": error.message, "hint": error.hint}
                console.print_json({"error": content})
            raise typer.Exit(error.exit_code) from None
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            console.err.print("interrupted")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except Exception as error:  # a mistake of ours: one message too, and how to tell us
            if values.get("debug"):
                raise
            unexpected = RunError(
                f"unexpected {type(error).__name__}: {error}.",
                hint="This is a fault of vfun. The same command with --debug shows where; please report that.",
            )
            console.report(unexpected)
            raise typer.Exit(unexpected.exit_code) from None

    return run


def _given(typed: dict[str, Any]) -> dict[str, Any]:
    """Typed options only, strategy flags folded into ``strategy``."""
    given = {name: value for name, value in typed.items() if value is not None and value != []}
    flags = {name: STRATEGY_FLAGS[name] for name in STRATEGY_FLAGS if given.pop(name, False)}
    chosen = set(flags.values()) | ({given["strategy"]} if "strategy" in given else set())
    if len(chosen) > 1:
        raise ConfigError(f"more than one strategy was asked for: {', '.join(sorted(chosen))}.", hint="Keep one.")
    if chosen:
        given["strategy"] = chosen.pop()
    for name in IGNORED_FLAGS:
        if given.pop(name, None) is not None:
            console.hint(f"--{name.replace('_', '-')} has no effect: {IGNORED_FLAGS[name]}.")
    return given


def _parameters(command: str, *, ignored_flags: bool, strategies: bool) -> list[inspect.Parameter]:
    found = []
    if strategies:
        for name in STRATEGY_FLAGS:
            found.append(_flag(name, "Processes and machines", _strategy_help(name)))
    for name, (_, kind, opt) in options(command).items():
        found.append(_parameter(name, kind, opt))
    if ignored_flags:
        for name in IGNORED_FLAGS:
            kind = str if name == "config_path" else bool
            declaration = typer.Option(_long(name), hidden=True)
            found.append(_keyword(name, Annotated[kind | None, declaration]))
    return found


def _strategy_help(name: str) -> str:
    if name.startswith("use_"):
        return f"The original scripts' word for --{STRATEGY_FLAGS[name]}."
    return f"Short for --strategy {STRATEGY_FLAGS[name]}."


def _parameter(name: str, kind: Any, opt: Opt) -> inspect.Parameter:
    help_text = opt.help
    if opt.choices:
        help_text += f" One of: {', '.join(opt.choices)}."
    if opt.unit:
        help_text += f" In {opt.unit}."
    default = default_of(name)
    if default not in (None, ()):
        shown = ",".join(default) if isinstance(default, tuple) else default
        help_text += f" [default: {shown}, unless the family says otherwise]"
    if opt.switch is not None:
        help_text += f" {_no(name)} means {opt.switch[0]}."
    variables = " ".join(opt.variables)
    if variables:
        help_text += f" [${variables}]"
    declaration = typer.Option(*_names(name, kind), help=help_text, rich_help_panel=opt.panel, show_default=False)
    return _keyword(name, Annotated[_typer_type(kind), declaration])


def _names(name: str, kind: Any) -> list[str]:
    return [f"{_long(name)}/{_no(name)}"] if kind is bool else [_long(name)]


def _no(name: str) -> str:
    return f"--no-{_long(name)[2:]}"


def _long(name: str) -> str:
    return "--" + name.replace("_", "-")


def _flag(name: str, panel: str, help_text: str) -> inspect.Parameter:
    declaration = typer.Option(
        _long(name), help=help_text, rich_help_panel=panel, hidden=name.startswith("use_"), show_default=False
    )
    return _keyword(name, Annotated[bool | None, declaration])


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _typer_type(kind: Any) -> Any:
    if get_origin(kind) is types.UnionType:
        kind = next(arm for arm in get_args(kind) if arm is not types.NoneType)
    if get_origin(kind) is tuple:
        return list[str] | None
    return {int: int | None, float: float | None, bool: bool | None, str: str | None, Path: Path | None}[kind]
