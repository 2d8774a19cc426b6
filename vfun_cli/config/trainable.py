"""What trains, from names alone, before a launch and again in the run: the parameters that ``--trainable-modules``
means, the layers that get an adapter by ``--target-name`` and ``--lora-skip-name``.

People type parts of the released names, as the original scripts take them. Some modules have diffusers' names here; a
part that only those contain is taken too, with a notice.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from vfun_cli.checkpoints.lora_files import released_layer
from vfun_cli.checkpoints.naming import unchanged
from vfun_cli.checkpoints.released import tensor_shapes
from vfun_cli.config.options import RunConfig
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


def choose_from_files(
    parts: Sequence[str], model_dir: Path, spec: FamilySpec, dims: ModelDims
) -> tuple[Chosen, list[tuple[int, ...]]]:
    """The same from the files of a model directory, before anything is started; and the shapes of what is chosen.

    Raises:
        CheckpointError: there are no weights in it.
        ConfigError: as of :func:`choose`.
    """
    shapes = parameter_shapes(model_dir, spec)
    chosen = choose(parts, shapes, spec.export.names["same"], spec.model.modules_without_gradient(dims))
    return chosen, [shapes[name] for name in chosen.names]


def adapter_shapes(config: RunConfig, model_dir: Path, spec: FamilySpec, dims: ModelDims) -> list[tuple[int, ...]]:
    """Of the adapters of a LoRA, from the files of the model that it is for.

    Raises:
        CheckpointError: there are no weights in it.
        ConfigError: as of :func:`choose_layers`.
    """
    linear = linear_layers(model_dir, spec)
    idle = spec.model.modules_without_gradient(dims)
    layers = choose_layers(list(linear), config.target_name, spec.export.names["same"], idle, config.lora_skip_name)
    found: list[tuple[int, ...]] = []
    for outputs, inputs in (linear[layer] for layer in layers):
        found += [(config.rank, inputs), (outputs, config.rank), *([(outputs,)] if config.use_dora else [])]
    return found


def linear_layers(model_dir: Path, spec: FamilySpec) -> dict[str, tuple[int, ...]]:
    """The layers that can have an adapter, by their own names, [out, in], from the headers of the model's files.

    Raises:
        CheckpointError: as of :func:`parameter_shapes`.
    """
    shapes = parameter_shapes(model_dir, spec)
    return {name.removesuffix(".weight"): shape for name, shape in shapes.items()
            if name.endswith(".weight") and len(shape) == 2}  # fmt: skip


def parameter_shapes(model_dir: Path, spec: FamilySpec) -> dict[str, tuple[int, ...]]:
    """Of the transformer's parameters, by their own names, from the headers of its files.

    Raises:
        CheckpointError: there are no weights in the directory, or they are damaged.
    """
    stored = tensor_shapes(spec.model.transformer_dir(model_dir))
    return {spec.export.parameter(name): shape for name, shape in stored.items()}


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


def choose_layers(
    linear: Sequence[str],
    targets: Sequence[str],
    released: Callable[[str], str],
    without_gradient: Sequence[str] = (),
    skipped: Sequence[str] = (),
) -> list[str]:
    """The linear layers whose name, the module's or the released one, is a target or ends in ``.<target>``.

    Layers inside ``without_gradient`` are left out: their adapters would never change. So are those of which either
    name contains one of ``skipped``.

    Raises:
        ConfigError: a target that matches nothing, with the nearest endings that there are; what is to be skipped is
            in no name, or in every one.
    """
    chosen: set[str] = set()
    for target in targets:
        found = {layer for layer in linear if _ends(layer, target) or _ends(released_layer(layer, released), target)}
        if not found:
            near = _near_misses(linear, target, released)
            raise ConfigError(
                f"target_name: {target!r} is the ending of no linear layer of the transformer."
                + (f" Near misses: {', '.join(near)}." if near else ""),
                hint="Name endings such as to_q or attn1.to_q, comma-separated.",
            )
        chosen |= found
    unreachable = inside(linear, without_gradient)
    layers = [layer for layer in linear if layer in chosen and layer not in unreachable]
    if not layers:
        raise ConfigError("target_name: none of the chosen layers ever gets a gradient.", hint="Choose other layers.")
    return _without(skipped, {layer: released_layer(layer, released) for layer in layers})


def _without(skipped: Sequence[str], layers: Mapping[str, str]) -> list[str]:
    """The layers of which neither name contains one of ``skipped``; ``layers`` has the released one of each."""
    for part in skipped:
        if not any(part in name for names in layers.items() for name in names):
            words = {word for names in layers.items() for name in names for word in (name, *name.split("."))}
            some = list(layers.values())[-1]
            raise ConfigError(
                f"lora_skip_name: {part!r} is in the name of none of the {len(layers)} layers that get an adapter."
                + did_you_mean(part, words),
                hint=f"Drop it, or name a part of one of them, such as {some}.",
                option="--lora-skip-name",
            )
    left = [layer for layer, name in layers.items() if not any(part in layer or part in name for part in skipped)]
    if not left:
        raise ConfigError(
            f"lora_skip_name: all {len(layers)} layers that target_name chooses are skipped.",
            hint="Skip fewer, or choose others with --target-name.",
            option="--lora-skip-name",
        )
    return left


def inside(layers: Sequence[str], modules: Sequence[str]) -> list[str]:
    """The layers that are one of the modules or lie in one."""
    starts = tuple(f"{module}." for module in modules)
    return [layer for layer in layers if f"{layer}.".startswith(starts)]


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _near_misses(linear: Sequence[str], target: str, released: Callable[[str], str]) -> list[str]:
    """Endings like the target: what lies below it, if it is a module; else what is spelt alike."""
    endings: dict[str, None] = {}
    below: dict[str, None] = {}
    for layer in linear:
        for name in (layer, released_layer(layer, released)):
            parts = name.split(".")
            endings |= {".".join(parts[-count:]): None for count in range(1, min(len(parts), 4) + 1)}
            if f".{target}." in f".{name}":
                below[target + f".{name}".rpartition(f".{target}")[2]] = None
    return list(below)[:4] or get_close_matches(target, list(endings), n=4, cutoff=0.5)
