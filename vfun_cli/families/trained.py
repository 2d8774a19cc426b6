"""What was trained, from the name of a checkpoint: the family, the model directory, the names of its weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfun_cli import families
from vfun_cli.checkpoints.given import Given
from vfun_cli.checkpoints.naming import unchanged
from vfun_cli.checkpoints.state import STATE_FILE
from vfun_cli.errors import CheckpointError
from vfun_cli.families import detect
from vfun_cli.families.spec import FamilySpec
from vfun_cli.run import locate

if TYPE_CHECKING:
    from vfun_cli.checkpoints.tensors import TensorSource


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
    given: Given = field(default_factory=Given)
    """Weights that the run started from instead of the directory's."""
    train_mode: str | None = None
    """Of the run; None where it named none, and of a checkpoint of the original scripts."""

    @property
    def transformer_dir(self) -> Path:
        """The folder of the run's transformer.

        Raises:
            CheckpointError: the model is not there.
        """
        require_model(self.path, self.model)
        return self.spec.model.transformer_dir(self.model)

    def given_tensors(self) -> "dict[str, TensorSource]":
        """The transformer that the run started from, by released names and unread, where it was not the directory's.

        Raises:
            CheckpointError: it is not there, or does not fit.
        """
        if self.given.transformer is None:
            return {}
        from vfun_cli.families.given import transformer_tensors  # with numpy

        require_model(self.path, self.model)
        found = transformer_tensors(self.spec, self.model, self.given.transformer)
        return {self.spec.export.names["same"](name): tensor for name, tensor in found.items()}


def require_model(path: Path, model: Path) -> None:
    """Refuse weights whose model is not where they say.

    Raises:
        CheckpointError: it is not there.
    """
    if not model.is_dir():
        raise CheckpointError(
            f"{path} was trained from {model}, which is not there; its configuration and frozen weights are needed.",
            hint="Name its new place with --pretrained-model-name-or-path.",
        )


def find(
    name: str | None,
    *,
    output_dir: Path,
    model: Path | None,
    default_model: Path | None = None,
    given: Given | None = None,
) -> Trained:
    """The checkpoint of that name, ours or of the original scripts, whose model may be named.

    Args:
        name: of a run directory or None its newest checkpoint is meant.
        default_model: of the original scripts, whose checkpoints do not say it.
        given: weights in the place of those that the run named, which have moved.

    Raises:
        CheckpointError: there is none, or it does not say what was trained.
    """
    given = given or Given()
    original = None if name is None else locate.original_checkpoint(name, output_dir=output_dir)
    if original is not None:  # their parameters have the released names
        _read(original)
        spec, directory = _trained_by_original_scripts(original, model or default_model)
        return Trained(path=original, spec=spec, model=directory, released=unchanged, is_lora=False, given=given)
    path = locate.checkpoint(name, output_dir=output_dir).checkpoint
    state = _read(path)
    spec = families.stated_in(path / STATE_FILE, state["family"])
    return Trained(
        path=path,
        spec=spec,
        model=model or Path(state["run_config"]["pretrained_model_name_or_path"]),
        released=spec.export.names["same"],
        is_lora=state.get("kind") == "lora",
        given=given.before(Given.of(state["run_config"])),
        train_mode=state["run_config"].get("train_mode"),
    )


def _read(checkpoint: Path) -> Mapping[str, Any]:
    """What a checkpoint says of itself, once it can be opened.

    Raises:
        CheckpointError: it cannot be opened.
    """
    from vfun_cli.checkpoints.reader import open_checkpoint  # with numpy: not for a checkpoint that is not there

    return open_checkpoint(checkpoint).state


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
