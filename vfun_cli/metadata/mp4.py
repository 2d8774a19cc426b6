"""What the ``moov`` of an mp4 or mov says of its picture that PyAV tells only after decoding, or entry by entry."""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PictureTrack:
    """The first track with a picture (boxes: ISO/IEC 14496-12)."""

    turned: bool
    """Shown turned by a quarter."""
    step: int | None
    """Ticks from each picture to the next, if that is one number."""
    pictures: int
    """How many have a time."""
    leads: bool
    """The second picture is shown before the first: those in front of a cut, which may not decode."""
    parts: int
    """Pieces that the edit list puts one after another; 0 without one. An empty piece in front does not count."""


def picture_track(path: str, size: int) -> PictureTrack | None:
    """Of a file of ``size`` bytes; None where it has no such track in the usual form."""
    moov = _moov(path, size)
    for name, trak in _boxes(moov):
        if name != b"trak" or (header := _find(trak, b"tkhd", 48)) is None:
            continue
        # Version 1 has 64-bit times. A 3x3 matrix, then width and height (8.3.2).
        matrix = trak[header + (52 if trak[header] == 1 else 40) :][:44]
        if len(matrix) < 44:
            return None
        across, turn, _, _, down, *_, width, height = struct.unpack(">11i", matrix)
        if width <= 0 or height <= 0:
            continue
        step, pictures = _step(trak)
        return PictureTrack(
            turned=across == 0 and down == 0 and turn != 0, step=step, pictures=pictures,
            leads=step is not None and _leads(trak, step), parts=_parts(trak),
        )  # fmt: skip
    return None


def _step(trak: bytes) -> tuple[int | None, int]:
    """The one step between decoding times, the last left out, and how many there are (8.6.1.2: runs of count, step)."""
    at = _find(trak, b"stts", 8)
    if at is None:
        return None, 0
    runs = int.from_bytes(trak[at + 4 : at + 8], "big")
    if runs > 2 or at + 8 + 8 * runs > len(trak):
        return None, 0
    (count, step), (last, _) = (*struct.iter_unpack(">II", trak[at + 8 : at + 8 + 8 * runs]), (0, 0), (0, 0))[:2]
    return (step if step and last <= 1 else None), count + last


def _leads(trak: bytes, step: int) -> bool:
    """8.6.1.3: runs of count and time between decoding and showing."""
    at = _find(trak, b"ctts", 24)
    if at is None:
        return False
    count, first, _, second = struct.unpack_from(">IiIi", trak, at + 8)
    return bool(count == 1 and step + second < first)


def _parts(trak: bytes) -> int:
    """8.6.6: duration, media time and rate of each part; time -1 is an empty one."""
    at = _find(trak, b"elst", 12)
    if at is None:
        return 0
    wide = trak[at] == 1
    first = trak[at + 16 : at + 24] if wide else trak[at + 12 : at + 16]
    return int.from_bytes(trak[at + 4 : at + 8], "big") - (first == b"\xff" * len(first))


def _find(trak: bytes, name: bytes, least: int) -> int | None:
    """Where the payload of a box begins, if it has at least so many bytes."""
    at = trak.find(name) + 4
    return at if at >= 4 and at + least <= len(trak) else None


def _boxes(payload: bytes) -> Iterator[tuple[bytes, bytes]]:
    position = 0
    while position + 8 <= len(payload):
        length = int.from_bytes(payload[position : position + 4], "big")
        if length < 8:
            return
        yield payload[position + 4 : position + 8], payload[position + 8 : position + length]
        position += length


def _moov(path: str, size: int) -> bytes:
    """The payload of the top-level box, or nothing."""
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
            if head[4:8] == b"moov":
                return os.pread(file, min(length, size - position) - header, position + header)
            position += length
        return b""
    finally:
        os.close(file)
