"""How long a clip a video can give: the one rule that validation, plan, messages and decoding share.

Plain arithmetic, of one video in whole numbers or of many in numpy columns.
"""

from dataclasses import dataclass
from fractions import Fraction
from itertools import count
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from vfun_cli.metadata.table import IntArray

Number = TypeVar("Number", int, "IntArray")

Span = tuple[Fraction, Fraction]
"""Part of a video, from its first to its last frame."""
WHOLE: Span = (Fraction(0), Fraction(1))


def usable_frames(frames: Number, span: Span) -> tuple[Number, Number]:
    """First and end (excluded) of the source frames that clips are cut from.

    The first counts from 0 to the end, as in the original: (0.1, 0.9) of 200 frames is 18 to 180.
    """
    first, end = span
    stop = frames * end.numerator // end.denominator
    return stop * first.numerator // first.denominator, stop


def source_frames(clip_frames: int, stride: int) -> int:
    """Source frames from the first to the last frame of a clip, both included."""
    return (clip_frames - 1) * stride + 1


@dataclass(frozen=True, kw_only=True)
class ClipNeeds:
    """What a family and the settings ask of a video at least."""

    min_frames: int = 1
    """Frames of the shortest clip."""
    stride: int = 1
    """Source frames per clip frame."""
    max_fps: int | None = None
    """The stride is raised until whole frames per second are at most this (Wan-S2V: 30)."""
    usable_span: Span = WHOLE
    """Part of a video that clips are cut from."""

    def stride_at(self, fps_num: Number, fps_den: Number) -> Number | int:
        """The stride in a video of ``fps_num / fps_den`` frames per second.

        As the original, the limit looks at whole frames per second: an average rate of 30.02 counts as 30.
        """
        if self.max_fps is None:
            return self.stride
        # The smallest s with floor(num / (den * s)) <= max, that is num < (max + 1) * den * s; then the larger of both.
        least = fps_num // ((self.max_fps + 1) * fps_den) + 1
        return least + (least < self.stride) * (self.stride - least)

    def clip_frames(self, frames: Number, stride: Number | int) -> Number:
        """Frames of the longest clip that a video of ``frames`` frames gives; 0 if it gives none."""
        first, stop = usable_frames(frames, self.usable_span)
        return (stop - first - 1) // stride + 1

    def shortest_video(self, stride: int) -> int:
        """Frames that a video must have to be used at this stride."""
        lengths = count(source_frames(self.min_frames, stride))
        return next(length for length in lengths if self.clip_frames(length, stride) >= self.min_frames)
