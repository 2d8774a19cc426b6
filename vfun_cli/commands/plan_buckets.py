"""``vfun plan-buckets``: the token-length bucket plan, before any GPU."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from vfun_cli import console, families
from vfun_cli.commands.flags import Debug, Demo, Json
from vfun_cli.commands.signature import with_options
from vfun_cli.config.options import RunConfig
from vfun_cli.config.resolve import resolve
from vfun_cli.demo import default as demo_default
from vfun_cli.errors import ConfigError, MetadataError

if TYPE_CHECKING:
    from vfun_cli.families.spec import FamilySpec
    from vfun_cli.plan.rows import PlanInput
    from vfun_cli.plan.schedule import EpochPlan


@with_options("plan-buckets")
def plan_buckets(
    given: dict[str, Any],
    family: Annotated[str, typer.Argument(metavar="FAMILY", help="Model family, e.g. wan-s2v.", show_default=False)],
    meta: Annotated[
        Path | None, typer.Option("--meta", help="Short for --train-data-meta.", show_default=False)
    ] = None,
    world_size: Annotated[
        int | None,
        typer.Option(
            "--world-size", min=1, help="Ranks to plan for. [default: as train would run here]", show_default=False
        ),
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Epochs to plan.")] = 1,
    why_clip: Annotated[
        str | None,
        typer.Option(
            "--why",
            metavar="CLIP",
            help="Explain one clip, from its file to its bucket: a row number, or the path or name of a file.",
            show_default=False,
        ),
    ] = None,
    plot_to: Annotated[
        Path | None, typer.Option("--plot", help="Draw the plan as an .svg or .png picture.", show_default=False)
    ] = None,
    assignment: Annotated[
        bool,
        typer.Option("--assignment", help="With --json: what each rank trains in each step.", show_default=False),
    ] = False,
    demo: Demo = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show which clip trains at which size and length on which rank, and what each step costs.

    Without metadata: the size table alone. The training core executes this very plan.

    Examples: [bold]vfun plan-buckets wan-s2v[/bold] · [bold]vfun plan-buckets wan-s2v --meta metadata.json
    --world-size 64[/bold] · [bold]vfun plan-buckets wan-s2v --demo --plot plan.svg[/bold]
    """
    spec = families.find(family)
    if meta is not None:
        given["train_data_meta"] = meta
    resolved = resolve("train", spec, given, demo=demo_default.make(spec) if demo else None)
    config, ranks = resolved.config, world_size or resolved.config.num_processes or 1
    model = config.pretrained_model_name_or_path
    if model is not None and not model.is_dir():
        console.hint(f"{model} is not here: planned with the dimensions of the largest {spec.name} release")
    if resolved.sources["train_data_meta"] == f"{spec.name} default" and not Path(str(config.train_data_meta)).exists():
        if why_clip is not None or plot_to is not None:
            raise ConfigError("--why and --plot need clips.", hint="Name the metadata with --meta.")
        _show_sizes(spec, config, ranks, as_json=json)
        return
    source, plans = _plan(spec, config, ranks, epochs)
    if plot_to is not None:
        _draw(source, plans, plot_to)
    if why_clip is not None:
        _explain(config, source, plans, why_clip, as_json=json)
    else:
        _show_plan(source, plans, assignment=assignment, as_json=json)


def _show_sizes(spec: "FamilySpec", config: RunConfig, ranks: int, *, as_json: bool) -> None:
    """The size table alone."""
    from vfun_cli.plan.planning import plan_options
    from vfun_cli.plan.preview import preview
    from vfun_cli.plan.report import plan_json
    from vfun_cli.plan.rows import dims_if_there

    dims, sizes = dims_if_there(config, spec), plan_options(config, ranks)
    if as_json:
        console.print_json(plan_json(spec, dims, sizes))
    else:
        console.out.print(preview(spec, dims, sizes))
        console.hint("Name the metadata with --meta for the plan of its clips.")


def _plan(spec: "FamilySpec", config: RunConfig, ranks: int, epochs: int) -> "tuple[PlanInput, list[EpochPlan]]":
    from vfun_cli.plan.rows import plan, plan_input, plan_input_without_files, validate_command

    try:
        source = plan_input_without_files(config, spec, ranks) or plan_input(config, spec, ranks, needs_model=False)
        return source, plan(source, epochs)
    except MetadataError as error:
        raise error.with_command(validate_command(config, spec)) from None


def _draw(source: "PlanInput", plans: "list[EpochPlan]", target: Path) -> None:
    from vfun_cli.plan.picture import plot

    plot(target, source.spec, source.dims, source.options, plans[0])
    console.hint(f"wrote {target}")


def _explain(config: RunConfig, source: "PlanInput", plans: "list[EpochPlan]", clip: str, *, as_json: bool) -> None:
    """One clip, from its file to its bucket."""
    from vfun_cli.metadata.records import find_row, read_metadata
    from vfun_cli.plan.report import why, why_lines

    assert config.train_data_meta is not None
    metadata = read_metadata(config.train_data_meta)
    row = find_row(metadata, clip, [field.name for field in source.spec.fields])
    story = why(source.spec, source.dims, source.table, source.options, row, plans)
    story["file"] = next(record.fields.get("file_path") for record in metadata.records if record.row == row)
    if as_json:
        console.print_json(story)
    else:
        console.out.print(escape("\n".join(why_lines(story))), soft_wrap=True)


def _show_plan(source: "PlanInput", plans: "list[EpochPlan]", *, assignment: bool, as_json: bool) -> None:
    from vfun_cli.plan.preview import preview
    from vfun_cli.plan.report import plan_json

    known = (source.spec, source.dims, source.options, source.table, plans)
    if as_json:
        console.print_json(plan_json(*known, assignment=assignment))
    else:
        console.out.print(preview(*known))
