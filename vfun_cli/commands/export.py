"""``vfun export-bf16``: a checkpoint as weights that other tools load."""

import json as json_
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vfun_cli import console, families
from vfun_cli.commands import defaults
from vfun_cli.commands.flags import Debug, Demo, Json, Overwrite
from vfun_cli.commands.signature import with_boundary
from vfun_cli.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from vfun_cli.checkpoints.export import ExportResult
    from vfun_cli.checkpoints.naming import LayerLocation
    from vfun_cli.families.spec import FamilySpec

FORMATS = ("same", "peft", "diffusers", "comfyui", "original")


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
        str,
        typer.Option(
            "--format",
            help="same: the naming of the model directory; diffusers: diffusers' naming. Of a LoRA: peft (the same), "
            "diffusers (load_lora_weights), comfyui, original (the original scripts' inference).",
        ),
    ] = "same",
    dtype: Annotated[str, typer.Option("--dtype", help="Type of the weights: bf16, fp16 or fp32.")] = "bf16",
    merge: Annotated[bool, typer.Option("--merge", help="Of a LoRA: write the base with the adapter in it.")] = False,
    ema: Annotated[bool, typer.Option("--ema", help="Export the moving average (--use-ema).")] = False,
    model: Annotated[
        Path | None,
        typer.Option(
            "--pretrained-model-name-or-path",
            help="Model directory the run started from: if it has moved, or for a checkpoint of the original scripts.",
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
    [bold]vfun export-bf16 output_dir/checkpoint-500 --output my-model --max-shard-size 5GB[/bold] ·
    [bold]vfun export-bf16 checkpoint-500 --format comfyui[/bold]
    """
    from vfun_cli.checkpoints import lora_export
    from vfun_cli.checkpoints.export import export
    from vfun_cli.checkpoints.naming import unchanged
    from vfun_cli.checkpoints.reader import open_checkpoint
    from vfun_cli.run import locate

    if format not in FORMATS:
        raise ConfigError(f"--format is {format!r}; choose one of: {', '.join(FORMATS)}.")
    output_dir = defaults.output_dir(demo=demo)
    original = locate.original_checkpoint(checkpoint, output_dir=output_dir)
    path = original or locate.checkpoint(checkpoint, output_dir=output_dir).checkpoint
    state = open_checkpoint(path).state
    if original is None:
        spec = families.find(state["family"])
        released = spec.export_names["same"]
        trained = model or Path(state["run_config"]["pretrained_model_name_or_path"])
    else:  # their parameters have the released names
        spec, trained = _what_was_trained(original, model or defaults.model_directory())
        released = unchanged
    is_lora = state.get("kind") == "lora"
    _check_format(format, spec, is_lora=is_lora, merge=merge)
    target = output or path.with_name(path.name + "-outputs")
    weights: lora_export.Weights = "ema" if ema else "trained"
    result: ExportResult
    if is_lora and not merge:
        result = lora_export.export_adapter(
            path,
            target,
            format="peft" if format == "same" else spec.lora_formats[format],
            released=released,
            locate=_comfyui_locations(spec, path) if format == "comfyui" else None,
            dtype=dtype,
            weights=weights,
            overwrite=overwrite,
        )
    else:
        base = _base_directory(trained, spec)
        if merge:
            result = lora_export.merge_adapter(
                path,
                target,
                base_dir=base,
                released=released,
                max_shard_size=max_shard_size,
                dtype=dtype,
                weights=weights,
                overwrite=overwrite,
            )
        else:
            result = export(
                path,
                target,
                base_dir=base,
                names=released,
                output_names=unchanged if format == "same" else spec.export_names[format],
                max_shard_size=max_shard_size,
                dtype=dtype,
                overwrite=overwrite,
                weights=weights,
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


def _what_was_trained(checkpoint: Path, model: Path | None) -> tuple["FamilySpec", Path]:
    """The family of a checkpoint of the original scripts, which does not say it, from the model's directory.

    Raises CheckpointError without such a directory.
    """
    from vfun_cli.families import detect

    fitting = [] if model is None else detect.fitting(model, families.FAMILIES.values())
    if model is None or not fitting:
        what = "" if model is None else f" {model} holds no model of a known family."
        raise CheckpointError(
            f"{checkpoint} is a checkpoint of the original scripts, which does not say what was trained.{what}",
            hint="Name the directory of the model that was trained: --pretrained-model-name-or-path DIR",
        )
    return families.find(fitting[0]), model


def _comfyui_locations(spec: "FamilySpec", checkpoint: Path) -> "Callable[[str], LayerLocation] | None":
    """Where ComfyUI looks for the layers of the model that a checkpoint belongs to."""
    locate = spec.comfyui_location
    if locate is None:
        return None
    config = json_.loads((checkpoint / "config" / Path(spec.config_file).name).read_text(encoding="utf-8"))
    dims = spec.read_dims(config)
    return lambda layer: locate(layer, dims)


def _check_format(format: str, spec: "FamilySpec", *, is_lora: bool, merge: bool) -> None:
    """Raises ConfigError for a format that this checkpoint has no form in."""
    if merge and not is_lora:
        raise ConfigError("--merge is for LoRA checkpoints; this one holds the model's own weights.", hint="Drop it.")
    possible = tuple(spec.export_names)
    if is_lora:
        possible = ("same",) if merge else ("same", *spec.lora_formats)
    if format not in possible:
        what = "a merged model" if merge else "a LoRA" if is_lora else "a full checkpoint"
        raise ConfigError(f"--format {format}: {what} of {spec.name} comes as: {', '.join(possible)}.")


def _base_directory(model: Path, spec: "FamilySpec") -> Path:
    """The folder of the run's transformer. Raises CheckpointError if the model is not there."""
    if not model.is_dir():
        raise CheckpointError(
            f"the run's model directory {model} is not there; its configuration and frozen weights are needed.",
            hint="Name its new place with --pretrained-model-name-or-path.",
        )
    return model / Path(spec.config_file).parent
