"""Which part of a clip is to be generated: the ten kinds of mask that CogVideoX-Fun was trained on."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
"""[F, H, W]; True where the model generates, False where it is given the pixels."""


def draw_mask(rng: np.random.Generator, frames: int, height: int, width: int) -> Mask:
    """One mask of a clip, or of an image if ``frames`` is 1. A pure function of the generator's state and the size.

    Sides are 16 pixels or more, as of every bucket.
    """
    table = IMAGE_MODES if frames == 1 else VIDEO_MODES
    mode = rng.choice(len(table), p=[probability for _, probability in table])
    mask = np.zeros((frames, height, width), dtype=np.bool_)
    table[mode][0](rng, mask)
    return mask


def rectangle(rng: np.random.Generator, mask: Mask) -> None:
    """One rectangle, the same in all frames; sides from a quarter to three quarters, cut off at the border."""
    _, height, width = mask.shape
    y, x = rng.integers(height), rng.integers(width)
    half_height = rng.integers(height // 4, height // 4 * 3) // 2
    half_width = rng.integers(width // 4, width // 4 * 3) // 2
    mask[:, max(y - half_height, 0) : y + half_height, max(x - half_width, 0) : x + half_width] = True


def everything(rng: np.random.Generator, mask: Mask) -> None:
    """Text to video."""
    mask[:] = True


def after_first_frames(rng: np.random.Generator, mask: Mask) -> None:
    """The first one to four frames are known: image to video, continuation."""
    mask[rng.integers(1, 5) :] = True


def between_first_and_last_frames(rng: np.random.Generator, mask: Mask) -> None:
    """The first and the last one to four frames are known; nothing is left to generate in a clip too short for that."""
    known = rng.integers(1, 5)
    mask[known : max(len(mask) - known, 0)] = True


def rectangle_for_a_while(rng: np.random.Generator, mask: Mask) -> None:
    """One rectangle from a frame of the first half to one of the second."""
    frames = len(mask)
    first, end = rng.integers(frames // 2), rng.integers(frames // 2, frames)
    rectangle(rng, mask[first:end])


def scattered_pixels(rng: np.random.Generator, mask: Mask) -> None:
    """Every pixel of every frame is masked with probability 1/2."""
    mask[:] = rng.integers(2, size=mask.shape, dtype=np.uint8)


def blocks_in_some_frames(rng: np.random.Generator, mask: Mask) -> None:
    """A small block, at most a quarter wide and high, in each of up to half of the frames."""
    frames, height, width = mask.shape
    for frame in rng.permutation(frames)[: rng.integers(1, max(frames // 2, 1), endpoint=True)]:
        block_height, block_width = rng.integers(1, height // 4 + 1), rng.integers(1, width // 4 + 1)
        y, x = rng.integers(height - block_height + 1), rng.integers(width - block_width + 1)
        mask[frame, y : y + block_height, x : x + block_width] = True


def ellipse(rng: np.random.Generator, mask: Mask) -> None:
    """An ellipse in frame 0 alone; the other frames are known, as the released models were trained."""
    _paint_ellipse(rng, mask, axes=2)


def circle(rng: np.random.Generator, mask: Mask) -> None:
    """A circle in frame 0 alone."""
    _paint_ellipse(rng, mask, axes=1)


def whole_frames(rng: np.random.Generator, mask: Mask) -> None:
    """Every frame is masked as a whole with probability 1/2."""
    mask[:] = rng.integers(2, size=(len(mask), 1, 1), dtype=np.uint8)


def _paint_ellipse(rng: np.random.Generator, mask: Mask, *, axes: int) -> None:
    """Semi-axes from an eighth to a quarter of the shorter side; one axis gives a circle."""
    _, height, width = mask.shape
    y, x = rng.integers(height), rng.integers(width)
    shorter = min(height, width)
    radius = np.resize(rng.integers(shorter // 8, shorter // 4, size=axes), 2)
    rows, columns = np.ogrid[:height, :width]
    mask[0] = ((rows - y) / radius[0]) ** 2 + ((columns - x) / radius[1]) ** 2 < 1


Draw = Callable[[np.random.Generator, Mask], None]
"""Paints a mask that is all False, in place."""

VIDEO_MODES: tuple[tuple[Draw, float], ...] = (
    (rectangle, 0.05),
    (everything, 0.20),
    (after_first_frames, 0.20),
    (between_first_and_last_frames, 0.20),
    (rectangle_for_a_while, 0.05),
    (scattered_pixels, 0.05),
    (blocks_in_some_frames, 0.05),
    (ellipse, 0.10),
    (circle, 0.05),
    (whole_frames, 0.05),
)
"""Each kind of mask with its probability, in the order of the original's modes 0 to 9.

See docs/numerics.md, Masks of CogVideoX-Fun.
"""

IMAGE_MODES: tuple[tuple[Draw, float], ...] = ((rectangle, 0.2), (everything, 0.7), (ellipse, 0.05), (circle, 0.05))
