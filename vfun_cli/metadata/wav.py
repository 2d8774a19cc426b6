"""The chunks of WAV files (RIFF, RF64, BW64) with plain samples.

FFmpeg searches uncompressed sound for hidden surround formats: 23 ms for 3 s of stereo; this takes 0.1 ms.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from vfun_cli.files import regular_status

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

PLACEHOLDERS = (2_000_000_000, 2**31, 2**32, 2**63)
"""Lengths that mean "not known yet", give or take NEAR bytes: speech services, pipes and recorders that cannot go back
write 0x7ffff000, 0x7fffffff, 0x80000000, 2000000000 or 0xffffffff, some of them less their header's 36 to 80 bytes."""
NEAR = 4096
MOST_CHUNKS = 10_000
"""That are passed over on the way to the samples: a file may be nothing but empty ones."""
PIECE = 3 << 13
"""Bytes read at once: whole samples of 8, 16, 24, 32 and 64 bits."""
SAMPLES: "dict[tuple[int, int], DTypeLike]" = {
    (1, 8): "u1", (1, 16): "<i2", (1, 32): "<i4", (3, 32): "<f4", (3, 64): "<f8",
    (1, 24): {"names": ["upper"], "formats": ["<i2"], "offsets": [1], "itemsize": 3},
}  # fmt: skip
"""numpy's types by format tag and bits; of 24 bits the upper 16, which tell silence from sound."""


@dataclass(frozen=True, kw_only=True)
class Wav:
    """Where the samples of a WAV file lie, and how to read them."""

    tag: int
    """1 for integers, 3 for floats."""
    channels: int
    rate: int
    bits: int
    start: int
    """Byte at which the samples begin."""
    length: int | None
    """Bytes of samples as stated; None where the writer did not know."""
    size: int
    """Bytes of the file."""

    @property
    def plain(self) -> bool:
        """Whether the samples are numbers as they stand (not ADPCM, µ-law, …)."""
        return (self.tag, self.bits) in SAMPLES and self.channels > 0 and self.rate > 0

    @property
    def held(self) -> int:
        """Bytes of samples that are there: to the end of the file where none is stated."""
        rest = self.size - self.start
        return rest if self.length is None else min(self.length, rest)

    @property
    def truncated(self) -> bool:
        """The file is shorter than it says."""
        return self.length is not None and self.length > self.held


def read_wav(path: str | Path) -> Wav | None:
    """The chunks of a WAV file; None for anything else.

    A stated length of 0 counts as none, and so does one that goes beyond the end of the file and is within NEAR bytes
    of one of PLACEHOLDERS. Every other length beyond the end is that of a file which was cut off.

    Raises:
        OSError: the file cannot be read.
    """
    size = regular_status(path).st_size
    with Path(path).open("rb") as file:
        chunks = {name: (start, length) for name, start, length in _chunks(file, size)}
        if b"fmt " not in chunks or b"data" not in chunks:
            return None
        layout, (start, length) = _read(file, *chunks[b"fmt "], at_most=40), chunks[b"data"]
        if len(layout) < 16:
            return None
        if b"ds64" in chunks:  # RF64 and BW64: the lengths that need 64 bits
            sizes = _read(file, *chunks[b"ds64"], at_most=16)
            length = int.from_bytes(sizes[8:16], "little") if length == 0xFFFFFFFF else length
    tag, channels, rate, _, _, bits = struct.unpack("<HHIIHH", layout[:16])
    if tag == 0xFFFE and len(layout) >= 26:  # extensible: the real tag opens the sub-format
        tag = int.from_bytes(layout[24:26], "little")
    beyond = length > size - start and any(abs(length - place) <= NEAR for place in PLACEHOLDERS)
    stated = None if length == 0 or beyond else length
    return Wav(tag=tag, channels=channels, rate=rate, bits=bits, start=start, length=stated, size=size)


def samples(path: str | Path, wav: Wav) -> "Iterator[NDArray[Any]]":
    """The samples of a plain file, piece by piece, as they stand."""
    import numpy as np

    kind = np.dtype(SAMPLES[wav.tag, wav.bits])
    with Path(path).open("rb") as file:
        file.seek(wav.start)
        for done in range(0, wav.held, PIECE):
            piece = file.read(min(PIECE, wav.held - done))
            values = np.frombuffer(piece[: len(piece) // kind.itemsize * kind.itemsize], kind)
            yield values["upper"] if kind.names else values


def _chunks(file: IO[bytes], size: int) -> Iterator[tuple[bytes, int, int]]:
    """(name, start, stated length) of each chunk up to the samples; nothing for a file of another kind."""
    head = file.read(12)
    if head[:4] not in (b"RIFF", b"RF64", b"BW64") or head[8:] != b"WAVE":
        return
    position = 12
    for _ in range(MOST_CHUNKS):
        if position + 8 > size:
            return
        file.seek(position)
        name, length = struct.unpack("<4sI", file.read(8))
        yield name, position + 8, length
        if name == b"data":
            return
        position += 8 + length + length % 2


def _read(file: IO[bytes], start: int, length: int, at_most: int) -> bytes:
    file.seek(start)
    return file.read(min(length, at_most))
