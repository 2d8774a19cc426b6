"""An export, from a checkpoint to its files: the wanted form, and the writer that makes it.

It knows families and where models lie; the writers in ``checkpoints`` know neither.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vfun_cli.checkpoints.naming import LayerLocation, unchanged
from vfun_cli.errors import ConfigError
from vfun_cli.families import detect
from vfun_cli.families.spec import ModelDims
from vfun_cli.families.trained import Trained
from vfun_cli.run.rundir import RunDir

if TYPE_CHECKING:
    from vfun_cli.checkpoints.export import ExportResult


ORIGINAL = "original"
"""Of a whole model: the names of its first release, where those are not the released directory's."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """How the weights are wanted."""

    format: str
    dtype: str
    merge: bool
    ema: bool
    max_shard_size: str
    overwrite: bool
    lora_metadata: bool = True
    """The header of a LoRA says what it is of."""


def check(trained: Trained, form: Form) -> None:
    """Refuse a form that this checkpoint has none in.

    Raises:
        ConfigError: with the formats there are.
    """
    spec, is_lora, merge = trained.spec, trained.is_lora, form.merge
    if merge and not is_lora:
        raise ConfigError("--merge is for LoRA checkpoints; this one holds the model's own weights.", hint="Drop it.")
    original = (ORIGINAL,) if spec.export.original_location is not None else ()
    possible = (*spec.export.names, *original)
    if is_lora:
        possible = ("same", *original) if merge else ("same", *spec.export.lora_formats)
    if form.format not in possible:
        what = "a merged model" if merge else "a LoRA" if is_lora else "a full checkpoint"
        raise ConfigError(f"--format {form.format}: {what} of {spec.name} comes as: {', '.join(possible)}.")


def export(trained: Trained, output: Path, form: Form) -> "ExportResult":
    """Write the weights into the directory ``output``, and what they belong to.

    Raises:
        VfunError: the checkpoint, the model's directory or the output is not what it should be.
    """
    from vfun_cli.checkpoints import export as model_export

    places = [place for _, place in trained.given.named()]
    sources = (trained.path, trained.model, *places, *RunDir(trained.path.absolute().parent).own_files())
    model_export.check_output(output, form.dtype, overwrite=form.overwrite, sources=sources)
    result = _written(trained, output, form)
    whole = not trained.is_lora or form.merge
    model_export.record_origin(
        output,
        family=trained.spec.name,
        model=trained.model,
        given=replace(trained.given, transformer=None) if whole else trained.given,
        train_mode=trained.train_mode,
    )
    return result


def _written(trained: Trained, output: Path, form: Form) -> "ExportResult":
    from vfun_cli.checkpoints import export as model_export
    from vfun_cli.checkpoints import lora_export
    from vfun_cli.commands import lora_metadata

    weights: model_export.Weights = "ema" if form.ema else "trained"
    if trained.is_lora and not form.merge:
        return lora_export.export_adapter(
            trained.path,
            output,
            format="peft" if form.format == "same" else trained.spec.export.lora_formats[form.format],
            released=trained.released,
            locate=_locations(trained, trained.spec.export.comfyui_location) if form.format == "comfyui" else None,
            metadata=lora_metadata.about(trained) if form.lora_metadata else {},
            dtype=form.dtype,
            weights=weights,
            overwrite=form.overwrite,
        )
    locate = _locations(trained, trained.spec.export.original_location) if form.format == ORIGINAL else None
    if form.merge:
        return lora_export.merge_adapter(
            trained.path,
            output,
            base_dir=trained.transformer_dir,
            given=trained.given_tensors(),
            released=trained.released,
            locate=locate,
            max_shard_size=form.max_shard_size,
            dtype=form.dtype,
            weights=weights,
            overwrite=form.overwrite,
        )
    return model_export.export(
        trained.path,
        output,
        base_dir=trained.transformer_dir,
        given=trained.given_tensors(),
        names=trained.released,
        output_names=trained.spec.export.names[form.format] if form.format not in ("same", ORIGINAL) else unchanged,
        locate=locate,
        max_shard_size=form.max_shard_size,
        dtype=form.dtype,
        overwrite=form.overwrite,
        weights=weights,
    )


def _locations(
    trained: Trained, location: Callable[[str, ModelDims], LayerLocation | None] | None
) -> Callable[[str], LayerLocation | None] | None:
    """Where another program keeps the layers of the model that a checkpoint belongs to."""
    if location is None:
        return None
    spec, beside = trained.spec, trained.path / "config" / Path(trained.spec.model.config_file).name
    dims = detect.dims_of(spec, beside) if beside.is_file() else detect.read_dims(spec, trained.model)
    return lambda layer: location(layer, dims)
