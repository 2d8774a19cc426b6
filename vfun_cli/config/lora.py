"""What can be said of the options of ``vfun lora`` before a launch, without torch and without the model."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vfun_cli import console
from vfun_cli.checkpoints.lora_files import read_adapter, strength
from vfun_cli.config.options import RunConfig, parse
from vfun_cli.errors import ConfigError, EnvironmentFault
from vfun_cli.families.spec import FamilySpec


def translate_targets(spec: FamilySpec, targets: tuple[str, ...]) -> tuple[str, ...]:
    """The documents' spelling of layers replaced by the real one, with a notice; each target once."""
    renamed = {target: spec.lora_aliases[target] for target in targets if target in spec.lora_aliases}
    if renamed:
        listed = ", ".join(f"{old} -> {new}" for old, new in renamed.items())
        console.warn(f"target_name: {spec.name} has no such layers, taken as the documents mean them: {listed}.")
    return tuple(dict.fromkeys(renamed.get(target, target) for target in targets))


def check(spec: FamilySpec, values: Mapping[str, Any]) -> None:
    """Refuse what LoRA training cannot do.

    Raises:
        ConfigError: a combination that cannot work.
        EnvironmentFault: a quantised base without a GPU.
    """
    if not values["target_name"]:
        raise ConfigError(
            "target_name is empty: no layer would get an adapter.",
            hint=f"{spec.name}'s own: --target-name {','.join(_own_targets(spec))}",
        )
    if tuple(values["trainable_modules"]) != (".",):
        raise ConfigError(
            "trainable_modules chooses weights of the model; LoRA trains adapters only.",
            hint="Choose layers with --target-name, or use vfun train.",
        )
    if not values["network_alpha"] > 0:
        raise ConfigError(f"network_alpha is {values['network_alpha']:g}: the adapters would have no effect.")
    if not values["lora_dropout"] < 1:
        raise ConfigError(f"lora_dropout is {values['lora_dropout']}; it is a probability below 1.")
    if values["use_dora"] and values["strategy"].startswith("zero3"):
        raise ConfigError(
            "use_dora needs a layer's whole weight in the forward pass, which ZeRO-3 keeps in parts.",
            hint="Choose --fsdp, --zero2 or --ddp.",
        )
    precision = values["base_precision"]
    if precision == "bf16":
        return
    if values["device"] != "cuda":
        raise EnvironmentFault(
            f"base_precision {precision} needs a GPU, this run is on {values['device']}.",
            hint="Use --base-precision bf16 here.",
        )
    if values["strategy"] not in ("single", "ddp"):
        raise ConfigError(
            f"base_precision {precision} with strategy {values['strategy']}: a quantised base cannot be sharded.",
            hint="Use --ddp, or --base-precision bf16, which the strategy spreads over the GPUs.",
        )
    if values["use_dora"]:
        raise ConfigError(
            f"use_dora needs the base's weights, base_precision {precision} keeps codes.", hint="Drop one of the two."
        )


def check_network(path: Path, config: RunConfig) -> None:
    """Whether an existing LoRA can be trained on with these options; says what becomes of its strength.

    Raises:
        CheckpointError: it cannot be read.
        ConfigError: another rank, or DoRA on one side only.
    """
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


def _own_targets(spec: FamilySpec) -> tuple[str, ...]:
    own: tuple[str, ...] = parse("target_name", spec.lora_defaults["target_name"], spec.name)
    return own
