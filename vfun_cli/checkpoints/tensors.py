"""Tensors that lie in files: where their bytes are, and how they are read in bounded pieces.

Reads are ``pread`` into a buffer that is used again, not memory maps: pages of a map count as resident, so a map
of a checkpoint makes the peak memory grow with the checkpoint.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vfun_cli.disks.abilities import naming
from vfun_cli.errors import CheckpointError
from vfun_cli.files import regular_status
from vfun_cli.lfs import refuse_lfs_pointer

Array = npt.NDArray[np.generic]

STORAGE: dict[str, np.dtype[np.generic]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),  # numpy has no bfloat16: the raw bits
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
"""safetensors dtype names, and the numpy type their bytes are read as."""

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})

CHUNK = 1 << 20
"""Elements per read: 4 MB of float32, enough for full disk speed and small beside the interpreter."""

BLOCK = 1 << 16
"""Elements per conversion step: input, scratch and output fit into one core's second-level cache."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A run of consecutive elements in one file."""

    path: Path
    offset: int
    """Position of the first byte."""
    count: int
    """Elements, not bytes."""


@dataclass(frozen=True, kw_only=True)
class TensorSource:
    """A tensor in one or more files; its row-major elements are the segments one after another."""

    shape: tuple[int, ...]
    dtype: str
    """safetensors name, e.g. ``F32``."""
    locate: Callable[[], tuple[Segment, ...]]
    """Finds the segments, when the tensor is read for the first time."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the stored elements."""
        return self.numel * STORAGE[self.dtype].itemsize

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """Where the elements are.

        Raises:
            CheckpointError: they do not make up the whole tensor.
        """
        found = self.locate()
        if sum(part.count for part in found) != self.numel:
            where = found[0].path if found else "no file"
            raise CheckpointError(f"{where}: the stored parts do not add up to the tensor's shape {self.shape}.")
        return found

    def chunks(self, buffer: Array | None = None) -> Iterator[Array]:
        """The raw elements in order, flat pieces of at most CHUNK elements.

        Each piece is a view of one buffer that the next piece overwrites.

        Raises:
            CheckpointError: a file is too short.
        """
        dtype = STORAGE[self.dtype]
        if buffer is None:
            buffer = np.empty(min(CHUNK, max(self.numel, 1)), dtype)
        elif buffer.dtype != dtype:
            buffer = buffer.view(dtype)[:CHUNK]
        for part in self.segments:
            with FileReader(part.path) as file:
                for start in range(0, part.count, len(buffer)):
                    piece = buffer[: min(len(buffer), part.count - start)]
                    file.read_into(piece, part.offset + start * dtype.itemsize)
                    yield piece

    def read(self) -> Array:
        """The whole tensor; bfloat16 comes back widened to float32, everything else as it is stored."""
        raw = np.empty(self.numel, STORAGE[self.dtype])
        start = 0
        for part in self.segments:
            with FileReader(part.path) as file:
                file.read_into(raw[start : start + part.count], part.offset)
            start += part.count
        return (bf16_to_fp32(raw) if self.dtype == "BF16" else raw).reshape(self.shape)


class FileReader:
    """``pread`` of exact ranges; a short file is an error, never a silent zero."""

    def __init__(self, path: Path) -> None:
        self.path = path
        refuse_lfs_pointer(path)
        try:
            regular_status(path)
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error

    def __enter__(self) -> "FileReader":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return os.fstat(self._descriptor).st_size

    def read_into(self, target: Array, offset: int) -> None:
        """Fill a contiguous array from this position on."""
        if not target.size:
            return
        view = target.data.cast("B")
        while len(view):
            with naming(self.path):
                count = os.preadv(self._descriptor, [view], offset)
            if count == 0:
                raise CheckpointError(
                    f"{self.path} is truncated: it ends at byte {self.size}, {len(view)} bytes too early.",
                    hint="Name another checkpoint by its path.",
                )
            view, offset = view[count:], offset + count

    def read(self, offset: int, count: int) -> bytes:
        """Exactly ``count`` bytes."""
        target = np.empty(count, np.uint8)
        self.read_into(target, offset)
        return target.tobytes()


def tensor_at(path: Path, offset: int, *, shape: tuple[int, ...], dtype: str) -> TensorSource:
    """A tensor that is one run of bytes."""
    segment = Segment(path=path, offset=offset, count=math.prod(shape))
    return TensorSource(shape=shape, dtype=dtype, locate=lambda: (segment,))


def rows_of(tensor: TensorSource, first: int, count: int) -> TensorSource:
    """Some rows, counted along the first axis, still unread."""
    width = tensor.numel // tensor.shape[0]
    return replace(elements_of(tensor, first * width, count * width), shape=(count, *tensor.shape[1:]))


def elements_of(tensor: TensorSource, start: int, count: int) -> TensorSource:
    """Some elements of the flattened tensor, [count], still unread."""
    if type(tensor) is not TensorSource:  # computed while it is read: no segments are what it gives
        return Elements(shape=(count,), dtype=tensor.dtype, locate=tensor.locate, whole=tensor, start=start)
    end = start + count

    def locate() -> tuple[Segment, ...]:
        parts, position = [], 0
        for segment in tensor.segments:
            low, high = max(start, position), min(end, position + segment.count)
            if low < high:
                offset = segment.offset + (low - position) * STORAGE[tensor.dtype].itemsize
                parts.append(Segment(path=segment.path, offset=offset, count=high - low))
            position += segment.count
        return tuple(parts)

    return TensorSource(shape=(count,), dtype=tensor.dtype, locate=locate)


@dataclass(frozen=True, kw_only=True)
class Joined(TensorSource):
    """Tensors one after another as one, each read when its turn comes; of mixed types in float32."""

    parts: tuple[TensorSource, ...]

    @classmethod
    def of(cls, parts: Sequence[TensorSource], shape: tuple[int, ...]) -> TensorSource:
        """The tensor of that shape whose elements are the parts'; a single part stays what it is."""
        if len(parts) == 1:
            return parts[0]
        dtypes = {part.dtype for part in parts}
        dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
        segments = lambda: tuple(segment for part in parts for segment in part.segments)  # noqa: E731
        return cls(shape=shape, dtype=dtype, locate=segments, parts=tuple(parts))

    def chunks(self, buffer: Array | None = None) -> Iterator[Array]:
        """The elements of the parts in order."""
        wide = np.empty(CHUNK, np.float32)
        for part in self.parts:
            for chunk in part.chunks(buffer):
                yield convert(chunk, part.dtype, self.dtype, wide)

    def read(self) -> Array:
        """The whole tensor, as :meth:`TensorSource.read` gives it."""
        return np.concatenate([part.read().reshape(-1) for part in self.parts]).reshape(self.shape)


@dataclass(frozen=True, kw_only=True)
class Elements(TensorSource):
    """Some elements of a tensor that is computed while it is read."""

    whole: TensorSource
    start: int

    def chunks(self, buffer: Array | None = None) -> Iterator[Array]:
        """The elements in order."""
        position, end = 0, self.start + self.numel
        for chunk in self.whole.chunks(buffer):
            piece = chunk[max(self.start - position, 0) : max(end - position, 0)]
            if piece.size:
                yield piece
            position += len(chunk)
            if position >= end:
                return

    def read(self) -> Array:
        """The elements, as :meth:`TensorSource.read` gives them."""
        values = np.concatenate([chunk.copy() for chunk in self.chunks()])
        return (bf16_to_fp32(values) if self.dtype == "BF16" else values).reshape(self.shape)


@dataclass(frozen=True, kw_only=True)
class Held(TensorSource):
    """A small tensor that is in memory already."""

    values: Array

    def chunks(self, buffer: Array | None = None) -> Iterator[Array]:
        """All of it, in pieces."""
        flat = self.values.reshape(-1)
        yield from (flat[start : start + CHUNK] for start in range(0, len(flat), CHUNK))

    def read(self) -> Array:
        """It."""
        return self.values


def held(values: Array) -> Held:
    """Float32 values as a tensor like those of files."""
    return Held(shape=values.shape, dtype="F32", locate=tuple, values=values)


def read_float32(tensor: TensorSource) -> Array:
    """The whole tensor in float32; unlike ``TensorSource.read`` also of one that is computed while it is read."""
    values, buffer = np.empty(tensor.numel, np.float32), np.empty(CHUNK, np.float32)
    start = 0
    for chunk in tensor.chunks():
        values[start : start + len(chunk)] = convert(chunk, tensor.dtype, "F32", buffer)
        start += len(chunk)
    return values.reshape(tensor.shape)


def bf16_to_fp32(bits: Array) -> Array:
    """Widen raw bfloat16 bits; exact."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def fp32_to_bf16(values: Array, out: Array) -> None:
    """Round float32 to raw bfloat16 bits, to nearest, ties to even, as torch does; NaN becomes 0x7FC0.

    Adding 0x7FFF plus the lowest kept bit carries into the upper half exactly when the value must round up.
    """
    bits = values.view(np.uint32)
    scratch = np.empty(min(BLOCK, len(bits)), np.uint32)
    for start in range(0, len(bits), BLOCK):
        block = bits[start : start + BLOCK]
        rounded = scratch[: len(block)]
        np.right_shift(block, 16, out=rounded)
        rounded &= 1
        rounded += 0x7FFF
        rounded += block
        out[start : start + BLOCK] = rounded.view(np.uint16)[1::2]
        if np.isnan(values[start : start + BLOCK].max()):  # the addition would turn some NaN into infinity or zero
            out[start : start + BLOCK][np.isnan(values[start : start + BLOCK])] = 0x7FC0


def convert(chunk: Array, source: str, target: str, out: Array) -> Array:
    """The chunk's elements as the target dtype, in ``out`` when anything had to change.

    Source and target are safetensors names. Types that are not floating point are kept as they are.
    """
    if source == target or source not in FLOATS:
        return chunk
    result = out.view(STORAGE[target])[: len(chunk)]
    values = bf16_to_fp32(chunk) if source == "BF16" else chunk
    if target == "BF16":
        fp32_to_bf16(values.astype(np.float32, copy=False), result)
    else:
        with np.errstate(over="ignore"):  # too large for fp16 is infinity there, as in torch
            result[:] = values
    return result


def converted_dtype(source: str, target: str) -> str:
    """What ``convert`` makes of a dtype."""
    return target if source in FLOATS else source
