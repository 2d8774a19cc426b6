"""The header of a video, read with PyAV."""

import os
import struct
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING

from vfun_cli.metadata.facts import ProbeError, VisualFacts
from vfun_cli.metadata.pictures import probe_picture

if TYPE_CHECKING:
    import av


def probe_video(container: "av.container.InputContainer", path: str) -> VisualFacts:
    """Size, length and rate of the first video of an open file; raises ProbeError if it has none."""
    if not container.streams.video:
        raise ProbeError("no-video-stream", "there is no picture in it")
    if container.format.name.endswith("_pipe") or container.format.name == "image2":
        return probe_picture(path)
    stream = container.streams.video[0]
    context = stream.codec_context
    rate, frames, variable, truncated = stream.average_rate or Fraction(0), stream.frames, False, False
    index = stream.index_entries
    if len(index):
        last = index[-1]
        truncated = container.size < last.pos + last.size
    if not frames or 0 < len(index) < frames:  # AVI counts frames that were never written
        stamps = [packet.pts for packet in container.demux(stream) if packet.size]
        times = sorted(stamp for stamp in stamps if stamp is not None)
        frames, variable = len(stamps), _uneven(times)
        if stamps and not times:  # a raw stream: FFmpeg would make up 25 frames a second
            rate = Fraction(0)
        if variable and stream.time_base and times[-1] > times[0]:
            rate = Fraction(frames - 1) / ((times[-1] - times[0]) * stream.time_base)
    elif stream.average_rate != stream.base_rate:
        # Two different rates are a sign, no proof: the spacing in the index decides.
        variable = _uneven(sorted(entry.timestamp for entry in index)) if len(index) else True
    width, height = context.width, context.height
    if container.format.name.startswith("mov") and _mp4_is_rotated(path, container.size):
        width, height = height, width
    square = stream.sample_aspect_ratio in (None, 0, 1)
    return VisualFacts(
        kind="image" if frames == 1 and not rate else "video", width=width, height=height, frames=frames,
        fps=Fraction(rate), variable=variable, duration=frames / rate if rate else Fraction(0),
        square=square, truncated=truncated, codec=context.name,
    )  # fmt: skip


def _uneven(times: list[int]) -> bool:
    """Whether sorted timestamps differ by more than the rounding of the container's clock."""
    if len(times) < 3:
        return False
    steps = [later - earlier for earlier, later in pairwise(times)]
    # The last step is left out: encoders end a file as they like.
    body = steps[:-1] if len(steps) > 2 else steps
    return max(body) - min(body) > max(2, sum(steps) / len(steps) / 10)


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
