"""``vfun plan-buckets``: the token-length bucket plan, before any GPU."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vfun_cli import console, families
from vfun_cli.commands.flags import Debug, Demo, Json, typed_path
from vfun_cli.commands.signature import with_options
from vfun_cli.config.checks import check_step
from vfun_cli.config.options import MOST_RANKS, RunConfig
from vfun_cli.config.resolve import HERE, Resolved, is_default, resolve
from vfun_cli.demo import default as demo_default
from vfun_cli.errors import ConfigError, MetadataError
from vfun_cli.families.detect import read_dims_if_there
from vfun_cli.families.spec import FamilySpec

if TYPE_CHECKING:
    from vfun_cli.forecast.fit import Outlook
    from vfun_cli.plan.run_plan import RunPlan
    from vfun_cli.plan.schedule import EpochPlan


@with_options("plan-buckets", choosing_flags=True)
def plan_buckets(
    given: dict[str, Any],
    family: Annotated[str, typer.Argument(metavar="FAMILY", help="Model family, e.g. wan-s2v.", show_default=False)],
    meta: Annotated[
        list[str] | None,
        typer.Option("--meta", metavar="PATH", help="Short for --train-data-meta.", show_default=False),
    ] = None,
    world_size: Annotated[
        int | None,
        typer.Option(
            "--world-size",
            min=1,
            max=MOST_RANKS,
            metavar="N",
            help="Ranks to plan for. [default: as train would run here]",
            show_default=False,
        ),
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", min=1, max=10_000, metavar="N", help="Epochs to plan.")] = 1,
    why_clip: Annotated[
        str | None,
        typer.Option(
            "--why",
            metavar="CLIP",
            help="Explain one clip, from its file to its bucket: a row number (from 0), or the path or name of a file.",
            show_default=False,
        ),
    ] = None,
    plot_to: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            parser=typed_path,
            metavar="PATH",
            help="Draw the plan as an .svg or .png picture.",
            show_default=False,
        ),
    ] = None,
    assignment: Annotated[
        bool,
        typer.Option("--assignment", help="With --json: what each rank trains in each step.", show_default=False),
    ] = False,
    lora: Annotated[
        bool, typer.Option("--lora", help="Plan for vfun lora instead of vfun train.", show_default=False)
    ] = False,
    demo: Demo = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show which clip trains at which size and length on which rank, what each step costs, and whether it fits.

    Without metadata: the size table alone. The training core executes this very plan. Memory and time are forecast for
    the GPUs here, or for those that --memory and --gpu state.

    Examples: [bold]vfun plan-buckets wan-s2v[/bold] · [bold]vfun plan-buckets wan-s2v --meta metadata.json
    --world-size 64[/bold] · [bold]vfun plan-buckets wan-s2v --fsdp --world-size 8 --memory 80GiB --gpu H100[/bold] ·
    [bold]vfun plan-buckets wan-s2v --demo --plot plan.svg[/bold]
    """
    spec = families.find(family)
    if plot_to is not None:
        from vfun_cli.plan.picture import require_picture

        require_picture(plot_to)
    if meta:
        given["train_data_meta"] = meta
    command = "lora" if lora else "train"
    if {"memory", "gpu"} & given.keys():  # of GPUs that need not be here
        given = {"device": "cuda", "num_processes": world_size or 1, **given}
    resolved = resolve(command, spec, given, demo=demo_default.make(spec) if demo else None)
    config, ranks = resolved.config, world_size or resolved.config.num_processes or 1
    check_step(config, ranks)
    model = config.pretrained_model_name_or_path
    if model is not None and not model.is_dir():
        console.hint(f"{model} is not here: planned with the dimensions of the largest {spec.name} release")
    if is_default(resolved.sources["train_data_meta"]) and not any(
        each.meta.exists() for each in config.train_data_meta
    ):
        if why_clip is not None or plot_to is not None:
            raise ConfigError("--why and --plot need clips.", hint="Name the metadata with --meta.")
        _show_sizes(command, spec, resolved, ranks, as_json=json)
        return
    plan, planned = _plan(spec, config, ranks, epochs)
    if plot_to is not None:
        _draw(plan, planned[0], plot_to)
    if why_clip is not None:
        _explain(config, plan, planned, why_clip, as_json=json)
    else:
        _show_plan(command, resolved, plan, planned, assignment=assignment, as_json=json)


def _show_sizes(command: str, spec: FamilySpec, resolved: Resolved, ranks: int, *, as_json: bool) -> None:
    """The size table alone."""
    from vfun_cli.metadata.table import ClipTable
    from vfun_cli.plan.preview import preview
    from vfun_cli.plan.report import plan_json
    from vfun_cli.plan.run_plan import RunPlan
    from vfun_cli.plan.sizes import check_options

    config = resolved.config
    dims = read_dims_if_there(spec, config.pretrained_model_name_or_path)
    plan = RunPlan.of(config, spec, dims, ClipTable.empty(), world_size=ranks)
    check_options(plan.options, spec, dims)  # as a plan of clips would be
    resolved, found = _outlook(command, resolved, plan, None)
    if as_json:
        console.print_json(plan_json(plan) | _forecast_json(found))
    else:
        console.out.print(preview(plan))
        _show_outlook(resolved, found)
        console.hint("Name the metadata with --meta for the plan of its clips.")


def _plan(spec: FamilySpec, config: RunConfig, ranks: int, epochs: int) -> "tuple[RunPlan, list[EpochPlan]]":
    """The plan and its first epochs, from rows that state everything, or else from checked files."""
    from vfun_cli.plan.rows import checked_rows, stated_table, validate_command, validation_table

    try:
        table = stated_table(config, spec) or checked_rows(config, spec).table()
        from vfun_cli.plan.held_out import hold_out  # with numpy: not for rows that are refused
        from vfun_cli.plan.run_plan import RunPlan

        dims = read_dims_if_there(spec, config.pretrained_model_name_or_path)
        table = hold_out(config, spec, dims, table)
        validation = validation_table(config, spec, trust_stated=True)
        plan = RunPlan.of(config, spec, dims, table, world_size=ranks, validation_table=validation)
        plan = replace(plan, num_epochs=max(plan.num_epochs, epochs))
        return plan, list(islice(plan.epochs(), epochs))
    except MetadataError as error:
        raise error.with_command(validate_command(config, spec)) from None


def _draw(plan: "RunPlan", epoch: "EpochPlan", target: Path) -> None:
    from vfun_cli.plan.picture import plot

    plot(target, plan, epoch)
    console.hint(f"wrote {target}")


def _explain(config: RunConfig, plan: "RunPlan", planned: "list[EpochPlan]", clip: str, *, as_json: bool) -> None:
    """One clip, from its file to its bucket."""
    from vfun_cli.metadata.records import find_row
    from vfun_cli.plan.report import why, why_lines
    from vfun_cli.plan.sets import read_rows

    metadata = read_rows(config)
    row = find_row(metadata, clip, [field.name for field in plan.spec.fields])
    story = why(plan, row, planned)
    story["file"] = next(record.fields.get("file_path") for record in metadata.records if record.row == row)
    story["place"] = metadata.place(row)
    if as_json:
        console.print_json(story)
    else:
        console.out.print("\n".join(why_lines(story)), soft_wrap=True)


def _show_plan(
    command: str,
    resolved: Resolved,
    plan: "RunPlan",
    planned: "list[EpochPlan]",
    *,
    assignment: bool,
    as_json: bool,
) -> None:
    from vfun_cli.launch.disk_need import need_of
    from vfun_cli.plan.preview import preview
    from vfun_cli.plan.report import plan_json

    resolved, found = _outlook(command, resolved, plan, planned[0])
    disk = None if found is None else need_of(resolved.config, plan, found.checkpoint)
    if as_json:
        told = {} if disk is None else {"disk": disk.to_json()}
        console.print_json(plan_json(plan, planned, assignment=assignment) | _forecast_json(found) | told)
    else:
        console.out.print(preview(plan, planned))
        _show_outlook(resolved, found)
        if disk is not None:
            console.out.print(f"  {disk}", soft_wrap=True)


def _outlook(
    command: str, resolved: Resolved, plan: "RunPlan", epoch: "EpochPlan | None"
) -> "tuple[Resolved, Outlook | None]":
    """The options as train and lora would settle them on GPUs, and the memory and time of the plan with these; nothing
    of that on processors."""
    if resolved.config.device != "cuda":
        return resolved, None
    from vfun_cli.forecast.ask import measuring
    from vfun_cli.forecast.fit import settled

    with measuring() as measurer, console.err.status("forecasting the memory of a step"):
        return settled(command, resolved, plan, epoch, measurer, typical=True)


def _forecast_json(found: "Outlook | None") -> dict[str, Any]:
    return {"forecast": None if found is None else found.to_json()}


def _show_outlook(resolved: Resolved, found: "Outlook | None") -> None:
    if found is None:
        console.hint("With --memory 80GiB --world-size 8: whether it fits into such GPUs.")
        return
    from vfun_cli.forecast.show import shown

    console.out.print(shown(found), soft_wrap=True)
    for name, source in resolved.sources.items():
        if source.startswith(f"{HERE}: "):
            value, why = getattr(resolved.config, name), source.removeprefix(f"{HERE}: ")
            console.out.print(f"  {name} = {value}: {why}", style="dim", soft_wrap=True)
