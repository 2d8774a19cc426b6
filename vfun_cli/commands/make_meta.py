"""``vfun make-meta``: a folder of media as a metadata file, with what the headers say."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from vfun_cli import console, families
from vfun_cli.commands.flags import Debug, Json, typed_path
from vfun_cli.errors import ConfigError, MetadataError
from vfun_cli.files import require_place, write_output

MOST_TOLD = 10
"""Files of the folder that are told of one by one."""


def make_meta(
    folder: Annotated[
        Path,
        typer.Argument(parser=typed_path, metavar="FOLDER", show_default=False, help="Folder of videos and pictures."),
    ],
    family: Annotated[
        str | None,
        typer.Option(
            "--family",
            show_default=False,
            help="Refuse clips that this family cannot train on; without it, only what no family could.",
        ),
    ] = None,
    audio_from_video: Annotated[
        bool,
        typer.Option(
            "--audio-from-video",
            show_default=False,
            help="Videos without a sound file state themselves as their sound. Nothing is extracted: training reads "
            "the track. A video without one is refused.",
        ),
    ] = False,
    absolute: Annotated[
        bool,
        typer.Option("--absolute", help="Write absolute paths, not paths from FOLDER.", show_default=False),
    ] = False,
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="WORD",
            show_default=False,
            help="json, jsonl or csv. [default: by the suffix of --out, else json]",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            parser=typed_path,
            metavar="FILE",
            show_default=False,
            help="Write a file, whole or not at all, instead of stdout; none is overwritten.",
        ),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a folder of videos and pictures as metadata: their twins, captions, sizes, lengths and frame rates.

    Which files belong together: docs/data.md. Training on the folder and on what this writes is the same.

    Examples: [bold]vfun make-meta clips/ > meta.json[/bold] · [bold]vfun make-meta clips/ --family wan-s2v
    --audio-from-video --absolute --out meta.jsonl[/bold]
    """
    from vfun_cli.metadata.checks import describe
    from vfun_cli.metadata.fix import WRITTEN, format_of, rendered
    from vfun_cli.metadata.make import rows_of, with_absolute_paths, with_sound_of_videos
    from vfun_cli.metadata.records import is_folder, read_metadata, root_of
    from vfun_cli.metadata.report import problem_json
    from vfun_cli.plan.rows import EVERY_FIELD, check_folder

    spec = None if family is None else families.find(family)
    if format not in (None, *WRITTEN):
        raise ConfigError(f"--format is {format!r}; choose one of: {', '.join(WRITTEN)}.", option="--format")
    if not is_folder(folder):
        raise ConfigError(
            f"{folder} is {'no folder' if folder.exists() else 'not there'}.",
            hint="vfun make-meta FOLDER; of a metadata file, vfun validate-meta META --fix OUT fills in what it lacks.",
        )
    kind = format or ("json" if out is None else format_of(out))
    if out is not None:
        require_place(out, "--out")
    metadata = read_metadata(folder)
    report = check_folder(with_sound_of_videos(metadata) if audio_from_video else metadata, spec)
    of_folder = [problem for problem in metadata.problems if problem.severity == "warning"]
    for problem in of_folder[:MOST_TOLD]:
        console.warn(describe(problem))
    if len(of_folder) > MOST_TOLD:
        console.warn(f"{len(of_folder) - MOST_TOLD} more files of the folder are not used.")
    try:
        report.require_ok()
    except MetadataError as error:
        without = shlex.join(["vfun", "validate-meta", str(folder), "--fix", "meta.json"])
        hint = f"Leave them out: {without}" if report.rows else "Name the folder that the clips are in."
        raise MetadataError(error.message, hint=hint) from None
    rows = rows_of(report)
    if absolute:
        fields = {field.name for each in families.FAMILIES.values() for field in each.fields}
        rows = [with_absolute_paths(row, folder, fields | {field.name for field in EVERY_FIELD}) for row in rows]
    content = rendered(rows, kind)
    if out is not None:
        write_output(out, content, "--out")
    if json:
        console.print_json(
            {
                "output": None if out is None else str(out),
                "rows": len(rows),
                "metadata": rows if out is None else None,
                "problems": [problem_json(problem) for problem in report.problems],
            }
        )
    elif out is None:
        console.print_file(content)
    if not absolute and (out is None or root_of(out, None).absolute() != folder.absolute()):
        console.hint(f"Its paths start from the folder: --train-data-dir {shlex.quote(str(folder))}")
