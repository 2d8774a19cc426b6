"""Which parameters ``--trainable-modules`` means, from their names alone: before a launch, and again in the run.

People type parts of the released names, as the original scripts take them. Some modules have diffusers' names here; a
part that only those contain is taken too, with a notice.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vfun_cli.checkpoints.naming import unchanged
from vfun_cli.checkpoints.released import tensor_names
from vfun_cli.errors import ConfigError, did_you_mean
from vfun_cli.families.spec import FamilySpec, ModelDims

EVERYTHING = "."


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What trains."""

    names: list[str]
    """The model's own names of the parameters, in its order."""
    notices: list[str]
    """Where a part does not mean what its spelling suggests."""


def choose(
    parts: Sequence[str],
    parameters: Iterable[str],
    released: Callable[[str], str] = unchanged,
    without_gradient: Sequence[str] = (),
) -> Chosen:
    """The parameters whose released name contains one of the parts, or whose own does where no released one does.

    Args:
        parameters: names of all parameters of the model.
        released: from such a name to the released one.
        without_gradient: modules whose parameters never get one in this architecture; they are left out.

    Raises:
        ConfigError: a part of no name, or nothing that could learn.
    """
    spelt = {name: released(name) for name in parameters}
    found: set[str] = set()
    notices = []
    for part in parts:
        meant, notice = _meant(part, spelt)
        found |= meant
        notices += notice
    idle = tuple(f"{module}." for module in without_gradient)
    names = [name for name in spelt if name in found and not name.startswith(idle)]
    if not names:
        raise ConfigError("trainable_modules: none of the chosen parameters ever gets a gradient.", hint=_hint(spelt))
    return Chosen(names=names, notices=notices)


def choose_from_files(parts: Sequence[str], model_dir: Path, spec: FamilySpec, dims: ModelDims) -> Chosen:
    """The same from the files of a model directory, before anything is started.

    Raises:
        CheckpointError: there are no weights in it.
        ConfigError: as of :func:`choose`.
    """
    stored = tensor_names(model_dir / Path(spec.model.config_file).parent)
    parameters = [spec.export.parameter(name) for name in stored]
    return choose(parts, parameters, spec.export.names["same"], spec.model.modules_without_gradient(dims))


def _meant(part: str, spelt: Mapping[str, str]) -> tuple[set[str], list[str]]:
    """The parameters of one part, and what must be said of it."""
    if part == EVERYTHING:
        return set(spelt), []
    by_release = {name for name in spelt if part in spelt[name]}
    by_name = {name for name in spelt if part in name}
    others = [spelt[name] for name in spelt if name in by_name - by_release]
    if by_release and others:
        return by_release, [
            f"trainable_modules: {part!r} is taken as a part of the released names ({len(by_release)} parameters); "
            f"what only diffusers spells so is not trained: {_some(others)}."
        ]
    if by_release:
        return by_release, []
    if by_name:
        return by_name, [
            f"trainable_modules: {part!r} is a part of no released name; taken as diffusers spells it, it means "
            f"{_some(others)}."
        ]
    words = {word for name in spelt.items() for each in name for word in (each, *each.split("."))}
    raise ConfigError(
        f"trainable_modules: {part!r} is in no parameter name of the transformer.{did_you_mean(part, words)}",
        hint=_hint(spelt),
    )


def _hint(spelt: Mapping[str, str]) -> str:
    names = list(spelt.values())
    return f'Use "{EVERYTHING}" for everything, or a part of a name such as {names[len(names) // 2]}.'


def _some(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
