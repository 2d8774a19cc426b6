"""The header of a video, read with PyAV."""

import os
import struct
from fractions import Fraction
from typing import TYPE_CHECKING, cast

from vfun_cli.metadata.facts import VisualFacts
from vfun_cli.metadata.pictures import probe_picture
from vfun_cli.metadata.timeline import read_timeline, shown_video

if TYPE_CHECKING:
    import av
    from av.video.stream import VideoStream


def probe_video(container: "av.container.InputContainer", path: str) -> VisualFacts:
    """Size, length and rate of the first video of an open file; raises ProbeError if it has none."""
    if container.format.name.endswith("_pipe") or container.format.name == "image2":
        return probe_picture(path)
    timeline = read_timeline(container)
    stream = cast("VideoStream", shown_video(container))
    context, frames, rate = stream.codec_context, len(timeline.times), timeline.rate
    last = stream.index_entries[-1] if len(stream.index_entries) else None
    width, height = context.width, context.height
    if container.format.name.startswith("mov") and _mp4_is_rotated(path, container.size):
        width, height = height, width
    return VisualFacts(
        kind="image" if frames == 1 and not rate else "video", width=width, height=height, frames=frames,
        fps=rate, variable=timeline.variable, duration=frames / rate if rate else Fraction(0),
        square=stream.sample_aspect_ratio in (None, 0, 1),
        truncated=last is not None and container.size < last.pos + last.size, codec=context.name,
    )  # fmt: skip


def _mp4_is_rotated(path: str, size: int) -> bool:
    """Whether an mp4 of ``size`` bytes shows its first picture track turned by a quarter (``moov/trak/tkhd``).

    PyAV tells the rotation only after decoding a frame, which takes ten times as long as the header
    (ISO/IEC 14496-12, 8.3.2: a 3x3 matrix, then width and height).
    """
    moov, at = _box(path, b"moov", size), 0
    while (at := moov.find(b"tkhd", at)) >= 0:
        at += 4
        start = at + (52 if moov[at : at + 1] == b"\x01" else 40)  # version 1 has 64-bit times
        if start + 44 > len(moov):
            return False
        across, turn, _, _, down, *_, width, height = struct.unpack_from(">11i", moov, start)
        if width > 0 and height > 0:  # a track with a picture
            return across == 0 and down == 0 and turn != 0
    return False


def _box(path: str, name: bytes, size: int) -> bytes:
    """The payload of a top-level box, or nothing."""
    file = os.open(path, os.O_RDONLY)
    try:
        position = 0
        while position + 8 <= size:
            head, header = os.pread(file, 16, position), 8
            length = int.from_bytes(head[:4], "big")
            if length == 1:
                length, header = int.from_bytes(head[8:16], "big"), 16
            if length == 0:
                length = size - position
            if length < header:
                break
            if head[4:8] == name:
                return os.pread(file, min(length, size - position) - header, position + header)
            position += length
        return b""
    finally:
        os.close(file)
