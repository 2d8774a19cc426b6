"""What a family can read from a row of the metadata."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class MetadataField:
    """A metadata key that a family reads, apart from ``text`` and ``type``."""

    name: str
    media: Literal["visual", "control", "audio"]
    required: bool = True
