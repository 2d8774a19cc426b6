"""What has the shape of a clip."""

from typing import Protocol


class Shaped(Protocol):
    """Anything with a clip's shape."""

    @property
    def frames(self) -> int:
        """Of pixels."""

    @property
    def height(self) -> int:
        """In pixels."""

    @property
    def width(self) -> int:
        """In pixels."""
