"""``vfun report``: a run as one HTML page."""

from pathlib import Path
from typing import Annotated

import typer

from vfun_cli import console
from vfun_cli.commands import defaults
from vfun_cli.commands.flags import Debug, Demo, Json, typed_name, typed_path

Run = Annotated[
    str | None,
    typer.Argument(
        parser=typed_name,
        metavar="[RUN | CHECKPOINT]",
        show_default=False,
        help="Run directory, or one of its checkpoints. [default: the output directory]",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        parser=typed_path,
        metavar="FILE",
        help="File to write. [default: report.html in the run directory]",
        show_default=False,
    ),
]


def report(
    run: Run = None, output: Output = None, demo: Demo = False, json: Json = False, debug: Debug = False
) -> None:
    """Write a page of a run to look at: losses, samples side by side, numbers, the plan, options.

    Works while the run goes on, after it, and after it failed. The page needs no network and no other program than a
    browser; the same command again brings it up to date.

    Examples: [bold]vfun report[/bold] · [bold]vfun report output_dir --output first-run.html[/bold]
    """
    from vfun_cli.files import write_output
    from vfun_cli.report import gather, page
    from vfun_cli.report.media import Media
    from vfun_cli.run import locate

    told = gather.gather(locate.run_directory(run, output_dir=defaults.output_dir(demo=demo)))
    target = output or told.run.report_html
    media = Media(target, page.shown_first(told))
    content = page.render(told, media).encode()
    write_output(target, content, "--output", ours=page.OURS)
    if json:
        console.print_json(
            {
                "report": str(target),
                "run_dir": str(told.run.root),
                "ending": page.ending(told)[0],
                "step": told.last_step,
                "total_steps": told.total_steps,
                "samples": len(told.samples),
                "bytes": len(content),
                "linked": [str(path) for path in media.linked],
            }
        )
        return
    if media.linked:
        console.hint(f"{len(media.linked)} of its pictures and videos are links: keep it where it is.")
    console.out.print(target, soft_wrap=True)
