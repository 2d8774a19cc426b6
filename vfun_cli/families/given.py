"""Whether weights that were named instead of a model directory's own are those of the model."""

from collections.abc import Mapping
from pathlib import Path

from vfun_cli.checkpoints.given import TRANSFORMER, VAE, Given
from vfun_cli.checkpoints.given_tensors import require_same_tensors, stored_tensors
from vfun_cli.checkpoints.joint import split, taken
from vfun_cli.checkpoints.released import tensor_shapes
from vfun_cli.checkpoints.tensors import TensorSource
from vfun_cli.families import detect
from vfun_cli.families.spec import FamilySpec


def require_given(spec: FamilySpec, model_dir: Path, given: Given) -> None:
    """Compare what was named with the model directory, from the headers of both.

    Raises:
        CheckpointError: it is missing or damaged, or a tensor does not fit; names the option.
    """
    if given.transformer is not None:
        transformer_tensors(spec, model_dir, given.transformer)
    if given.vae is not None:
        own = stored_tensors(model_dir / spec.model.vae, "pretrained_model_name_or_path")
        require_same_tensors(_shapes(stored_tensors(given.vae, VAE)), _shapes(own), given.vae, VAE)


def transformer_tensors(spec: FamilySpec, model_dir: Path, place: Path) -> dict[str, TensorSource]:
    """The transformer's tensors at ``place`` by its parameters' names, unread.

    Raises:
        CheckpointError: as of :func:`require_given`.
    """
    shapes = tensor_shapes(spec.model.transformer_dir(model_dir))
    own = {spec.export.parameter(name): shape for name, shape in shapes.items()}
    stored = in_own_names(spec, model_dir, stored_tensors(place, TRANSFORMER), own)
    found = {spec.export.parameter(name): each for name, each in stored.items()}
    require_same_tensors(_shapes(found), own, place, TRANSFORMER)
    return found


def in_own_names(
    spec: FamilySpec,
    model_dir: Path,
    stored: Mapping[str, TensorSource],
    own: Mapping[str, tuple[int, ...]],
) -> Mapping[str, TensorSource]:
    """Weights in the names of the model's first release, which may join layers, in its own; others as they are.

    Args:
        own: the shapes of the transformer's parameters.
    """
    locate = spec.export.original_location
    if locate is None:
        return stored
    dims = detect.read_dims(spec, model_dir)
    return split(stored, own, lambda layer: locate(layer, dims), taken)


def _shapes(tensors: Mapping[str, TensorSource]) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in tensors.items()}
