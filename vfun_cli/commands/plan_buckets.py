"""``vfun plan-buckets``: the token-length bucket plan, before any GPU."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from vfun_cli import console, families
from vfun_cli.commands.flags import Debug, Demo, Json
from vfun_cli.commands.signature import with_options
from vfun_cli.config.resolve import resolve
from vfun_cli.demo import default as demo_default
from vfun_cli.errors import ConfigError


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
    from vfun_cli.metadata.records import find_row, read_metadata
    from vfun_cli.plan.picture import plot
    from vfun_cli.plan.planning import plan_options
    from vfun_cli.plan.preview import preview
    from vfun_cli.plan.report import plan_json, why, why_lines
    from vfun_cli.plan.rows import dims_if_there, plan, plan_input, plan_input_without_files

    spec = families.find(family)
    if meta is not None:
        given["train_data_meta"] = meta
    resolved = resolve("train", spec, given, demo=demo_default.make(spec) if demo else None)
    config = resolved.config
    ranks = world_size or config.num_processes or 1
    model = config.pretrained_model_name_or_path
    if model is not None and not model.is_dir():
        console.hint(f"{model} is not here: planned with the dimensions of the largest {spec.name} release")
    if resolved.sources["train_data_meta"] == f"{spec.name} default" and not Path(str(config.train_data_meta)).exists():
        if why_clip is not None or plot_to is not None:
            raise ConfigError("--why and --plot need clips.", hint="Name the metadata with --meta.")
        dims = dims_if_there(config, spec)
        if json:
            console.print_json(plan_json(spec, dims, plan_options(config, ranks)))
        else:
            console.out.print(preview(spec, dims, plan_options(config, ranks)))
            console.hint("Name the metadata with --meta for the plan of its clips.")
        return
    source = plan_input_without_files(config, spec, ranks) or plan_input(config, spec, ranks, needs_model=False)
    plans = plan(source, epochs)
    known = (spec, source.dims)
    if plot_to is not None:
        plot(plot_to, *known, source.options, plans[0])
        console.hint(f"wrote {plot_to}")
    if why_clip is not None:
        assert config.train_data_meta is not None
        metadata = read_metadata(config.train_data_meta)
        row = find_row(metadata, why_clip, [field.name for field in spec.fields])
        story = why(*known, source.table, source.options, row, plans)
        story["file"] = next(record.fields.get("file_path") for record in metadata.records if record.row == row)
        if json:
            console.print_json(story)
        else:
            console.out.print(escape("\n".join(why_lines(story))), soft_wrap=True)
    elif json:
        console.print_json(plan_json(*known, source.options, source.table, plans, assignment=assignment))
    else:
        console.out.print(preview(*known, source.options, source.table, plans))
