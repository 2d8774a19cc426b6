"""``vfun export-bf16``: a checkpoint as weights that other tools load."""

from pathlib import Path
from typing import Annotated

import typer

from vfun_cli import console
from vfun_cli.checkpoints.given import Given
from vfun_cli.commands import defaults
from vfun_cli.commands.flags import Debug, Demo, Json, Overwrite, typed_name, typed_path
from vfun_cli.errors import ConfigError
from vfun_cli.families.trained import find

FORMATS = ("same", "peft", "diffusers", "comfyui", "original")


def export_bf16(
    checkpoint: Annotated[
        str,
        typer.Argument(
            parser=typed_name,
            metavar="CHECKPOINT",
            help="A checkpoint: a path, or a bare name looked up in the output directory.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--to",
            "--output",
            parser=typed_path,
            metavar="PATH",
            help="Folder to write to, made for it. [default: CHECKPOINT-outputs beside the checkpoint]",
            show_default=False,
        ),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", metavar="SIZE", help="Largest file, e.g. 10GB or 500MB.")
    ] = "10GB",
    format: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="same: the naming of the model directory; diffusers: diffusers' naming; original: the first "
            "release's, where it differs, which ComfyUI reads. Of a LoRA: peft (the same), "
            "diffusers (load_lora_weights), comfyui, original (the original scripts' inference).",
        ),
    ] = "same",
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="TYPE", help="Type of the weights: bf16, fp16 or fp32.")
    ] = "bf16",
    merge: Annotated[bool, typer.Option("--merge", help="Of a LoRA: write the base with the adapter in it.")] = False,
    ema: Annotated[bool, typer.Option("--ema", help="Export the moving average (--use-ema).")] = False,
    model: Annotated[
        Path | None,
        typer.Option(
            "--pretrained-model-name-or-path",
            parser=typed_path,
            metavar="PATH",
            help="Model directory the run started from: if it has moved, or for a checkpoint of the original scripts.",
            show_default=False,
        ),
    ] = None,
    transformer: Annotated[
        Path | None,
        typer.Option(
            "--transformer-path",
            parser=typed_path,
            metavar="PATH",
            help="The transformer that the run started from by this option, if it has moved.",
            show_default=False,
        ),
    ] = None,
    lora_metadata: Annotated[
        bool,
        typer.Option(
            "--lora-metadata/--no-lora-metadata",
            help="Of a LoRA: the file's header says of which model it is, its rank, alpha, steps, date and hash.",
        ),
    ] = True,
    overwrite: Overwrite = False,
    demo: Demo = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a checkpoint's weights as bf16 safetensors, in the released names, verified after writing.

    Needs no GPU, no DeepSpeed and no training processes.

    Examples: [bold]vfun export-bf16 checkpoint-500[/bold] ·
    [bold]vfun export-bf16 output_dir/checkpoint-500 --to my-model --max-shard-size 5GB[/bold] ·
    [bold]vfun export-bf16 checkpoint-500 --format comfyui[/bold]
    """
    from vfun_cli.commands import exporting

    if format not in FORMATS:
        raise ConfigError(f"--format is {format!r}; choose one of: {', '.join(FORMATS)}.")
    trained = find(
        checkpoint,
        output_dir=defaults.output_dir(demo=demo),
        model=model,
        default_model=None if model else defaults.model_directory(),
        given=Given(transformer=transformer),
    )
    form = exporting.Form(
        format=format, dtype=dtype, merge=merge, ema=ema, max_shard_size=max_shard_size, overwrite=overwrite,
        lora_metadata=lora_metadata,
    )  # fmt: skip
    exporting.check(trained, form)
    result = exporting.export(trained, output or trained.path.with_name(trained.path.name + "-outputs"), form)
    if json:
        console.print_json({**vars(result), "output": str(result.output)})
    else:
        console.out.print(
            f"{result.tensors} tensors, {result.bytes:,} bytes, verified -> {result.output}", soft_wrap=True
        )
