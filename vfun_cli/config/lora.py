"""What can be said of the options of ``vfun lora`` before a launch, without torch and without the model."""

import math
from pathlib import Path

from vfun_cli import console
from vfun_cli.config.options import RunConfig
from vfun_cli.errors import ConfigError
from vfun_cli.families.spec import FamilySpec


def translate_targets(spec: FamilySpec, targets: tuple[str, ...]) -> tuple[str, ...]:
    """The published spelling of layers replaced by the real one, with a notice; each target once."""
    renamed = {target: spec.defaults.lora_aliases[target] for target in targets if target in spec.defaults.lora_aliases}
    if renamed:
        listed = ", ".join(f"{old} -> {new}" for old, new in renamed.items())
        console.warn(f"target_name: {spec.name} has no such layers, taken as the published guides mean them: {listed}.")
    return tuple(dict.fromkeys(renamed.get(target, target) for target in targets))


def check_network(path: Path, config: RunConfig) -> None:
    """Whether an existing LoRA can be trained on with these options; says what becomes of its strength.

    Raises:
        CheckpointError: it cannot be read.
        ConfigError: another rank, or DoRA on one side only.
    """
    from vfun_cli.checkpoints.lora_files import read_adapter, strength

    adapter = read_adapter(path)
    if adapter.ranks != {config.rank}:
        found = ", ".join(map(str, sorted(adapter.ranks)))
        raise ConfigError(
            f"network_path {path} has rank {found}, this run has rank {config.rank}.",
            hint=f"Add --rank {min(adapter.ranks)}." if len(adapter.ranks) == 1 else "Merge it into a model instead.",
        )
    if any(pair.magnitude is not None for pair in adapter.pairs.values()) != config.use_dora:
        raise ConfigError(
            f"network_path {path} {'is no DoRA' if config.use_dora else 'is a DoRA'}.",
            hint="Drop --use-dora." if config.use_dora else "Add --use-dora.",
        )
    own = strength(config.network_alpha, config.rank, rslora=config.use_rslora)
    scales = {adapter.scale(pair) for pair in adapter.pairs.values()}
    if None in scales:
        console.warn(f"{path} states no alpha: taken to be of this run's strength, {own:g}.")
    other = sorted(scale for scale in scales if scale is not None and not math.isclose(scale, own))
    if other:
        console.warn(
            f"{path} has strength {other[0]:g}, this run {own:g}: its B matrices are scaled so that it starts the same."
        )
