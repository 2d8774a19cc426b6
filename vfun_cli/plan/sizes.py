"""Sizes and lengths: what a clip may become, before any clip is known."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from vfun_cli.errors import ConfigError, as_flag
from vfun_cli.families.spec import ClipShape, FamilySpec, ModelDims
from vfun_cli.metadata.table import IntArray
from vfun_cli.plan.options import PlanOptions

SIZE_STEP = 128
"""Token-length mode takes every 128 pixels from the low to the high end."""

MOST_ENLARGED = Fraction(5, 4)
"""No clip is enlarged by more, on either side."""

# (height / width, height, width) at base size 512: PixArt's table, as the original scripts use it.
ASPECTS: tuple[tuple[float, int, int], ...] = (
    (0.25, 256, 1024), (0.26, 256, 992), (0.27, 256, 960), (0.28, 256, 928), (0.32, 288, 896),
    (0.33, 288, 864), (0.35, 288, 832), (0.4, 320, 800), (0.42, 320, 768), (0.48, 352, 736),
    (0.5, 352, 704), (0.52, 352, 672), (0.57, 384, 672), (0.6, 384, 640), (0.68, 416, 608),
    (0.72, 416, 576), (0.78, 448, 576), (0.82, 448, 544), (0.88, 480, 544), (0.94, 480, 512),
    (1.0, 512, 512), (1.07, 512, 480), (1.13, 544, 480), (1.21, 544, 448), (1.29, 576, 448),
    (1.38, 576, 416), (1.46, 608, 416), (1.67, 640, 384), (1.75, 672, 384), (2.0, 704, 352),
    (2.09, 736, 352), (2.4, 768, 320), (2.5, 800, 320), (2.89, 832, 288), (3.0, 864, 288),
    (3.11, 896, 288), (3.62, 928, 256), (3.75, 960, 256), (3.88, 992, 256), (4.0, 1024, 256),
)  # fmt: skip
ASPECT_BASE = 512
SQUARE = ASPECTS.index((1.0, 512, 512))

CROPS: Mapping[float, int] = {
    0.42: 1, 0.5: 2, 0.57: 4, 0.68: 4, 0.78: 4, 0.88: 4, 0.94: 8, 1.0: 8,
    1.07: 8, 1.13: 4, 1.29: 4, 1.46: 4, 1.75: 4, 2.0: 2, 2.4: 1,
}  # fmt: skip
"""Aspects that random_ratio_crop draws, and how often each is drawn: those of the original scripts."""

# Images in every adaptive mode, and videos with random_hw_adapt alone, divide the full size by one of these; larger
# sizes have more to choose from.
DIVISORS: tuple[tuple[int, tuple[Fraction, ...]], ...] = (
    (1536, (Fraction(1), Fraction(5, 4), Fraction(3, 2), Fraction(2), Fraction(5, 2), Fraction(3))),
    (1024, (Fraction(1), Fraction(5, 4), Fraction(3, 2), Fraction(2))),
    (768, (Fraction(1), Fraction(5, 4), Fraction(3, 2))),
    (0, (Fraction(1),)),
)
IMAGE_RANGE_FROM = 512
"""Images of at least this size may shrink down to the low end too."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """One size that a clip may be drawn for."""

    base: Fraction
    """Side in pixels of the square of the same area; a fraction where a size is divided by 1.25 or 1.5."""
    frames: int
    """Most frames of a clip at this size, the clip's own: without a reference frame before it."""
    entries: int = 1
    """How often the size stands in the original's list of divisors, and so how likely it is among the smaller ones."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SizeSet:
    """The sizes of one kind of clip, smallest first, with the probability of each."""

    sizes: tuple[Size, ...]
    heights: IntArray
    """[aspects, sizes] pixels, multiples of the family's ``grid``."""
    widths: IntArray
    cumulative: NDArray[np.float64]
    """[1 + sizes, sizes]: row k holds the running probability when only the k smallest sizes are allowed."""

    def square(self, index: int) -> ClipShape:
        """The longest clip of a size, as a square one gets it."""
        height, width = int(self.heights[SQUARE, index]), int(self.widths[SQUARE, index])
        return ClipShape(frames=self.sizes[index].frames, height=height, width=width)


def round_frames(frames: int, spec: FamilySpec, dims: ModelDims) -> int:
    """The longest clip of at most ``frames`` frames that the family can train on; 0 if there is none."""
    frames = spec.plan.frame_rule.round_down(frames)
    return spec.plan.adjust_frames(frames, dims) if spec.plan.adjust_frames and frames > 0 else frames


def documented_frames(frames: int, spec: FamilySpec) -> int:
    """The published figure for a clip: with the reference frame where one enters the VAE before it (48 -> 49)."""
    return frames + spec.plan.reference_frame


def frames_at(size: Fraction | int, options: PlanOptions, spec: FamilySpec, dims: ModelDims) -> int:
    """Most frames at a size within the token budget of token-length mode, rounded down to the family's rule.

    v = min(n * token^2 / size^2, n); for 4k+1 frames 4 * floor((v - 1) / 4) + 1. A clip shares the budget with a
    reference frame before it: n counts that (49 = 48 + 1, and 80 asks for 80 + 1), and v - 1 is left for the clip.
    """
    most = options.video_sample_n_frames
    if spec.plan.reference_frame:
        most = documented_frames(spec.plan.frame_rule.round_down(most), spec)
    budget = Fraction(most * options.token_sample_size**2) / Fraction(size) ** 2
    allowed = int(min(budget, Fraction(most)))
    return round_frames(allowed - spec.plan.reference_frame, spec, dims)


def _token_length_bases(options: PlanOptions, spec: FamilySpec) -> list[Fraction]:
    low, high = options.low, options.high
    if spec.plan.lowest_video_size is not None:
        low = min(spec.plan.lowest_video_size, high)
    return [Fraction(size) for size in (*range(low, high, SIZE_STEP), high)]


def _divided(size: int, *further: Fraction) -> list[Fraction]:
    divisors = next(divisors for least, divisors in DIVISORS if size >= least)
    return sorted(Fraction(size) / divisor for divisor in (*divisors, *further))


def bases(kind: str, options: PlanOptions, spec: FamilySpec) -> list[Fraction]:
    """Base sizes of videos or images, smallest first, as the published guides describe the three modes.

    One that two divisors lead to stands there twice: the original draws it twice as often.
    """
    if options.fix_sample_size:
        return [Fraction(math.isqrt(math.prod(options.fix_sample_size)))]
    if not (options.random_hw_adapt or options.training_with_video_token_length):
        image_size = options.image_sample_size or options.video_sample_size
        return [Fraction(options.video_sample_size if kind == "video" else image_size)]
    if kind == "video":
        by_tokens = options.training_with_video_token_length
        return _token_length_bases(options, spec) if by_tokens else _divided(options.low)
    further = [Fraction(options.high, options.low)] if options.high >= IMAGE_RANGE_FROM else []
    return _divided(options.high, *further)


def _cumulative(kind: str, sizes: tuple[Size, ...], options: PlanOptions, spec: FamilySpec) -> NDArray[np.float64]:
    """Running probabilities for each number of allowed sizes; one favourite, the others by their entries."""
    rows = np.ones((len(sizes) + 1, len(sizes)))
    for allowed in range(1, len(sizes) + 1):
        if kind == "video" and options.training_with_video_token_length:
            share = spec.plan.token_size_share
            favourite = min(range(allowed), key=lambda i: abs(sizes[i].base - options.token_sample_size))
        else:
            share, favourite = spec.plan.full_size_share, allowed - 1
        entries = np.array([size.entries for size in sizes[:allowed]], dtype=np.float64)
        if share is None or entries.sum() == 1:
            weights = entries / entries.sum()
        else:
            entries[favourite] -= 1
            weights = (1 - share) * entries / entries.sum()
            weights[favourite] += share
        rows[allowed, :allowed] = np.cumsum(weights)
        rows[allowed, allowed - 1] = 1.0
    return rows


def bucket(aspect: int, base: Fraction, spec: FamilySpec) -> tuple[int, int]:
    """Height and width of an entry of ASPECTS, scaled to the base size and floored to whole tokens."""
    sides = zip(ASPECTS[aspect][1:], spec.plan.grid, strict=True)
    height, width = (max(step, int(side * base / ASPECT_BASE) // step * step) for side, step in sides)
    return height, width


def size_set(kind: str, options: PlanOptions, spec: FamilySpec, dims: ModelDims) -> SizeSet:
    """The sizes of ``kind`` ("video" or "image") with their buckets; sizes too large for a shortest clip are left out.

    A fixed size is the bucket of every aspect.

    Raises:
        ConfigError: no size holds a clip within the token budget.
    """
    sizes = []
    for base, entries in Counter(bases(kind, options, spec)).items():
        if kind == "image":
            frames = 1
        elif options.training_with_video_token_length:
            frames = frames_at(base, options, spec, dims)
        else:
            frames = round_frames(options.video_sample_n_frames, spec, dims)
        if kind == "image" or frames >= spec.plan.frame_rule.fewest:
            sizes.append(Size(base=base, frames=frames, entries=entries))
    if not sizes:
        smallest = min(bases(kind, options, spec))
        raise ConfigError(
            f"--token-sample-size {options.token_sample_size} leaves less than {spec.plan.frame_rule.fewest} frames "
            f"at {int(smallest)}, the smallest size.",
            hint=f"Use --token-sample-size {int(smallest)} or more, or smaller sample sizes.",
        )
    fixed = options.fix_sample_size
    buckets = [[fixed or bucket(aspect, size.base, spec) for size in sizes] for aspect in range(len(ASPECTS))]
    sides = np.array(buckets, dtype=np.int64)  # [aspects, sizes, 2]
    return SizeSet(
        sizes=tuple(sizes),
        heights=np.ascontiguousarray(sides[:, :, 0]),
        widths=np.ascontiguousarray(sides[:, :, 1]),
        cumulative=_cumulative(kind, tuple(sizes), options, spec),
    )


def nearest_aspect(height: IntArray, width: IntArray) -> IntArray:
    """Index into ASPECTS of the key nearest to height / width, for each clip; exact, ties go to the smaller key."""
    hundredths = [round(key * 100) for key, _, _ in ASPECTS]
    index = np.zeros(len(height), dtype=np.int64)
    for low, high in pairwise(hundredths):  # past the middle of two keys: height / width > (low + high) / 200
        index += height * 200 > (low + high) * width
    return index


def check_options(options: PlanOptions, spec: FamilySpec, dims: ModelDims) -> None:
    """Refuse what this family cannot train, with a way out.

    Raises:
        ConfigError: a size without room for a token, or no clip left by the frame rule or the token budget.
    """
    least = max(spec.plan.grid)
    for name in ("video_sample_size", "image_sample_size"):
        value = getattr(options, name)
        if value is not None and value < least:
            flag = as_flag(name)
            raise ConfigError(f"{flag} is {value}; it must be {least} or more.", hint=f"For example {flag} {least}.")
    fewest = spec.plan.frame_rule.fewest
    if round_frames(options.video_sample_n_frames, spec, dims) < fewest:
        raise ConfigError(
            f"--video-sample-n-frames is {options.video_sample_n_frames}, but {spec.name} trains on clips of "
            f"{spec.plan.frame_rule} frames and at least {fewest}.",
            hint=f"Use --video-sample-n-frames {fewest} or more; the published command lines use 49 to 81.",
        )
    if "video" in spec.media_types:
        size_set("video", options, spec, dims)
