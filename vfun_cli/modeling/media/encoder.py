"""How videos are encoded that vfun writes: free of torch, for who has bytes already."""

from fractions import Fraction
from typing import Any

X264 = {"crf": "12", "preset": "veryfast", "mbtree": "0"}
"""Differences that 12 leaves are not seen: what looks wrong in a sample is the model's.

Without its macroblock tree, which with AVX-512 reads memory that nothing has written: of the same small pictures, one
call in two made another file.
"""
PLAYED_AT_ONCE = {"movflags": "+faststart", "max_interleave_delta": "0"}
"""The index comes before what it lists, and picture and sound of one second beside each other, as far apart as they
are given to the container: FFmpeg alone puts them in order over 10 s."""


def add_video(container: Any, *, height: int, width: int, fps: Fraction) -> Any:
    """A stream for pictures, in a container that is written: H.264 (MPEG-4 where this build of PyAV has no x264)."""
    import av
    from av.video.reformatter import ColorRange, Colorspace

    with_x264 = "libx264" in av.codecs_available
    stream = container.add_stream("libx264" if with_x264 else "mpeg4", rate=fps)
    stream.height, stream.width = height, width
    # Subsampled chroma is what every player shows, but it needs even sides.
    even = height % 2 == 0 and width % 2 == 0
    stream.pix_fmt = "yuv420p" if even or not with_x264 else "yuv444p"
    # What FFmpeg converts to. Players that are told nothing take BT.709 from 720 lines on, and colours shift.
    stream.codec_context.colorspace, stream.codec_context.color_range = Colorspace.ITU601, ColorRange.MPEG
    stream.options = X264 if with_x264 else {"qscale": "2"}
    return stream
