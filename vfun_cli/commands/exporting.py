"""An export, from the name of a checkpoint to its files: what was trained, the wanted form, the writer that makes it.

It knows families and where models lie; the writers in ``checkpoints`` know neither.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfun_cli import families
from vfun_cli.checkpoints.naming import LayerLocation, unchanged
from vfun_cli.checkpoints.state import STATE_FILE
from vfun_cli.commands import defaults
from vfun_cli.errors import CheckpointError, ConfigError
from vfun_cli.families import detect
from vfun_cli.families.spec import FamilySpec
from vfun_cli.run import locate
from vfun_cli.run.rundir import RunDir

if TYPE_CHECKING:
    from vfun_cli.checkpoints.export import ExportResult


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A checkpoint and the model that was trained."""

    path: Path
    spec: FamilySpec
    model: Path
    """The directory that the run started from."""
    released: Callable[[str], str]
    """From a parameter's name in the checkpoint to its released name."""
    is_lora: bool


@dataclass(frozen=True, kw_only=True)
class Form:
    """How the weights are wanted."""

    format: str
    dtype: str
    merge: bool
    ema: bool
    max_shard_size: str
    overwrite: bool


def find(name: str, *, output_dir: Path, model: Path | None) -> Trained:
    """The checkpoint of that name, ours or of the original scripts, whose model may be named or found by default.

    Raises:
        CheckpointError: there is none, or it does not say what was trained.
    """
    original = locate.original_checkpoint(name, output_dir=output_dir)
    if original is not None:  # their parameters have the released names
        _read(original)
        spec, directory = _trained_by_original_scripts(original, model or defaults.model_directory())
        return Trained(path=original, spec=spec, model=directory, released=unchanged, is_lora=False)
    path = locate.checkpoint(name, output_dir=output_dir).checkpoint
    state = _read(path)
    spec = families.stated_in(path / STATE_FILE, state["family"])
    return Trained(
        path=path,
        spec=spec,
        model=model or Path(state["run_config"]["pretrained_model_name_or_path"]),
        released=spec.export.names["same"],
        is_lora=state.get("kind") == "lora",
    )


def _read(checkpoint: Path) -> Mapping[str, Any]:
    """What a checkpoint says of itself, once it can be opened.

    Raises:
        CheckpointError: it cannot be opened.
    """
    from vfun_cli.checkpoints.reader import open_checkpoint  # with numpy: not for a checkpoint that is not there

    return open_checkpoint(checkpoint).state


def check(trained: Trained, form: Form) -> None:
    """Refuse a form that this checkpoint has none in.

    Raises:
        ConfigError: with the formats there are.
    """
    spec, is_lora, merge = trained.spec, trained.is_lora, form.merge
    if merge and not is_lora:
        raise ConfigError("--merge is for LoRA checkpoints; this one holds the model's own weights.", hint="Drop it.")
    possible = tuple(spec.export.names)
    if is_lora:
        possible = ("same",) if merge else ("same", *spec.export.lora_formats)
    if form.format not in possible:
        what = "a merged model" if merge else "a LoRA" if is_lora else "a full checkpoint"
        raise ConfigError(f"--format {form.format}: {what} of {spec.name} comes as: {', '.join(possible)}.")


def export(trained: Trained, output: Path, form: Form) -> "ExportResult":
    """Write the weights into the directory ``output``.

    Raises:
        VfunError: the checkpoint, the model's directory or the output is not what it should be.
    """
    from vfun_cli.checkpoints import export as model_export
    from vfun_cli.checkpoints import lora_export

    sources = (trained.path, trained.model, *RunDir(trained.path.absolute().parent).own_files())
    model_export.check_output(output, form.dtype, overwrite=form.overwrite, sources=sources)
    weights: lora_export.Weights = "ema" if form.ema else "trained"
    if trained.is_lora and not form.merge:
        return lora_export.export_adapter(
            trained.path,
            output,
            format="peft" if form.format == "same" else trained.spec.export.lora_formats[form.format],
            released=trained.released,
            locate=_comfyui_locations(trained) if form.format == "comfyui" else None,
            dtype=form.dtype,
            weights=weights,
            overwrite=form.overwrite,
        )
    if form.merge:
        return lora_export.merge_adapter(
            trained.path,
            output,
            base_dir=_base_directory(trained),
            released=trained.released,
            max_shard_size=form.max_shard_size,
            dtype=form.dtype,
            weights=weights,
            overwrite=form.overwrite,
        )
    return model_export.export(
        trained.path,
        output,
        base_dir=_base_directory(trained),
        names=trained.released,
        output_names=unchanged if form.format == "same" else trained.spec.export.names[form.format],
        max_shard_size=form.max_shard_size,
        dtype=form.dtype,
        overwrite=form.overwrite,
        weights=weights,
    )


def _trained_by_original_scripts(checkpoint: Path, model: Path | None) -> tuple[FamilySpec, Path]:
    """The family of a checkpoint of the original scripts, which does not say it, from the model's directory.

    Raises:
        CheckpointError: there is no such directory.
    """
    fitting = [] if model is None else detect.fitting(model)
    if model is None or not fitting:
        what = "" if model is None else f" {model} holds no model of a known family."
        raise CheckpointError(
            f"{checkpoint} is a checkpoint of the original scripts, which does not say what was trained.{what}",
            hint="Name the directory of the model that was trained with --pretrained-model-name-or-path.",
        )
    return families.find(fitting[0]), model


def _comfyui_locations(trained: Trained) -> Callable[[str], LayerLocation] | None:
    """Where ComfyUI looks for the layers of the model that a checkpoint belongs to."""
    location, spec = trained.spec.export.comfyui_location, trained.spec
    if location is None:
        return None
    dims = detect.dims_of(spec, trained.path / "config" / Path(spec.model.config_file).name)
    return lambda layer: location(layer, dims)


def _base_directory(trained: Trained) -> Path:
    """The folder of the run's transformer.

    Raises:
        CheckpointError: the model is not there.
    """
    if not trained.model.is_dir():
        raise CheckpointError(
            f"{trained.path} was trained from {trained.model}, which is not there; "
            "its configuration and frozen weights are needed.",
            hint="Name its new place with --pretrained-model-name-or-path.",
        )
    return trained.model / Path(trained.spec.model.config_file).parent
