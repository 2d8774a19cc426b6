"""What can be said of the options of ``vfun lora`` before a launch, without torch and without the model."""

from vfun_cli import console
from vfun_cli.families.spec import FamilySpec


def translate_targets(spec: FamilySpec, targets: tuple[str, ...]) -> tuple[str, ...]:
    """The published spelling of layers replaced by the real one, with a notice; each target once."""
    renamed = {target: spec.defaults.lora_aliases[target] for target in targets if target in spec.defaults.lora_aliases}
    if renamed:
        listed = ", ".join(f"{old} -> {new}" for old, new in renamed.items())
        console.warn(f"target_name: {spec.name} has no such layers, taken as the published guides mean them: {listed}.")
    return tuple(dict.fromkeys(renamed.get(target, target) for target in targets))
