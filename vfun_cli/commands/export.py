"""``vfun export-bf16``: a checkpoint as weights that other tools load."""

from pathlib import Path
from typing import Annotated

import typer

from vfun_cli import console, families
from vfun_cli.commands.flags import Debug, Demo, Json, Overwrite
from vfun_cli.commands.signature import with_boundary
from vfun_cli.errors import CheckpointError, ConfigError

FORMATS = ("same", "diffusers")


@with_boundary
def export_bf16(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT", help="A checkpoint: a path, or a bare name looked up in the output directory."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Where to write. [default: CHECKPOINT-outputs beside it]", show_default=False),
    ] = None,
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", help="Largest file, e.g. 10GB or 500MB.")] = "10GB",
    format: Annotated[
        str, typer.Option("--format", help="same: the naming of the model directory; diffusers: diffusers' naming.")
    ] = "same",
    ema: Annotated[bool, typer.Option("--ema", help="Export the moving average (--use-ema).")] = False,
    model: Annotated[
        Path | None,
        typer.Option(
            "--pretrained-model-name-or-path",
            help="Model directory the run started from, if it has moved.",
            show_default=False,
        ),
    ] = None,
    overwrite: Overwrite = False,
    demo: Demo = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a checkpoint's weights as bf16 safetensors, in the released names, verified after writing.

    Needs no GPU, no DeepSpeed and no training processes.

    Examples: [bold]vfun export-bf16 checkpoint-500[/bold] ·
    [bold]vfun export-bf16 output_dir/checkpoint-500 --output my-model --max-shard-size 5GB[/bold]
    """
    from vfun_cli import locate
    from vfun_cli.checkpoints.export import export
    from vfun_cli.checkpoints.reader import open_checkpoint

    if format not in FORMATS:
        raise ConfigError(f"--format is {format!r}; choose one of: {', '.join(FORMATS)}.")
    found = locate.checkpoint(checkpoint, output_dir=locate.default_output_dir(demo=demo))
    state = open_checkpoint(found.checkpoint).state
    spec = families.find(state["family"])
    base = model or Path(state["run_config"]["pretrained_model_name_or_path"])
    if not base.is_dir():
        raise CheckpointError(
            f"the run's model directory {base} is not there; its configuration and frozen weights are needed.",
            hint="Name its new place with --pretrained-model-name-or-path.",
        )
    target = output or found.checkpoint.with_name(found.checkpoint.name + "-outputs")
    result = export(
        found.checkpoint,
        target,
        base_dir=base / Path(spec.config_file).parent,
        names=spec.export_names[format],
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        weights="ema" if ema else "trained",
    )
    content = {
        "output": str(result.output),
        "tensors": result.tensors,
        "bytes": result.bytes,
        "sha256": result.sha256,
        "verified": result.verified,
    }
    if json:
        console.print_json(content)
    else:
        console.out.print(
            f"{result.tensors} tensors, {result.bytes:,} bytes, verified -> {result.output}", soft_wrap=True
        )
