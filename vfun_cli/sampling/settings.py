"""The settings of a video: which there are, which a family can make, and what they are where nobody says."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from itertools import count
from typing import Any

from vfun_cli.errors import ConfigError, as_flag
from vfun_cli.families.spec import FamilySpec, ModelDims
from vfun_cli.metadata.facts import VisualFacts
from vfun_cli.plan.sizes import round_frames
from vfun_cli.typed_json import Check, flag, number, text, whole

SEED = 43
"""Of all predict scripts of the originals."""
MOST_STEPS = 1000
"""Of which a schedule has so many timesteps."""
LONGEST_PROMPT = 100_000

CHECKS: Mapping[str, Check] = {
    "prompt": text(LONGEST_PROMPT),
    "negative_prompt": text(LONGEST_PROMPT),
    "seed": whole(),
    "steps": whole(1, MOST_STEPS),
    "guidance": number(0, 1000),
    "strength": number(0, 1),
    "start_from_ref": flag,
    "frames": whole(1, 10_000),
    "height": whole(1, 1 << 20),
    "width": whole(1, 1 << 20),
    "row": whole(),
}
"""The settings of a row. ``row`` decides its noise; it is the place of the row, where none is stated."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Settings that hold for every video; None leaves one to the row, then to the family."""

    steps: int | None = None
    guidance: float | None = None
    strength: float | None = None
    start_from_ref: bool | None = None
    negative_prompt: str | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    seed: int | None = None


def check_wanted(wanted: Wanted, spec: FamilySpec, dims: ModelDims) -> None:
    """Refuse settings with which no video can be made, before any file is looked at.

    Raises:
        ConfigError: with the nearest that can.
    """
    for item in fields(wanted):
        value = getattr(wanted, item.name)
        if value is None:
            continue
        try:
            check_setting(item.name, value, spec, dims)
        except ValueError as error:
            raise ConfigError(f"{as_flag(item.name)}: {error}.") from None


def check_setting(name: str, value: Any, spec: FamilySpec, dims: ModelDims) -> None:
    """Refuse a value that a setting cannot have in a video of this model.

    Raises:
        ValueError: with the nearest that it can.
    """
    CHECKS[name](name, value)
    if name in _OF_THE_FAMILY:
        _OF_THE_FAMILY[name](value, spec, dims)


def size_of(stated: Mapping[str, Any], like: VisualFacts | None, spec: FamilySpec) -> tuple[int, int]:
    """(height, width): what is stated; a side that is not, by the aspect of what the video is made from.

    With neither stated, at the area of the family's size.
    """
    usual = spec.sampling.size
    height: int | None = stated.get("height")
    width: int | None = stated.get("width")
    aspect = Fraction(*usual) if like is None else Fraction(like.height, like.width)
    if height is not None:
        return height, on_grid(height / aspect, 1, spec) if width is None else width
    if width is not None:
        return on_grid(width * aspect, 0, spec), width
    if like is None:
        return usual
    scaled = Fraction(math.sqrt(usual[0] * usual[1] * aspect))
    return on_grid(scaled, 0, spec), on_grid(scaled / aspect, 1, spec)


def usual_frames(spec: FamilySpec, dims: ModelDims) -> int:
    """How long a video is where nothing is said.

    Raises:
        ConfigError: this model makes none that long.
    """
    try:
        return round_frames(spec.sampling.frames, spec, dims)
    except ConfigError as error:
        raise ConfigError(error.message, hint="Say how many with --frames.") from None


def _check_frames(frames: int, spec: FamilySpec, dims: ModelDims) -> None:
    if _can_have(frames, spec, dims):
        return
    others = (other for distance in count(1) for other in (frames - distance, frames + distance) if other > 0)
    near = next(other for other in others if _can_have(other, spec, dims))
    raise ValueError(
        f"{spec.name} makes videos of {spec.plan.frame_rule} frames, not of {frames}; the nearest is {near}"
    )


def _can_have(frames: int, spec: FamilySpec, dims: ModelDims) -> bool:
    try:
        return round_frames(frames, spec, dims) == frames
    except ConfigError:  # more than the model has positions for
        return False


def _check_side(axis: int) -> Callable[[int, FamilySpec, ModelDims], None]:
    def check(side: int, spec: FamilySpec, dims: ModelDims) -> None:
        step, least = spec.plan.grid[axis], spec.plan.smallest_side
        near = on_grid(Fraction(side), axis, spec)
        if side != near:
            floor = f", at least {least}" if least > step else ""
            raise ValueError(f"{spec.name} makes multiples of {step} pixels{floor}, not {side}; the nearest is {near}")

    return check


def on_grid(side: Fraction, axis: int, spec: FamilySpec) -> int:
    """The nearest side that the family can make."""
    step = spec.plan.grid[axis]
    return max(-(-spec.plan.smallest_side // step), round(side / step)) * step


def _check_strength(strength: float, spec: FamilySpec, dims: ModelDims) -> None:
    if spec.sampling.strength is None:
        raise ValueError(f"{spec.name} edits no clip")


def _check_start(start: bool, spec: FamilySpec, dims: ModelDims) -> None:
    if start and not spec.sampling.by_sound:
        raise ValueError(f"{spec.name} always starts from an image that it is given")


_OF_THE_FAMILY: Mapping[str, Callable[[Any, FamilySpec, ModelDims], None]] = {
    "strength": _check_strength,
    "start_from_ref": _check_start,
    "frames": _check_frames,
    "height": _check_side(0),
    "width": _check_side(1),
}
