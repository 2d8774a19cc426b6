"""What is known of a media file, and its one-line text for the cache."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any, Literal


class ProbeError(Exception):
    """A file that cannot be used, with its problem code."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True, kw_only=True)
class VisualFacts:
    """The header of a video or a picture."""

    kind: Literal["video", "image"]
    width: int
    """Pixels as displayed: turned where the file says so."""
    height: int
    frames: int
    """As the header or the index has it, otherwise counted; 1 for a picture."""
    fps: Fraction
    """0 where the file does not say, and for a picture."""
    variable: bool
    """Frames are not equally far apart."""
    square: bool
    """Pixels are square."""
    truncated: bool
    """The index points past the end of the file."""
    transparent: bool = False
    """Of a picture: it has an alpha channel, or colours that stand for nothing."""
    codec: str

    @property
    def duration(self) -> Fraction:
        """Seconds; 0 where the rate is not known."""
        return self.frames / self.fps if self.fps else Fraction(0)


@dataclass(frozen=True, kw_only=True)
class AudioFacts:
    """The header of a file with sound."""

    rate: int
    channels: int
    duration: Fraction
    """Seconds of sound."""
    offset: Fraction
    """Seconds from the start of the picture (or file) to the first sample."""
    silent: bool
    truncated: bool
    codec: str

    @property
    def end(self) -> Fraction:
        """Seconds from the start of the picture to the last sample."""
        return self.offset + self.duration


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A probe that failed."""

    code: str
    message: str


Facts = VisualFacts | AudioFacts | Failure
_KINDS: dict[str, type[VisualFacts] | type[AudioFacts] | type[Failure]] = {
    kind.__name__: kind for kind in (VisualFacts, AudioFacts, Failure)
}


_NAMES = {name: tuple(item.name for item in fields(kind)) for name, kind in _KINDS.items()}
_TYPES: dict[str, tuple[Any, ...]] = {name: tuple(item.type for item in fields(kind)) for name, kind in _KINDS.items()}


def encode_facts(facts: Facts) -> str:
    """``VisualFacts|video|640|…``: values in field order. A text that may hold the separator comes last."""
    name = type(facts).__name__
    return "|".join([name, *map(str, map(facts.__dict__.__getitem__, _NAMES[name]))])


def decode_facts(text: str) -> Facts:
    """The facts that ``encode_facts`` wrote."""
    name, _, rest = text.partition("|")
    parts = rest.split("|", len(_NAMES[name]) - 1)
    values = (_READ[kind](part) if kind in _READ else part for kind, part in zip(_TYPES[name], parts, strict=True))
    kept: dict[str, Any] = dict(zip(_NAMES[name], values, strict=True))
    return _KINDS[name](**kept)


def _fraction(text: str) -> Fraction:
    """``30000/1001``; four times as fast as the parser of Fraction, which a large cached set feels."""
    over, _, under = text.partition("/")
    return Fraction(int(over), int(under or 1))


_READ: dict[Any, Callable[[str], Any]] = {int: int, bool: "True".__eq__, Fraction: _fraction}
