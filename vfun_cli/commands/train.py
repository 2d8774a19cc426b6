"""``vfun train`` and ``vfun lora``: the same command with and without adapters."""

from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from vfun_cli import console, families
from vfun_cli.commands import emitting
from vfun_cli.commands.emitting import Emit, GpusPerNode, Grace, TimeLimit
from vfun_cli.commands.flags import FAMILY_HELP, Debug, Demo, DryRun, Json, Overwrite, typed_name
from vfun_cli.commands.signature import with_options
from vfun_cli.config.originals import settle
from vfun_cli.config.resolve import resolve
from vfun_cli.demo import default as demo_default
from vfun_cli.errors import ConfigError
from vfun_cli.launch.emit import Wishes
from vfun_cli.launch.joining import first_of_machine
from vfun_cli.launch.preemption import nothing_to_save

Family = Annotated[str | None, typer.Argument(metavar="FAMILY", help=FAMILY_HELP, show_default=False)]


@with_options("train", choosing_flags=True)
def train(
    given: dict[str, Any],
    originals: dict[str, str | bool],
    family: Family = None,
    demo: Demo = False,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    emit: Emit = None,
    gpus_per_node: GpusPerNode = None,
    time_limit: TimeLimit = None,
    grace: Grace = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Fine-tune all weights of a model, or those that --trainable-modules names.

    Examples: [bold]vfun train wan-s2v --fsdp[/bold] · [bold]vfun train wan-s2v --fsdp --demo[/bold] ·
    [bold]vfun train wan-s2v --zero3 --dry-run[/bold] · [bold]vfun train wan-s2v --nodes 4 --emit slurm[/bold]
    """
    file = emitting.asked(emit, gpus_per_node, time_limit, grace, dry_run=dry_run, overwrite=overwrite)
    _run("train", family, given, originals, file, demo=demo, dry_run=dry_run, overwrite=overwrite, as_json=json)


@with_options("lora", choosing_flags=True)
def lora(
    given: dict[str, Any],
    originals: dict[str, str | bool],
    family: Family = None,
    demo: Demo = False,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    emit: Emit = None,
    gpus_per_node: GpusPerNode = None,
    time_limit: TimeLimit = None,
    grace: Grace = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train LoRA adapters on a frozen model.

    Examples: [bold]vfun lora cogvideox-fun[/bold] · [bold]vfun lora wan-s2v --rank 32 --fsdp[/bold] ·
    [bold]vfun lora cogvideox-fun --demo[/bold]
    """
    file = emitting.asked(emit, gpus_per_node, time_limit, grace, dry_run=dry_run, overwrite=overwrite)
    _run("lora", family, given, originals, file, demo=demo, dry_run=dry_run, overwrite=overwrite, as_json=json)


def _run(
    command: str,
    family: str | None,
    given: dict[str, Any],
    originals: dict[str, str | bool],
    file: Wishes | None,
    *,
    demo: bool,
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    if family is None:
        _list_families(command, as_json=as_json)
        raise typer.Exit(ConfigError.exit_code)
    spec = families.find(family)
    with nullcontext(True) if file else first_of_machine() as first, nothing_to_save(), ExitStack() as stack:
        if not first:
            return
        from vfun_cli.commands.jobs import emit, show_or_start
        from vfun_cli.launch import resume_check
        from vfun_cli.launch.job import decide
        from vfun_cli.launch.start import refuse_used, taking_part_early
        from vfun_cli.run import locate

        starts, place = not dry_run and file is None, demo_default.FOLDER
        if demo and not starts and not demo_default.is_made(spec):
            place = Path(stack.enter_context(TemporaryDirectory(prefix="vfun-demo-of-a-dry-run-")))
        layer = demo_default.make(spec, place) if demo else None
        if file is None:
            resolved = resolve(command, spec, given, demo=layer, starts=True)
        else:
            resolved = emitting.resolved(file, command, spec, given, demo=layer)
        for notice in settle(originals, spec, resolved.config):
            console.hint(notice)
        part = stack.enter_context(taking_part_early(command, resolved.config, dry_run=not starts))
        name, folder = resolved.config.resume_from_checkpoint, resolved.config.output_dir
        found, earlier = None, None
        if name is not None:  # as the original scripts have it: the command line's options are the run's
            found = locate.to_resume(typed_name(name), output_dir=folder)
            if found is not None:
                earlier = resume_check.earlier_run(found)
                resolved = resume_check.continuation(earlier, command, spec, resolved)
            else:
                console.hint(f"There is no checkpoint in {folder} yet: the run begins anew.")
        if not dry_run:
            refuse_used(resolved.config, found, overwrite=overwrite)  # now: checking the rows may take minutes
        job = decide(command, spec, resolved, found=found, dry_run=not starts)
        if earlier is not None:
            job = resume_check.with_same_contents(earlier, job)
        if place != demo_default.FOLDER:  # shown is where the demo of a real run will be
            job = replace(job, resolved=replace(job.resolved, config=job.config.moved(place, demo_default.FOLDER)))
        if file is not None:
            if place != demo_default.FOLDER:
                console.hint(f"The demo's files are not there yet: vfun validate-meta --family {spec.name} --demo")
            emit(job, file, as_json=as_json)
            return
        code = show_or_start(job, dry_run=dry_run, overwrite=overwrite, as_json=as_json, part=part)
    raise typer.Exit(code)


def _list_families(command: str, *, as_json: bool) -> None:
    summaries = {spec.name: spec.summary for spec in families.FAMILIES.values()}
    if as_json:
        console.print_json({"families": summaries})
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    for name, summary in summaries.items():
        table.add_row(Text(name, "bold"), summary)
    console.out.print(f"usage: vfun {command} FAMILY [OPTIONS]\n\nFamilies:", table)
    console.hint("--help after a family lists the options; --demo tries a family out on a tiny model.")
