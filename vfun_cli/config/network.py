"""What the adapters of a run start from: an existing LoRA (``--network-path``), laid on the layers that it trains.

Decided once, from names and shapes: before a launch those that the model's files state, in the run those of the model.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vfun_cli import console
from vfun_cli.checkpoints.lora_files import (
    AdapterFile,
    Pair,
    at_rank,
    match_layers,
    names_of,
    read_adapter,
    strength,
    taken_apart,
)
from vfun_cli.config.options import RunConfig
from vfun_cli.config.trainable import choose_layers, inside, linear_layers
from vfun_cli.errors import CheckpointError, ConfigError
from vfun_cli.families import detect
from vfun_cli.families.spec import FamilySpec, ModelDims


@dataclass(frozen=True, kw_only=True)
class Start:
    """A LoRA as this run takes it."""

    pairs: Mapping[str, Pair]
    """By the layer of the model, all of the run's rank; layers without one start fresh."""
    factors: Mapping[str, float]
    """What B is multiplied by, so that the run starts with the file's predictions."""
    idle: Sequence[str]
    """Layers of the file that never get a gradient in this model, and have no effect; they are left out."""


def check_network(path: Path, config: RunConfig, spec: FamilySpec) -> None:
    """Whether an existing LoRA can be trained on with these options; says how strong it is taken to be.

    Reads headers, and of a file with joint layers their B.

    Raises:
        CheckpointError: it or the model cannot be read, or it is of another model; with all that does not fit.
        ConfigError: it does not fit the run's options; with all of them.
    """
    adapter = read_adapter(path)
    model_dir = config.pretrained_model_name_or_path
    assert model_dir is not None
    start_of(adapter, linear_layers(model_dir, spec), config, spec, detect.read_dims(spec, model_dir))
    own = _strength(config)
    console.warn(adapter.told_strength())
    if None in adapter.scales:
        console.warn(f"{path} states no alpha: taken to be of this run's strength, {own:g}.")
    if any(scale is not None and not math.isclose(scale, own) for scale in adapter.scales):
        console.warn(f"this run has strength {own:g}: the B matrices of {path} are scaled so that it starts the same.")


def start_of(
    adapter: AdapterFile, linear: Mapping[str, tuple[int, ...]], config: RunConfig, spec: FamilySpec, dims: ModelDims
) -> Start:
    """Lay a LoRA on the adapters of a run.

    Args:
        linear: the model's linear layers, [out, in].

    Raises:
        CheckpointError: layers that the model lacks or has of another shape.
        ConfigError: layers that the run trains no adapter of, another rank, or DoRA on one side only.
    """
    parts = by_layer(adapter, linear, spec, dims)
    known = names_of(linear, spec.export.names["same"])
    without_gradient = spec.model.modules_without_gradient(dims)
    names = spec.export.names["same"]
    chosen = set(choose_layers(list(linear), config.target_name, names, without_gradient, config.lora_skip_name))
    unknown, left_out, misshapen = [], [], []
    pairs, ranks = dict[str, Pair](), dict[int, list[str]]()
    factors = dict[str, float]()
    for stored, pair in parts.pairs.items():
        layer = known.get(stored)
        if layer is None:
            unknown.append(stored)
        elif layer not in chosen:
            left_out += [] if _without_update(pair) else [layer]
        elif (pair.up.shape[0], pair.down.shape[1]) != linear[layer]:
            misshapen.append(layer)
        else:
            fitted = pair if pair.rank == config.rank else at_rank(pair, config.rank)
            if fitted is None:
                ranks.setdefault(pair.rank, []).append(layer)
            elif fitted.rank:
                scale = adapter.scale(pair)
                pairs[layer], factors[layer] = fitted, 1.0 if scale is None else scale / _strength(config)
    idle = inside(left_out, without_gradient)
    missing = [layer for layer in left_out if layer not in idle]
    said, typed = [], []
    if unknown:
        said.append(
            f"{len(unknown)} of {len(parts.pairs)} adapters are for layers that this model does not have: "
            f"{listed(unknown)}"
        )
    if misshapen:
        said.append(f"{len(misshapen)} layers have another shape in this model: {listed(misshapen)}")
    if missing:
        by = "--target-name and --lora-skip-name leave" if config.lora_skip_name else "--target-name leaves"
        said.append(f"it has adapters for {len(missing)} layers that {by} out: {listed(missing)}")
        targets = _targets(missing, linear, parts.pairs.keys(), config.target_name)
        typed += [f"--target-name {','.join(targets)}"] if targets != tuple(config.target_name) else []
        typed += ['--lora-skip-name ""'] if any(_skipped(layer, config) for layer in missing) else []
    if ranks:
        said.append(_told_ranks(ranks, parts, config.rank))
        rank = _common_rank(parts, config.rank)
        typed += [] if rank is None else [f"--rank {rank}"]
    dora = any(pair.magnitude is not None for pair in parts.pairs.values())
    if dora != config.use_dora:
        said.append("it is a DoRA" if dora else "it is no DoRA")
        typed += ["--use-dora"] if dora else []
    if unknown or misshapen:
        raise CheckpointError(f"{adapter.path}: {'; '.join(said)}.", hint="The LoRA belongs to another model.")
    if said:
        hint = f"Add {' '.join(typed)}." if typed else ""
        if ranks and rank is None:
            hint = "Layers of a run have one rank: merge it into a model, and train a new LoRA on that."
        elif config.use_dora and not dora:
            hint = f"Drop --use-dora. {hint}".strip()
        raise ConfigError(f"network_path {adapter.path} does not fit this run: {'; '.join(said)}.", hint=hint)
    return Start(pairs=pairs, factors=factors, idle=idle)


def by_layer(
    adapter: AdapterFile, linear: Mapping[str, tuple[int, ...]], spec: FamilySpec, dims: ModelDims
) -> AdapterFile:
    """The LoRA with the joint layers of other programs as those of this model that they join."""
    rows = {layer: shape[0] for layer, shape in linear.items()}
    locations = [
        (layer, location)
        for locate in (spec.export.comfyui_location, spec.export.original_location)
        if locate is not None
        for layer in linear
        if (location := locate(layer, dims)) is not None
    ]
    return taken_apart(adapter, locations, rows)


def matched(
    adapter: AdapterFile, linear: Mapping[str, tuple[int, ...]], spec: FamilySpec, dims: ModelDims
) -> tuple[AdapterFile, dict[str, str]]:
    """A LoRA to be added to a model: as :func:`by_layer`, and the model's layer of each of its names.

    Raises:
        CheckpointError: layers that the model does not have.
    """
    parts = by_layer(adapter, linear, spec, dims)
    return parts, match_layers(parts.pairs, linear, spec.export.names["same"], parts.path)


def _without_update(pair: Pair) -> bool:
    """Whether it is the part of a joint layer that was not trained with the others."""
    part = at_rank(pair, pair.rank)
    return part is not None and not part.rank


def _strength(config: RunConfig) -> float:
    return strength(config.network_alpha, config.rank, rslora=config.use_rslora)


def _told_ranks(ranks: Mapping[int, Sequence[str]], parts: AdapterFile, rank: int) -> str:
    """Which layers have another rank, and of parts of a joint layer why that is theirs."""
    found = []
    for each, layers in sorted(ranks.items()):
        what = f"it has rank {each}" if len(ranks) == 1 else f"rank {each} in {listed(layers)}"
        if any(pair.joint and pair.rank == each for pair in parts.pairs.values()):
            what += f" (joint layers of the file, whose parts use all {each} directions of one A)"
        found.append(what)
    return f"{', '.join(found)}, this run has rank {rank}"


def _common_rank(parts: AdapterFile, wrong: int) -> int | None:
    """A rank at which every layer of the file can be taken, smallest first."""
    for rank in sorted(parts.ranks - {wrong}):
        if all(pair.rank == rank or at_rank(pair, rank) is not None for pair in parts.pairs.values()):
            return rank
    return None


def _targets(
    missing: Sequence[str], linear: Iterable[str], stored: Iterable[str], targets: Sequence[str]
) -> tuple[str, ...]:
    """The targets with the endings of what is missing: the shortest that means no other layer, where there is one."""
    found = list(targets)
    wanted, others = set(missing) | set(stored), list(linear)
    for layer in missing:
        if any(_ends(layer, ending) for ending in found):
            continue
        parts = _BLOCK.sub("", layer).split(".")
        endings = [".".join(parts[-count:]) for count in range(1, len(parts) + 1) if not parts[-count].isdecimal()]
        exact = (e for e in endings if all(other in wanted for other in others if _ends(other, e)))
        found.append(next(exact, endings[-1]))
    return tuple(found)


def _skipped(layer: str, config: RunConfig) -> bool:
    """Whether a target means the layer, so that only ``--lora-skip-name`` can have left it out."""
    return bool(config.lora_skip_name) and any(_ends(layer, target) for target in config.target_name)


_BLOCK = re.compile(r"^.*\.\d+\.(?=\D)")
"""What comes before a layer's name inside its block."""


def _ends(layer: str, ending: str) -> bool:
    return layer == ending or layer.endswith(f".{ending}")


def listed(layers: Iterable[str]) -> str:
    """All of the layers, those that differ in the number of their block together: ``blocks.0-29.attn1.to_q``."""
    numbers: dict[tuple[str, str], list[int]] = {}
    for layer in dict.fromkeys(layers):
        found = _NUMBERED.fullmatch(layer)
        key = (found["before"], found["after"]) if found else (layer, "")
        numbers.setdefault(key, []).extend([int(found["number"])] if found else [])
    return ", ".join(f"{before}{_runs(found)}{after}" for (before, after), found in numbers.items())


_NUMBERED = re.compile(r"(?P<before>.*?blocks[._])(?P<number>\d{1,9})(?P<after>[._].*)")


def _runs(numbers: Sequence[int]) -> str:
    """``0-2+5`` of 0, 1, 2 and 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "+".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)
