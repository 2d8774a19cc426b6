"""What an encoder reads, as a lazy input: it can be loaded (decoded), or described without being decoded.

    clip = ConcatenatedClip((ConstantFrames(0.0, 73, height, width), VideoFrames(video, indices, height, width)))
    load_inputs({"clip": clip})   # pixels by name, see ``pixels``
    describe(clip, digest)        # the same text for the same pixels, whatever the file is called

A lazy input says all that its value depends on, so its description is the key of whatever is computed from it. Families
compose their own from these; a new kind is a frozen dataclass with ``load``.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from vfun_cli.modeling.media.frames import read_frames
from vfun_cli.modeling.media.pictures import read_image
from vfun_cli.modeling.media.sound import read_audio
from vfun_cli.modeling.pixels import LoadedClip, Pieces, constant, joined

Size = tuple[int, int]
"""(height, width)"""


class LazyInput(Protocol):
    """A frozen dataclass of plain values, :class:`MediaFile` and other lazy inputs."""

    def load(self, decoder: "Decoder") -> Any:
        """The value itself.

        Raises:
            MetadataError: media that cannot be decoded.
        """
        ...


class ClipInput(LazyInput, Protocol):
    """Pixels [F, 3, H, W]."""

    def load(self, decoder: "Decoder") -> LoadedClip:
        """See :class:`LazyInput`."""
        ...

    @property
    def count(self) -> int:
        """Frames."""
        ...

    def take(self, positions: Sequence[int]) -> "ClipInput":
        """The frames at these positions."""
        ...


@dataclass(frozen=True)
class MediaFile:
    """A file of the dataset, described by its content and not by its name."""

    path: str


@dataclass(frozen=True)
class VideoFrames:
    """Frames of a video: uint8 [F, 3, H, W]."""

    media: MediaFile
    indices: tuple[int, ...]
    size: Size

    def load(self, decoder: "Decoder") -> Tensor:
        """See :class:`LazyInput`."""
        return decoder.frames(self)

    @property
    def count(self) -> int:
        """See :class:`ClipInput`."""
        return len(self.indices)

    def take(self, positions: Sequence[int]) -> "VideoFrames":
        """See :class:`ClipInput`."""
        return replace(self, indices=tuple(self.indices[position] for position in positions))


@dataclass(frozen=True)
class ImageFrame:
    """An image file as a clip of one frame: uint8 [1, 3, H, W]."""

    media: MediaFile
    size: Size

    def load(self, decoder: "Decoder") -> Tensor:
        """See :class:`LazyInput`."""
        return read_image(self.media.path, *self.size)

    @property
    def count(self) -> int:
        """See :class:`ClipInput`."""
        return 1

    def take(self, positions: Sequence[int]) -> "ImageFrame":
        """See :class:`ClipInput`.

        Raises:
            ValueError: anything but its one frame.
        """
        if list(positions) != [0]:
            raise ValueError(f"an image has no frames {list(positions)}")
        return self


@dataclass(frozen=True)
class ConstantFrames:
    """Frames of one value: float32 [frames, 3, H, W]."""

    value: float
    frames: int
    size: Size

    def load(self, decoder: "Decoder") -> Tensor:
        """See :class:`LazyInput`."""
        return constant(self.value, self.frames, *self.size)

    @property
    def count(self) -> int:
        """See :class:`ClipInput`."""
        return self.frames

    def take(self, positions: Sequence[int]) -> "ConstantFrames":
        """See :class:`ClipInput`."""
        return replace(self, frames=len(positions))


@dataclass(frozen=True)
class ConcatenatedClip:
    """Clips one after another."""

    parts: tuple[ClipInput, ...]

    def load(self, decoder: "Decoder") -> Pieces:
        """See :class:`LazyInput`."""
        return joined([part.load(decoder) for part in self.parts])

    @property
    def count(self) -> int:
        """See :class:`ClipInput`."""
        return sum(part.count for part in self.parts)

    def take(self, positions: Sequence[int]) -> "ConcatenatedClip":
        """See :class:`ClipInput`."""
        places = [(part, index) for part in self.parts for index in range(part.count)]
        return ConcatenatedClip(tuple(places[position][0].take([places[position][1]]) for position in positions))


@dataclass(frozen=True)
class AudioSegment:
    """Mono audio from second ``start`` on, silence behind its end: float32 [samples]."""

    media: MediaFile
    start: Fraction
    available: Fraction
    """Seconds that are read from the file."""
    rate: int
    samples: int

    def load(self, decoder: "Decoder") -> Tensor:
        """See :class:`LazyInput`."""
        audio = torch.from_numpy(read_audio(self.media.path, self.start, self.available, self.rate))
        return functional.pad(audio, (0, self.samples - len(audio)))


@dataclass(frozen=True)
class Value:
    """A value that is no media: a caption, a number."""

    value: str | int | Fraction

    def load(self, decoder: "Decoder") -> str | int | Fraction:
        """See :class:`LazyInput`."""
        return self.value


@dataclass(frozen=True)
class TupleInput:
    """Several values that one encoder reads at once, in this order."""

    parts: tuple[LazyInput, ...]

    def load(self, decoder: "Decoder") -> tuple[Any, ...]:
        """See :class:`LazyInput`."""
        return tuple(part.load(decoder) for part in self.parts)


@dataclass(frozen=True)
class Decoded:
    """A clip that is decoded already."""

    tensor: Tensor

    def load(self, decoder: "Decoder") -> Tensor:
        """See :class:`LazyInput`."""
        return self.tensor

    @property
    def count(self) -> int:
        """See :class:`ClipInput`."""
        return len(self.tensor)

    def take(self, positions: Sequence[int]) -> "Decoded":
        """See :class:`ClipInput`."""
        return Decoded(self.tensor[list(positions)])


class Decoder:
    """Loads the inputs of one sample; frames that several of them take from one video are decoded in one pass."""

    def __init__(self, inputs: Sequence[LazyInput]) -> None:
        self.wanted: dict[tuple[MediaFile, Size], set[int]] = defaultdict(set)
        for leaf in nested_inputs(inputs):
            if isinstance(leaf, VideoFrames):
                self.wanted[leaf.media, leaf.size] |= set(leaf.indices)
        self.decoded: dict[tuple[MediaFile, Size], tuple[dict[int, int], Tensor]] = {}

    def frames(self, wanted: VideoFrames) -> Tensor:
        """uint8 [F, 3, H, W].

        Raises:
            MetadataError: the file cannot be decoded.
        """
        place = (wanted.media, wanted.size)
        if place not in self.decoded:
            indices = sorted(self.wanted[place])
            pixels = read_frames(wanted.media.path, indices, *wanted.size)
            self.decoded[place] = ({index: position for position, index in enumerate(indices)}, pixels)
        positions, pixels = self.decoded[place]
        return pixels[[positions[index] for index in wanted.indices]]


def load_inputs(inputs: Mapping[str, LazyInput]) -> dict[str, Any]:
    """Load the inputs of one sample.

    Raises:
        MetadataError: media that cannot be decoded.
    """
    decoder = Decoder(list(inputs.values()))
    return {name: each.load(decoder) for name, each in inputs.items()}


def describe(value: Any, digest: Callable[[Path], str]) -> str:
    """A text that is the same exactly when the input loads the same value; ``digest`` tells files apart."""
    if isinstance(value, MediaFile):
        return digest(Path(value.path))
    if isinstance(value, Tensor):
        return hashlib.blake2b(value.contiguous().numpy().tobytes(), digest_size=16).hexdigest()
    if isinstance(value, tuple):
        return f"({','.join(describe(each, digest) for each in value)})"
    if is_dataclass(value) and not isinstance(value, type):
        inside = ",".join(describe(getattr(value, field.name), digest) for field in fields(value))
        return f"{type(value).__name__}({inside})"
    return repr(value)


def nested_inputs(value: Any) -> Iterator[Any]:
    """All dataclasses inside, from the outside in."""
    if isinstance(value, (tuple, list)):
        for each in value:
            yield from nested_inputs(each)
    elif is_dataclass(value) and not isinstance(value, type):
        yield value
        for field in fields(value):
            yield from nested_inputs(getattr(value, field.name))
