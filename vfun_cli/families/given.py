"""Whether weights that were named instead of a model directory's own are those of the model."""

from collections.abc import Mapping
from pathlib import Path

from vfun_cli.checkpoints.given import TRANSFORMER, VAE, Given
from vfun_cli.checkpoints.given_tensors import require_same_tensors, stored_tensors
from vfun_cli.checkpoints.released import tensor_shapes
from vfun_cli.checkpoints.tensors import TensorSource
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
    found = {spec.export.parameter(name): each for name, each in stored_tensors(place, TRANSFORMER).items()}
    shapes = tensor_shapes(spec.model.transformer_dir(model_dir))
    own = {spec.export.parameter(name): shape for name, shape in shapes.items()}
    require_same_tensors(_shapes(found), own, place, TRANSFORMER)
    return found


def _shapes(tensors: Mapping[str, TensorSource]) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in tensors.items()}
