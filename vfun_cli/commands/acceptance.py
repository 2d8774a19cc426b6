"""``vfun acceptance``: prove it on your GPU."""

from pathlib import Path
from typing import Annotated

import typer

from vfun_cli import console
from vfun_cli.commands.flags import Debug, Json, typed_path
from vfun_cli.errors import ConfigError, RunError
from vfun_cli.launch.preemption import nothing_to_save

DEVICES = ("cuda", "cpu")


def acceptance(
    device: Annotated[
        str, typer.Option("--device", metavar="WORD", help=f"What is proved. One of: {', '.join(DEVICES)}.")
    ] = DEVICES[0],
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="TEXT",
            help="Run the row of this name, or all whose names hold the text, and what they build on; may be repeated.",
            show_default=False,
        ),
    ] = None,
    minutes: Annotated[
        float, typer.Option("--minutes", min=0.1, max=1_440, metavar="NUMBER", help="Run nothing after this time.")
    ] = 8,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            min=1,
            max=64,
            metavar="N",
            help="Rows at a time. [default: by cores and memory]",
            show_default=False,
        ),
    ] = None,
    output_dir: Annotated[
        Path, typer.Option("--output-dir", parser=typed_path, metavar="PATH", help="Where the results go.")
    ] = Path("vfun-acceptance"),
    list_rows: Annotated[bool, typer.Option("--list", help="List the rows and run none.", show_default=False)] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Prove it on your GPU: train the demos, by rows that --list names, and compare their losses with those of the CPU.

    Offline, through the launcher, several at a time. Rows for which the machine lacks something are skipped, with the
    reason. The results are acceptance.json and failures.log; exit code 0 says that all that ran is right.

    Examples: [bold]vfun acceptance[/bold] · [bold]vfun acceptance --only wan-s2v --minutes 3[/bold] ·
    [bold]vfun acceptance --device cpu --minutes 30[/bold]
    """
    if device not in DEVICES:
        raise ConfigError(f"--device is {device!r}; choose one of: {', '.join(DEVICES)}.", option="--device")
    from vfun_cli.acceptance import machine, report
    from vfun_cli.acceptance.rows import all_rows, chosen
    from vfun_cli.acceptance.run import FAILURES, RECORD, prove

    rows = chosen(all_rows(device), only or ())
    if list_rows:
        if json:
            console.print_json({"rows": {row.name: row.proves for row in rows}})
        else:
            console.out.print(report.listed(rows))
        return
    with nothing_to_save():
        pool, found = prove(
            rows, device=device, minutes=minutes, jobs=jobs or machine.jobs(), output_dir=output_dir
        )  # fmt: skip
    if json:
        console.print_json(found)
    else:
        console.out.print(report.summary(rows, pool))
        for reason in report.reasons(rows, pool):
            console.out.print(reason, soft_wrap=True)
        told = ", ".join(f"{count} {kind}" for kind, count in found["counts"].items() if count)
        console.out.print(f"{told} in {found['seconds']} s: {output_dir / RECORD}", soft_wrap=True)
    counts = found["counts"]
    if counts["wrong"]:
        raise RunError(
            f"{counts['wrong']} of {len(rows)} rows are wrong.", hint=f"What they said is in {output_dir / FAILURES}."
        )
    if not any(row.after is not None and pool.verdicts[row.name].kind == "right" for row in rows):  # but demos
        raise RunError("no row ran, so nothing is proved.", hint="Give it more --minutes, or install what it lacks.")
