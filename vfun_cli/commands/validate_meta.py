"""``vfun validate-meta``: every row checked, all problems at once."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vfun_cli import console, families
from vfun_cli.commands.flags import Debug, Demo, Json, typed_path
from vfun_cli.config.options import parse
from vfun_cli.config.resolve import resolve, root_of_set, setting
from vfun_cli.demo import default as demo_default
from vfun_cli.errors import ConfigError, MetadataError
from vfun_cli.files import require_place

if TYPE_CHECKING:
    from vfun_cli.metadata.checks import Report


def validate_meta(
    meta: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[META]...",
            show_default=False,
            help="Metadata file or a folder of media, or several; by default $DATASET_META_NAME or vfun.toml's.",
        ),
    ] = None,
    family: Annotated[
        str | None,
        typer.Option(
            "--family",
            show_default=False,
            help="Check what this family needs; without it, only what every family needs.",
        ),
    ] = None,
    data_root: Annotated[
        Path | None,
        typer.Option(
            "--data-root",
            "--train-data-dir",
            parser=typed_path,
            metavar="PATH",
            show_default=False,
            help="Folder that the paths in a file start from. [default: $DATASET_NAME, or META's folder]",
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            "--video-sample-stride",
            min=1,
            metavar="N",
            show_default=False,
            help="Check that clips are long enough at this stride.",
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--pretrained-model-name-or-path",
            parser=typed_path,
            metavar="PATH",
            show_default=False,
            help="With --family: the model whose tokenizer tells which captions are too long. "
            "[default: as train would take it]",
        ),
    ] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Decode every frame and all sound, not only headers.", show_default=False)
    ] = False,
    deep_timeout: Annotated[
        float,
        typer.Option(
            "--deep-timeout", min=0, max=86_400, metavar="SECONDS", help="Seconds that --deep gives to each file."
        ),
    ] = 60.0,
    fix: Annotated[
        Path | None,
        typer.Option(
            "--fix",
            parser=typed_path,
            metavar="OUT",
            show_default=False,
            help="Write a corrected copy without the bad rows, and say what was changed; no file is overwritten.",
        ),
    ] = None,
    problems: Annotated[
        Path | None,
        typer.Option(
            "--problems",
            parser=typed_path,
            metavar="FILE",
            show_default=False,
            help="Write all problems to a file as JSON lines; replaces only such a file.",
        ),
    ] = None,
    max_bad: Annotated[
        int, typer.Option("--max-bad", min=0, metavar="N", help="Bad rows that are still no error.")
    ] = 0,
    explain: Annotated[
        str | None,
        typer.Option("--explain", metavar="CODE", show_default=False, help="Explain a problem code, or 'all' of them."),
    ] = None,
    demo: Demo = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Check every row of the metadata, or every clip of a folder, against its files, and report all problems at once.

    Rows are counted from 0.

    Examples: [bold]vfun validate-meta clips/[/bold] · [bold]vfun validate-meta[/bold] ·
    [bold]vfun validate-meta metadata.json --family wan-s2v --deep[/bold] ·
    [bold]vfun validate-meta metadata.json --fix better.json[/bold]
    """
    from rich.text import Text

    from vfun_cli.metadata.fix import write_fixed
    from vfun_cli.metadata.report import (
        PROBLEMS,
        codes_json,
        render,
        render_code,
        render_fixed,
        to_json,
        write_problems,
    )

    if explain is not None:
        if json:
            console.print_json(codes_json(explain))
        else:
            render_code(explain, console.out)
        return
    given = {
        "train_data_meta": meta or None,
        "train_data_dir": data_root,
        "video_sample_stride": stride,
        "pretrained_model_name_or_path": model,
    }
    typed = {name: value for name, value in given.items() if value is not None}
    if problems is not None:
        require_place(problems, "--problems", ours=PROBLEMS)
    if fix is not None:
        require_place(fix, "--fix")
    reports = _check(family, typed, demo=demo, deep_timeout=deep_timeout if deep else None)
    if len(reports) > 1 and (fix is not None or problems is not None):
        option = "--fix" if fix is not None else "--problems"
        raise ConfigError(
            f"{option} writes about one data set, and there are {len(reports)}.",
            hint=f"Name one of them: {', '.join(str(report.metadata.path) for report in reports)}.",
        )
    if problems is not None:
        write_problems(reports[0], problems)
    if not json:
        for report in reports:
            if len(reports) > 1:
                console.out.print(Text(f"{report.metadata.path}", "bold"), soft_wrap=True)
            render(report, console.out)
    fixed = None if fix is None else write_fixed(reports[0], fix)
    if json:
        found = [to_json(report, fixed) for report in reports]
        console.print_json(found[0] if len(found) == 1 else {"sets": found})
    elif fixed is not None:
        render_fixed(fixed, console.err)
    whole_file = any(problem.row is None for report in reports for problem in report.errors)
    if whole_file or sum(len(report.bad_rows) for report in reports) > max_bad:
        raise typer.Exit(MetadataError.exit_code)


def _check(family: str | None, given: dict[str, Any], *, demo: bool, deep_timeout: float | None) -> "list[Report]":
    """One report for each data set."""
    from vfun_cli.plan.rows import check_rows, check_rows_of_any_family
    from vfun_cli.plan.sets import one_by_one

    if family is not None:
        spec = families.find(family)
        resolved = resolve("train", spec, given, demo=demo_default.make(spec) if demo else None)
        return [check_rows(each, spec, deep_timeout=deep_timeout) for each in one_by_one(resolved.config)]
    if demo:
        raise ConfigError("--demo needs to know which family's demo.", hint="Add --family wan-s2v.")
    typed = parse("train_data_meta", given.get("train_data_meta"), "META")
    sets = typed or setting("train_data_meta", os.environ, Path())
    root = given.get("train_data_dir") or setting("train_data_dir", os.environ, Path())
    if not sets:
        raise ConfigError(
            "no metadata is named.",
            hint="Name a file or folder behind vfun validate-meta, or set DATASET_META_NAME; "
            "with --family, --demo needs none.",
        )
    return [
        check_rows_of_any_family(
            each.meta, root_of_set(each, root, typed="train_data_dir" in given), deep_timeout=deep_timeout
        )
        for each in sets
    ]
