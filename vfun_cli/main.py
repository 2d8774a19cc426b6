"""The vfun command: the Typer app and the boundary where errors become messages and exit codes."""

import os
import sys
from collections.abc import Sequence
from copy import copy
from typing import Annotated, Any

import typer
import typer.main

from vfun_cli import __version__, console
from vfun_cli.commands import (
    acceptance,
    cache,
    checkpoints,
    export,
    fetch,
    generate,
    import_script,
    make_control,
    make_meta,
    plan_buckets,
    report,
    resume,
    train,
    validate_meta,
)
from vfun_cli.commands.help import ASKING, Command, Group, names_of
from vfun_cli.commands.signature import hyphenate
from vfun_cli.disks.abilities import fault
from vfun_cli.errors import (
    EXIT_CLOSED_PIPE,
    ConfigError,
    EnvironmentFault,
    FitError,
    Interrupted,
    RunError,
    VfunError,
    first_line,
)

UsageError: Any = typer.BadParameter.__base__
"""What Typer raises for a line that it cannot take; of its errors only the one below this has a public name."""

COMPLETION = "_VFUN_COMPLETE"
"""Environment variable of a shell that asks for completions."""

app = typer.Typer(
    name="vfun",
    cls=Group,
    help="Fine-tune video diffusion transformers: check the data, see the plan, train, resume, export.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": sorted(ASKING)},
)

app.command("validate-meta", cls=Command, rich_help_panel="Data")(validate_meta.validate_meta)
app.command("make-meta", cls=Command, rich_help_panel="Data")(make_meta.make_meta)
app.command("make-control", cls=Command, rich_help_panel="Data")(make_control.make_control)
app.command("plan-buckets", cls=Command, rich_help_panel="Data")(plan_buckets.plan_buckets)
app.command("import", cls=Command, rich_help_panel="Data")(import_script.import_script)
app.command("fetch", cls=Command, rich_help_panel="Data")(fetch.fetch)
app.command("cache", cls=Command, rich_help_panel="Data")(cache.cache)
app.command("train", cls=Command, rich_help_panel="Run")(train.train)
app.command("lora", cls=Command, rich_help_panel="Run")(train.lora)
app.command("resume", cls=Command, rich_help_panel="Run")(resume.resume)
app.command("export-bf16", cls=Command, rich_help_panel="Out")(export.export_bf16)
app.command("report", cls=Command, rich_help_panel="Out")(report.report)
app.command("generate", cls=Command, rich_help_panel="Out")(generate.generate)
app.command("acceptance", cls=Command, rich_help_panel="Out")(acceptance.acceptance)
app.add_typer(checkpoints.app, name="checkpoints", rich_help_panel="Out")


def _version(ctx: typer.Context, asked: bool) -> None:
    if not asked:
        return
    if ctx.obj:
        console.print_json({"version": __version__})
    else:
        console.out.print(f"vfun {__version__}")
    raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version.", show_default=False),
    ] = False,
) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command to its exit code; ``--video_sample_size`` and ``--video-sample-size`` are the same option.

    Every way to fail ends here: as one message on stderr and, with ``--json``, as one object on stdout.

    Raises:
        SystemExit: always.
    """
    console.never_fail()
    arguments = hyphenate(sys.argv[1:] if argv is None else argv)
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    as_json, printed = "--json" in own, console.json_objects()
    if as_json and ASKING & set(own):
        arguments.remove("--json")  # a group of commands has no such option, its help has
    try:
        code, raised = _run(arguments, as_json=as_json)
        error = None if raised is None else _known(raised)
        if raised is not None and "--debug" in own:
            console.trace(raised)
        if error is not None:
            console.report(error)
        if as_json and console.json_objects() == printed:
            console.print_json({"error": _described(error)} if error else {"exit_code": code})
        console.flush()
    except console.OutputClosed:
        code = EXIT_CLOSED_PIPE
    except EnvironmentFault as unwritable:  # stdout
        console.report(unwritable)
        code = unwritable.exit_code
    raise SystemExit(code)


def _run(arguments: Sequence[str], *, as_json: bool) -> tuple[int, BaseException | None]:
    """The exit code of a command, and what ended it if it did not end by itself."""
    if COMPLETION in os.environ:
        app(prog_name="vfun")  # a shell asks how the line could go on; ends the process
    command = typer.main.get_command(_asked(arguments))
    try:
        with command.make_context("vfun", list(arguments), obj=as_json) as ctx:
            command.invoke(ctx)
        return 0, None
    except typer.Exit as ended:
        return ended.exit_code, None
    except UsageError as error:
        nothing_typed = not error.format_message()  # its help was shown
        return ConfigError.exit_code, None if nothing_typed else error
    except (Exception, KeyboardInterrupt) as error:
        return _known(error).exit_code, error


def _asked(arguments: Sequence[str]) -> typer.Typer:
    """The app with the command that was typed alone: to make the options of all takes 30 of a start's 270 ms."""
    alone, typed = copy(app), arguments[0] if arguments else None
    alone.registered_commands = [command for command in app.registered_commands if command.name == typed]
    alone.registered_groups = [group for group in app.registered_groups if group.name == typed]
    return alone if alone.registered_commands or alone.registered_groups else app


def _known(error: BaseException) -> VfunError:
    """What ended a command as one of our errors."""
    match error:
        case VfunError():
            return error
        case UsageError():
            ctx, parameter = getattr(error, "ctx", None), getattr(error, "param", None)
            option = getattr(error, "option_name", None) or (names_of(parameter)[0] if parameter else None)
            message, command = error.format_message().rstrip("."), ctx.command_path.split()[1:] if ctx else []
            help_of_it = f"vfun {' '.join([*command, '--help'])}"
            return ConfigError(f"{message[:1].lower()}{message[1:]}.", hint=help_of_it, option=option)
        case KeyboardInterrupt():
            return Interrupted("interrupted.")
        case OSError():
            return fault(error)
        case MemoryError():
            return FitError("this takes more memory than the machine has.", hint="Make what was asked for smaller.")
    return RunError(
        f"unexpected {type(error).__name__}: {first_line(error)}.",
        hint="This is a fault of vfun. The same command with --debug shows where; please report that.",
    )


def _described(error: VfunError) -> dict[str, Any]:
    """For programs."""
    option = error.option if isinstance(error, ConfigError) else None
    return {"exit_code": error.exit_code, "message": error.message, "hint": error.hint, "option": option}


if __name__ == "__main__":
    main()
