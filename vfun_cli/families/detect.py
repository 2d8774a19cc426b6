"""Which family a model directory fits and what its dimensions are, from its configuration files alone."""

from collections.abc import Mapping
from pathlib import Path

from vfun_cli import families
from vfun_cli.errors import CheckpointError
from vfun_cli.families import releases
from vfun_cli.families.spec import FamilySpec, ModelDims
from vfun_cli.lfs import refuse_lfs_pointer
from vfun_cli.typed_json import read_object


def fitting(model_dir: Path) -> list[str]:
    """Names of the families whose transformer configuration the directory holds; none if it cannot be read."""
    return [
        spec.name
        for spec in families.FAMILIES.values()
        if (config := read_config(model_dir, spec)) and spec.model.recognises(config)
    ]


def read_config(model_dir: Path, spec: FamilySpec) -> dict[str, object]:
    """The transformer configuration where this family keeps it; empty if there is none or it is damaged."""
    try:
        return read_object(model_dir / spec.model.config_file)
    except CheckpointError:
        return {}


def read_dims(spec: FamilySpec, model_dir: Path | None) -> ModelDims:
    """The model's dimensions from its directory; those of the largest release when none is given.

    Raises:
        CheckpointError: the directory or its configuration is missing or damaged.
    """
    if model_dir is None:
        return spec.model.dims
    with releases.downloads_named(spec, model_dir):
        return _stated_dims(spec, model_dir)


def _stated_dims(spec: FamilySpec, model_dir: Path) -> ModelDims:
    path = model_dir / spec.model.config_file
    if not model_dir.is_dir():
        raise CheckpointError(
            f"there is no model directory {model_dir}.",
            hint="Set --pretrained-model-name-or-path or MODEL_NAME to a downloaded model.",
            at=model_dir,
        )
    refuse_lfs_pointer(path)
    others = fitting(model_dir)
    if others and spec.name not in others:
        raise CheckpointError(
            f"{model_dir} looks like a {' or '.join(others)} model, not like {spec.name}.",
            hint=f"Train {others[0]}, or point --pretrained-model-name-or-path at a {spec.name} model.",
        )
    if not path.is_file():
        raise CheckpointError(
            f"{model_dir} is no {spec.name} model: {spec.model.config_file} is missing.",
            hint="The model is needed in its released layout.",
            at=path if len(releases.missing_parts(spec, model_dir)) < len(spec.files) else model_dir,
        )
    return dims_of(spec, path, spec.model.settings_beside(model_dir))


def dims_of(spec: FamilySpec, config_file: Path, beside: Mapping[str, object] | None = None) -> ModelDims:
    """The dimensions that a transformer's configuration states.

    Args:
        beside: what other files state, as ``ModelSpec.settings_beside`` gives it.

    Raises:
        CheckpointError: it is damaged, or of no such transformer; names the file.
    """
    config = read_object(config_file, hint="Download the file again.")
    try:
        return spec.model.read_dims({**config, **(beside or {})})
    except CheckpointError as error:
        raise CheckpointError(f"{config_file}: {error.message}", hint=error.hint, at=config_file) from None


def read_dims_if_there(spec: FamilySpec, model_dir: Path | None) -> ModelDims:
    """The same, but those of the largest release where the directory is not on this machine.

    Raises:
        CheckpointError: its configuration is missing or damaged.
    """
    return read_dims(spec, model_dir if model_dir is not None and model_dir.is_dir() else None)
