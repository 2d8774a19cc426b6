"""What a measurement is asked for."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The micro-batch of a bucket."""

    frames: int
    height: int
    width: int
    """In pixels."""
    clips: int = 1
