"""The families vfun trains, in one explicit list."""

from pathlib import Path
from typing import TYPE_CHECKING

from vfun_cli.errors import CheckpointError, ConfigError, did_you_mean
from vfun_cli.families.cogvideox_fun import SPEC as COGVIDEOX_FUN
from vfun_cli.families.easyanimate_control import V5 as EASYANIMATE_V5
from vfun_cli.families.easyanimate_control import V5_1 as EASYANIMATE_V5_1
from vfun_cli.families.hunyuanvideo import I2V as HUNYUANVIDEO_I2V
from vfun_cli.families.hunyuanvideo import T2V as HUNYUANVIDEO_T2V
from vfun_cli.families.spec import FamilySpec
from vfun_cli.families.wan_fun_control import SPEC as WAN_FUN_CONTROL
from vfun_cli.families.wan_s2v import SPEC as WAN_S2V
from vfun_cli.imports import named

if TYPE_CHECKING:
    from vfun_cli.modeling.adapter import ModelAdapter

FAMILIES: dict[str, FamilySpec] = {
    spec.name: spec
    for spec in (
        WAN_S2V,
        WAN_FUN_CONTROL,
        HUNYUANVIDEO_T2V,
        HUNYUANVIDEO_I2V,
        EASYANIMATE_V5_1,
        EASYANIMATE_V5,
        COGVIDEOX_FUN,
    )
}


def find(name: str) -> FamilySpec:
    """The family of that name.

    Raises:
        ConfigError: no such family; the message lists them.
    """
    if name not in FAMILIES:
        raise ConfigError(
            f"unknown family {name!r}.{did_you_mean(name, FAMILIES)}", hint=f"Families: {', '.join(FAMILIES)}."
        )
    return FAMILIES[name]


def stated_in(file: Path, name: str) -> FamilySpec:
    """The family that a file of a run states.

    Raises:
        CheckpointError: no such family.
    """
    try:
        return find(name)
    except ConfigError as error:
        raise CheckpointError(f"{file} is damaged, or of a newer vfun: {error.message}", hint=error.hint) from None


def adapter_of(spec: FamilySpec) -> "type[ModelAdapter]":
    """The family's adapter class; this loads torch."""
    found: type[ModelAdapter] = named(spec.adapter)
    return found
