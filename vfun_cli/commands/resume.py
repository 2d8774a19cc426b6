"""``vfun resume``: continue a run exactly."""

from typing import Annotated, Any

import typer

from vfun_cli.commands import defaults
from vfun_cli.commands.flags import Debug, Demo, DryRun, Json, typed_name
from vfun_cli.commands.signature import with_options
from vfun_cli.launch.joining import first_of_machine
from vfun_cli.launch.preemption import nothing_to_save

Run = Annotated[
    str | None,
    typer.Argument(
        parser=typed_name,
        metavar="[RUN | CHECKPOINT]",
        show_default=False,
        help="Run directory or checkpoint; by default the newest checkpoint of the output directory.",
    ),
]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        "--allow",
        metavar="OPTION",
        help="Let this option change although it changes the training; repeat for more.",
        show_default=False,
    ),
]


@with_options("train", choosing_flags=True)
def resume(
    given: dict[str, Any],
    run: Run = None,
    allow: Allow = None,
    demo: Demo = False,
    dry_run: DryRun = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Continue a run from its newest complete checkpoint, with the options it was started with.

    Examples: [bold]vfun resume[/bold] · [bold]vfun resume output_dir/checkpoint-500[/bold] ·
    [bold]vfun resume --learning-rate 1e-5 --allow learning-rate[/bold]
    """
    with first_of_machine() as first, nothing_to_save():
        if not first:
            return
        code = _continue(given, run, allow, demo=demo, dry_run=dry_run, as_json=json)
    raise typer.Exit(code)


def _continue(
    given: dict[str, Any], run: str | None, allow: list[str] | None, *, demo: bool, dry_run: bool, as_json: bool
) -> int:
    from vfun_cli.commands.jobs import show_or_start
    from vfun_cli.launch import resume_check
    from vfun_cli.launch.job import decide
    from vfun_cli.launch.start import refuse_used, taking_part_early
    from vfun_cli.run import locate

    found = locate.checkpoint(run, output_dir=defaults.output_dir(demo=demo))
    earlier = resume_check.earlier_run(found)
    command, spec, resolved = resume_check.resolve_as_before(earlier, given)
    with taking_part_early(command, resolved.config, dry_run=dry_run) as part:
        resolved = resume_check.continuation(earlier, command, spec, resolved, allow=allow or ())
        if not dry_run:
            refuse_used(resolved.config, found)  # now: checking the rows may take minutes
        job = decide(command, spec, resolved, found=found, dry_run=dry_run)
        job = resume_check.with_same_contents(earlier, job, allow or ())
        return show_or_start(job, dry_run=dry_run, overwrite=False, as_json=as_json, part=part)
