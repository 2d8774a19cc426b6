"""What the ``moov`` of an mp4 or mov says of its picture that PyAV tells only after decoding, or entry by entry."""

import os
import struct
from dataclasses import dataclass

FIRST_READ = 1 << 14
"""Bytes read at once: the headers of short clips whole."""
LARGEST_MOOV = 1 << 28
"""Bytes: a film of a day has a tenth of it. A header may state any number, and as much memory would be asked for."""
LONGEST_BOX = 1 << 62
"""Bytes: of a longer one the end is no position in a file."""
MATRIX_AND_SIZE = struct.Struct(">11i")


@dataclass(frozen=True, kw_only=True)
class PictureTrack:
    """The first track with a picture (boxes: ISO/IEC 14496-12)."""

    codec: str
    """The four letters of its codec, such as avc1."""
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


def picture_track(path: str) -> PictureTrack | None:
    """Of a file; None where it has no such track in the usual form.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    moov = _moov(path)
    end = 0
    while (begin := moov.find(b"tkhd", end)) >= 0:
        end = moov.find(b"tkhd", begin + 4)
        trak = moov[begin + 4 : end if end >= 0 else len(moov)]
        if len(trak) < 96:
            return None
        # Version 1 has 64-bit times. A 3x3 matrix, then width and height (8.3.2).
        across, turn, _, _, down, *_, width, height = MATRIX_AND_SIZE.unpack_from(trak, 52 if trak[0] == 1 else 40)
        if width > 0 and height > 0:
            step, pictures = _step(trak)
            stsd = _find(trak, b"stsd", 16)
            codec = "" if stsd is None else trak[stsd + 12 : stsd + 16].decode("latin-1")
            return PictureTrack(
                codec=codec, turned=across == 0 and down == 0 and turn != 0, step=step, pictures=pictures,
                leads=step is not None and _leads(trak, step), parts=_parts(trak),
            )  # fmt: skip
        if end < 0:
            break
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
    runs, count, first, _, second = struct.unpack_from(">IIiIi", trak, at + 4)
    return bool(runs > 1 and count == 1 and step + second < first)


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


def _moov(path: str) -> bytes:
    """The payload of the top-level box, or nothing.

    Each call of the system gives Python's lock away, and with several threads it takes a while to come back: there are
    three for most files.
    """
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for its writer
    try:
        begin, position = os.pread(file, FIRST_READ, 0), 0
        while len(head := _read(file, begin, position, 16)) >= 8:
            length, header = int.from_bytes(head[:4], "big"), 8
            if length == 1:
                length, header = int.from_bytes(head[8:16], "big"), 16
            if length == 0:  # to the end of the file
                length = os.fstat(file).st_size - position
            if not header <= length <= LONGEST_BOX:
                break
            if head[4:8] == b"moov":
                return _read(file, begin, position + header, min(length - header, LARGEST_MOOV))
            position += length
        return b""
    finally:
        os.close(file)


def _read(file: int, begin: bytes, position: int, length: int) -> bytes:
    known = begin[position : position + length]
    return known if len(known) == length else os.pread(file, length, position)
