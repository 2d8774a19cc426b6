"""The vfun command: the Typer app and the boundary where errors become messages and exit codes."""

import sys
from typing import Annotated

import typer

from vfun_cli import __version__, console
from vfun_cli.commands import cache, checkpoints, export, plan_buckets, resume, train, validate_meta
from vfun_cli.commands.signature import hyphenate

app = typer.Typer(
    name="vfun",
    help="Fine-tune video diffusion transformers: check the data, see the plan, train, resume, export.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("validate-meta", rich_help_panel="Data")(validate_meta.validate_meta)
app.command("plan-buckets", rich_help_panel="Data")(plan_buckets.plan_buckets)
app.command("cache", rich_help_panel="Data")(cache.cache)
app.command("train", rich_help_panel="Run")(train.train)
app.command("lora", rich_help_panel="Run")(train.lora)
app.command("resume", rich_help_panel="Run")(resume.resume)
app.command("export-bf16", rich_help_panel="Out")(export.export_bf16)
app.add_typer(checkpoints.app, name="checkpoints", rich_help_panel="Out")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"vfun {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main(argv: list[str] | None = None) -> None:
    """Entry point: ``--video_sample_size`` and ``--video-sample-size`` are the same option."""
    console.never_fail()
    arguments = sys.argv[1:] if argv is None else argv
    printed = console.json_objects()
    try:
        app(args=hyphenate(arguments), prog_name="vfun")
    except SystemExit as ended:
        if ended.code and "--json" in arguments and console.json_objects() == printed:
            console.print_json({"error": {"exit_code": ended.code, "message": "usage", "hint": "see stderr"}})
        raise


if __name__ == "__main__":
    main()
