"""A model of few layers in the place of one of many: a pass of it takes a tenth of a second."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vfun_cli.families.spec import FamilySpec

FEWEST = 2
"""Layers of the rarest kind: of a single one, the first and the last layer of a kind would be the same."""


@dataclass(frozen=True, kw_only=True)
class Directions:
    """A model's ``config.json`` with few layers, and how to go from there to all of them."""

    few: dict[str, Any]
    more: list[tuple[dict[str, Any], int, int]]
    """The same with one layer more of some kind, how many of those the whole model has beyond ``few``, and in all."""


def directions(spec: FamilySpec, stated: Mapping[str, Any]) -> Directions | None:
    """None where the model has few layers itself."""
    counts = layer_counts(spec, stated)
    kinds = sorted(set(counts.values()))  # what a model has as many of may be parts of one layer, and goes together
    few = {count: FEWEST + rank for rank, count in enumerate(kinds)}
    if any(few[count] >= count for count in kinds):
        return None

    def settings(numbers: Mapping[int, int]) -> dict[str, Any]:
        return {**stated, **spec.model.with_layers({key: numbers[count] for key, count in counts.items()})}

    more = [(settings({**few, kind: few[kind] + 1}), kind - few[kind], kind) for kind in kinds]
    return Directions(few=settings(few), more=more)


def layer_counts(spec: FamilySpec, stated: Mapping[str, Any]) -> dict[str, int]:
    """How many layers of each kind a configuration states, by its keys; as released where it states none."""
    values: dict[str, Any] = {
        key: stated[key] if stated.get(key) is not None else spec.model.released[key] for key in spec.model.layers
    }
    return {key: value if isinstance(value, int) else len(value) for key, value in values.items()}
