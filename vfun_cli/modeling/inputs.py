"""What an encoder reads, as a recipe: it can be cooked (decoded), or named without being decoded.

    clip = Joined((Filled(0.0, 73, height, width), Frames(video, indices, height, width)))
    cook({"clip": clip})         # float32 [F, 3, height, width] by name
    describe(clip, digest)      # the same text for the same pixels, whatever the file is called

A recipe says all that its outcome depends on, so its description is the key of whatever is computed from it. Families
compose their own from these; a new kind is a frozen dataclass with ``cook``.
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

from vfun_cli.modeling.media import read_audio, read_frames, read_image

Size = tuple[int, int]
"""(height, width)"""


class Recipe(Protocol):
    """A frozen dataclass of plain values, :class:`Media` and other recipes."""

    def cook(self, kitchen: "Kitchen") -> Any:
        """The value itself. Raises MetadataError for media that cannot be decoded."""
        ...


class Clip(Recipe, Protocol):
    """A recipe of pixels, float32 [F, 3, H, W]."""

    @property
    def count(self) -> int:
        """Frames."""
        ...

    def take(self, positions: Sequence[int]) -> "Clip":
        """These of its frames."""
        ...


@dataclass(frozen=True)
class Media:
    """A file of the dataset: a description holds what is in it, not what it is called."""

    path: str


@dataclass(frozen=True)
class Frames:
    """Frames of a video: float32 [F, 3, H, W] in [-1, 1]."""

    media: Media
    indices: tuple[int, ...]
    size: Size

    def cook(self, kitchen: "Kitchen") -> Tensor:
        """See :class:`Recipe`."""
        return kitchen.frames(self)

    @property
    def count(self) -> int:
        """See :class:`Clip`."""
        return len(self.indices)

    def take(self, positions: Sequence[int]) -> "Frames":
        """See :class:`Clip`."""
        return replace(self, indices=tuple(self.indices[position] for position in positions))


@dataclass(frozen=True)
class Picture:
    """An image file as a clip of one frame: float32 [1, 3, H, W] in [-1, 1]."""

    media: Media
    size: Size

    def cook(self, kitchen: "Kitchen") -> Tensor:
        """See :class:`Recipe`."""
        return read_image(self.media.path, *self.size)

    @property
    def count(self) -> int:
        """See :class:`Clip`."""
        return 1

    def take(self, positions: Sequence[int]) -> "Picture":
        """See :class:`Clip`. Raises ValueError for anything but its one frame."""
        if list(positions) != [0]:
            raise ValueError(f"a picture has no frames {list(positions)}")
        return self


@dataclass(frozen=True)
class Filled:
    """Frames of one value: float32 [frames, 3, H, W]."""

    value: float
    frames: int
    size: Size

    def cook(self, kitchen: "Kitchen") -> Tensor:
        """See :class:`Recipe`."""
        return torch.full((self.frames, 3, *self.size), self.value)

    @property
    def count(self) -> int:
        """See :class:`Clip`."""
        return self.frames

    def take(self, positions: Sequence[int]) -> "Filled":
        """See :class:`Clip`."""
        return replace(self, frames=len(positions))


@dataclass(frozen=True)
class Joined:
    """Clips one after another: float32 [F, 3, H, W]."""

    parts: tuple[Clip, ...]

    def cook(self, kitchen: "Kitchen") -> Tensor:
        """See :class:`Recipe`."""
        return torch.cat([part.cook(kitchen) for part in self.parts])

    @property
    def count(self) -> int:
        """See :class:`Clip`."""
        return sum(part.count for part in self.parts)

    def take(self, positions: Sequence[int]) -> "Joined":
        """See :class:`Clip`."""
        places = [(part, index) for part in self.parts for index in range(part.count)]
        return Joined(tuple(places[position][0].take([places[position][1]]) for position in positions))


@dataclass(frozen=True)
class Sound:
    """Mono audio from a second on, silence behind its end: float32 [samples]."""

    media: Media
    start: Fraction
    there: Fraction
    """Seconds that are read from the file."""
    rate: int
    samples: int

    def cook(self, kitchen: "Kitchen") -> Tensor:
        """See :class:`Recipe`."""
        heard = torch.from_numpy(read_audio(self.media.path, self.start, self.there, self.rate))
        return functional.pad(heard, (0, self.samples - len(heard)))


@dataclass(frozen=True)
class Plain:
    """A value that is no media: a caption, a number."""

    value: str | int | Fraction

    def cook(self, kitchen: "Kitchen") -> str | int | Fraction:
        """See :class:`Recipe`."""
        return self.value


@dataclass(frozen=True)
class Together:
    """Several values that one encoder reads at once, in this order."""

    parts: tuple[Recipe, ...]

    def cook(self, kitchen: "Kitchen") -> tuple[Any, ...]:
        """See :class:`Recipe`."""
        return tuple(part.cook(kitchen) for part in self.parts)


@dataclass(frozen=True)
class Given:
    """A clip that is decoded already."""

    tensor: Tensor

    def cook(self, kitchen: "Kitchen") -> Tensor:
        """See :class:`Recipe`."""
        return self.tensor

    @property
    def count(self) -> int:
        """See :class:`Clip`."""
        return len(self.tensor)

    def take(self, positions: Sequence[int]) -> "Given":
        """See :class:`Clip`."""
        return Given(self.tensor[list(positions)])


class Kitchen:
    """Cooks the recipes of one sample; frames that several of them take from one video are decoded in one pass."""

    def __init__(self, recipes: Sequence[Recipe]) -> None:
        self.wanted: dict[tuple[Media, Size], set[int]] = defaultdict(set)
        for leaf in leaves(recipes):
            if isinstance(leaf, Frames):
                self.wanted[leaf.media, leaf.size] |= set(leaf.indices)
        self.decoded: dict[tuple[Media, Size], tuple[dict[int, int], Tensor]] = {}

    def frames(self, recipe: Frames) -> Tensor:
        """[F, 3, H, W]. Raises MetadataError if the file cannot be decoded."""
        place = (recipe.media, recipe.size)
        if place not in self.decoded:
            indices = sorted(self.wanted[place])
            pixels = read_frames(recipe.media.path, indices, *recipe.size)
            self.decoded[place] = ({index: position for position, index in enumerate(indices)}, pixels)
        positions, pixels = self.decoded[place]
        return pixels[[positions[index] for index in recipe.indices]]


def cook(recipes: Mapping[str, Recipe]) -> dict[str, Any]:
    """Cook the recipes of one sample. Raises MetadataError for media that cannot be decoded."""
    kitchen = Kitchen(list(recipes.values()))
    return {name: recipe.cook(kitchen) for name, recipe in recipes.items()}


def describe(value: Any, digest: Callable[[Path], str]) -> str:
    """A text that is the same exactly when the recipe gives the same outcome; ``digest`` tells files apart."""
    if isinstance(value, Media):
        return digest(Path(value.path))
    if isinstance(value, Tensor):
        return hashlib.blake2b(value.contiguous().numpy().tobytes(), digest_size=16).hexdigest()
    if isinstance(value, tuple):
        return f"({','.join(describe(each, digest) for each in value)})"
    if is_dataclass(value) and not isinstance(value, type):
        inside = ",".join(describe(getattr(value, field.name), digest) for field in fields(value))
        return f"{type(value).__name__}({inside})"
    return repr(value)


def leaves(value: Any) -> Iterator[Any]:
    """All dataclasses inside, from the outside in."""
    if isinstance(value, (tuple, list)):
        for each in value:
            yield from leaves(each)
    elif is_dataclass(value) and not isinstance(value, type):
        yield value
        for field in fields(value):
            yield from leaves(getattr(value, field.name))
