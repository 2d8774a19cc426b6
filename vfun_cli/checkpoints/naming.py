"""What other programs call the parameters and layers of a transformer."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LayerLocation:
    """Where another program keeps a layer: under a name of its own, maybe as some rows of a joint layer."""

    name: str
    first_row: int = 0
    rows: int | None = None
    """Of the joint layer; None: the layer is one there too."""


def unchanged(name: str) -> str:
    """The name of a parameter in a format that has the same names."""
    return name
