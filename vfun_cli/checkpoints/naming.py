"""What other programs call the parameters and layers of a transformer, and files what belongs to a parameter."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

Span = tuple[int, int, int]
"""A run of a layer's rows: its first row here, its first row in the other program's tensor, how many."""


@dataclass(frozen=True, kw_only=True)
class LayerLocation:
    """Where another program keeps a layer: under a name of its own, maybe as some rows of a joint layer."""

    name: str
    first_row: int = 0
    rows: int | None = None
    """Of the joint layer; None: the layer is one there too."""

    def spans(self, count: int) -> list[Span]:
        """Where the layer's ``count`` rows lie there.

        They go on at the top where the joint layer ends: so a layer whose halves change places is one, too.
        """
        before_end = count if self.rows is None else min(count, self.rows - self.first_row)
        wrapped = [(before_end, 0, count - before_end)] if before_end < count else []
        return [(0, self.first_row, before_end), *wrapped]


def unchanged(name: str) -> str:
    """The name of a parameter in a format that has the same names."""
    return name


T = TypeVar("T")

PARAMETER_GROUPS = "param_groups."
"""Before the names, in an optimizer's file, of what it keeps for groups of parameters: ``param_groups.0.d``."""


def by_parameter(entries: Mapping[str, T], parameters: Iterable[str]) -> dict[str, dict[str, T]]:
    """Entries ``<parameter>.<name>`` by parameter and name; those of no parameter are left out."""
    found: dict[str, dict[str, T]] = {parameter: {} for parameter in parameters}
    for entry, value in entries.items():
        head, _, name = entry.rpartition(".")
        while head and head not in found:
            head, _, more = head.rpartition(".")
            name = f"{more}.{name}"
        if head:
            found[head][name] = value
    return found
