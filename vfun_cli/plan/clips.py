"""What each clip of a table can become: usable or dropped, its stride, its length, and the shape it draws."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vfun_cli.errors import ConfigError
from vfun_cli.families.spec import FamilySpec, ModelDims
from vfun_cli.metadata.table import BoolArray, ClipTable, IntArray
from vfun_cli.plan.draws import random_words, uniform
from vfun_cli.plan.options import PlanOptions
from vfun_cli.plan.sizes import (
    ASPECTS,
    CROPS,
    MOST_ENLARGED,
    SQUARE,
    SizeSet,
    nearest_aspect,
    round_frames,
    size_set,
)

KINDS = ("video", "image")

REASONS: dict[str, str] = {
    "held-out": "kept for validation",
    "unsupported-type": "the family does not train on rows of this type",
    "unknown-size": "width or height is unknown",
    "unknown-length": "the number of frames is unknown",
    "unknown-fps": "the frame rate is unknown, and the family chooses its stride by it",
    "too-short": "fewer frames than the shortest clip at this stride",
    "too-small": "would be enlarged by more than 1.25 even at the smallest size",
}
"""Why a row is dropped, in the order in which the checks are made."""

USED = -1

CROPPED_TO = np.array([index for index, (key, _, _) in enumerate(ASPECTS) if key in CROPS], dtype=np.int64)
"""The aspects that random_ratio_crop draws."""
OFTEN = np.array(list(CROPS.values()), dtype=np.int8)
"""How often each."""

FULL_LENGTH_SHARE = 0.9
"""With random_frame_crop, the probability that a clip keeps its length; shorter ones share the rest."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Clips:
    """A clip table together with everything about its rows that no random draw decides. Columns are per row."""

    table: ClipTable
    options: PlanOptions
    spec: FamilySpec
    dims: ModelDims
    sets: tuple[SizeSet | None, SizeSet | None]
    """Sizes of videos and of images; None where the family takes none."""
    reason: IntArray
    """Index into REASONS, or USED."""
    stride: IntArray
    available: IntArray
    """Frames of the whole clip at its stride."""
    aspect: IntArray
    """The clip's own, index into ASPECTS; with random_ratio_crop it counts for nothing."""
    allowed: IntArray
    """How many of the sizes, smallest first, do not enlarge the clip too much, at the aspect that allows most."""

    @property
    def used(self) -> BoolArray:
        """Rows that are trained."""
        return self.reason == USED


def _allowed_sizes(sizes: SizeSet, aspect: IntArray, height: IntArray, width: IntArray) -> IntArray:
    """Number of sizes whose bucket enlarges neither side by more than 1.25; sizes ascend, so it is a prefix."""
    count = np.zeros(len(aspect), dtype=np.int64)
    up, down = MOST_ENLARGED.numerator, MOST_ENLARGED.denominator
    for index in range(len(sizes.sizes)):
        fits = (sizes.heights[aspect, index] * down <= height * up) & (sizes.widths[aspect, index] * down <= width * up)
        count += fits & (count == index)
    return count


def _allowed_crops(sizes: SizeSet, height: IntArray, width: IntArray) -> NDArray[np.int8]:
    """The same for each aspect that random_ratio_crop draws: [clips, aspects]."""
    columns = [_allowed_sizes(sizes, np.full(len(height), aspect), height, width) for aspect in CROPPED_TO]
    return np.stack(columns, axis=1).astype(np.int8)


def prepare(spec: FamilySpec, dims: ModelDims, table: ClipTable, options: PlanOptions) -> Clips:
    """Decide for every row whether it can be used and what it may become."""
    num_rows = len(table)
    sets = tuple(size_set(kind, options, spec, dims) if kind in spec.media_types else None for kind in KINDS)
    needs = spec.plan.clip_needs(options.video_sample_stride)
    stride = np.where(table.is_image, 1, needs.stride_at(table.fps_num, np.maximum(table.fps_den, 1)))
    available = np.where(table.is_image, 1, needs.clip_frames(table.frames, stride))
    known_size = (table.width > 0) & (table.height > 0)
    if options.enable_bucket:
        aspect = nearest_aspect(np.maximum(table.height, 1), np.maximum(table.width, 1))
    else:
        aspect = np.full(num_rows, SQUARE, dtype=np.int64)
    allowed = np.zeros(num_rows, dtype=np.int64)
    supported = np.zeros(num_rows, dtype=np.bool_)
    for is_image, sizes in enumerate(sets):
        if sizes is not None:
            rows = np.flatnonzero(table.is_image == bool(is_image))
            supported[rows] = True
            sides = table.height[rows], table.width[rows]
            if options.random_ratio_crop:
                allowed[rows] = _allowed_crops(sizes, *sides).max(axis=1)
            else:
                allowed[rows] = _allowed_sizes(sizes, aspect[rows], *sides)
    video = ~table.is_image
    faults = {
        "held-out": table.held_out,
        "unsupported-type": ~supported,
        "unknown-size": ~known_size,
        "unknown-length": video & (table.frames <= 0),
        "unknown-fps": video
        & ((table.fps_num <= 0) | (table.fps_den <= 0))
        & (spec.plan.strides_to_max_fps is not None),
        "too-short": video & (available < needs.min_frames),
        "too-small": allowed == 0,
    }
    reason = np.full(num_rows, USED, dtype=np.int64)
    for code, name in reversed(list(enumerate(REASONS))):
        reason[faults[name]] = code
    for is_image, sizes in enumerate(sets):
        if sizes is not None:
            used = (reason == USED) & (table.is_image == bool(is_image))
            _require_sides(sizes, CROPPED_TO if options.random_ratio_crop and used.any() else aspect[used], spec)
    return Clips(
        table=table, options=options, spec=spec, dims=dims, sets=(sets[0], sets[1]), reason=reason, stride=stride,
        available=available, aspect=aspect, allowed=allowed,
    )  # fmt: skip


def _require_sides(sizes: SizeSet, aspect: IntArray, spec: FamilySpec) -> None:
    """Refuse settings whose smallest bucket, for the aspects there are, is narrower than the transformer takes.

    Raises:
        ConfigError: naming the bucket.
    """
    kinds = np.unique(aspect)
    sides = np.stack([sizes.heights[kinds, 0], sizes.widths[kinds, 0]], axis=1)
    least = spec.plan.smallest_side
    narrow = np.flatnonzero(sides.min(axis=1) < least)
    if len(narrow):
        height, width = sides[narrow[0]].tolist()
        raise ConfigError(
            f"clips would train at {width}x{height}; {spec.name} needs at least {least} pixels a side.",
            hint="Use a larger --video-sample-size and --token-sample-size.",
        )


def dropped(clips: Clips) -> list[tuple[int, str, str]]:
    """(metadata row, name in REASONS, why in words) of every row that is not trained."""
    found = []
    for index in np.flatnonzero(~clips.used).tolist():
        name = list(REASONS)[int(clips.reason[index])]
        words = _too_small(clips, index) if name == "too-small" else REASONS[name]
        found.append((int(clips.table.row[index]), name, words))
    return found


def _too_small(clips: Clips, index: int) -> str:
    sizes = clips.sets[int(clips.table.is_image[index])]
    assert sizes is not None
    height, width = int(clips.table.height[index]), int(clips.table.width[index])
    aspects = CROPPED_TO if clips.options.random_ratio_crop else clips.aspect[[index]]
    buckets = zip(sizes.heights[aspects, 0].tolist(), sizes.widths[aspects, 0].tolist(), strict=True)
    scale, bucket = min((max(high / height, wide / width), (high, wide)) for high, wide in buckets)
    return f"{width}x{height} would be enlarged {scale:.2f} times for the smallest bucket, {bucket[1]}x{bucket[0]}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """Draws of clips: who (entry of the table, copy, epoch) and the shape each became. Columns are per sample."""

    clip: IntArray
    """Entry of the clip table (not the metadata row)."""
    copy: IntArray
    epoch: IntArray
    frames: IntArray
    height: IntArray
    width: IntArray
    is_image: BoolArray

    def __len__(self) -> int:
        return len(self.clip)

    def take(self, indices: IntArray) -> "Samples":
        """The samples at these places."""
        return Samples(**{name: column[indices] for name, column in vars(self).items()})

    @staticmethod
    def concatenate(parts: "list[Samples]") -> "Samples":
        """All samples of the parts, in order; of a single part that has any, its own columns, which nobody changes."""
        parts = [part for part in parts if len(part)] or parts[:1]
        if len(parts) == 1:
            return parts[0]
        return Samples(**{name: np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])})


def draw_shapes(clips: Clips, clip: IntArray, copy: IntArray, epoch: IntArray) -> Samples:
    """The shapes that these samples take: a pure function of (seed, epoch, row, copy) and the clip itself."""
    seed, row = clips.options.seed, clips.table.row[clip]
    variant = epoch % clips.options.cache_variants if clips.options.cache_variants else epoch
    chance = uniform("size", seed, variant, row, copy)
    is_image = clips.table.is_image[clip]
    aspect, allowed = clips.aspect[clip], clips.allowed[clip]
    if clips.options.random_ratio_crop:
        aspect, allowed = _ratio_crop(clips, clip, copy, variant)
    frames, height, width = (np.zeros(len(clip), dtype=np.int64) for _ in range(3))
    for image, sizes in enumerate(clips.sets):
        if sizes is None:
            continue
        length = np.array([size.frames for size in sizes.sizes], dtype=np.int64)
        for count in range(1, len(sizes.sizes) + 1):
            here = np.flatnonzero((is_image == bool(image)) & (allowed == count))
            size = np.searchsorted(sizes.cumulative[count, : count - 1], chance[here], side="right")
            frames[here] = length[size]
            height[here] = sizes.heights[aspect[here], size]
            width[here] = sizes.widths[aspect[here], size]
    if clips.options.random_frame_crop:
        frames = np.minimum(frames, _frame_crop(clips, row, copy, variant))
    frames = np.minimum(frames, clips.available[clip])
    values, inverse = np.unique(frames, return_inverse=True)
    rounded = np.array([round_frames(int(value), clips.spec, clips.dims) for value in values], dtype=np.int64)
    frames = np.where(is_image, 1, rounded[inverse] if len(values) else frames)
    return Samples(clip=clip, copy=copy, epoch=epoch, frames=frames, height=height, width=width, is_image=is_image)


def _ratio_crop(clips: Clips, clip: IntArray, copy: IntArray, variant: IntArray) -> tuple[IntArray, IntArray]:
    """The aspect of each sample under random_ratio_crop, and how many sizes it allows the clip.

    Drawn, as often as CROPS says, among those at which the smallest size does not enlarge the clip too much.
    """
    table = clips.table
    aspect, allowed = np.zeros_like(clip), np.zeros_like(clip)
    for image, sizes in enumerate(clips.sets):
        here = np.flatnonzero(table.is_image[clip] == bool(image))
        if sizes is None or not len(here):
            continue
        counts = _allowed_crops(sizes, table.height[clip[here]], table.width[clip[here]])
        running = np.cumsum(OFTEN * (counts > 0), axis=1, dtype=np.int8)
        chance = uniform("aspect", clips.options.seed, variant[here], table.row[clip[here]], copy[here])
        drawn = (running <= (chance * running[:, -1])[:, None]).sum(axis=1)
        aspect[here], allowed[here] = CROPPED_TO[drawn], counts[np.arange(len(here)), drawn]
    return aspect, allowed


def _frame_crop(clips: Clips, row: IntArray, copy: IntArray, variant: IntArray) -> IntArray:
    """Most frames of each sample under random_frame_crop: the full length, or one of the shorter ones alike."""
    rule = clips.spec.plan.frame_rule
    longest = max(rule.fewest, clips.options.video_sample_n_frames)
    lengths = np.arange(rule.fewest, longest + 1, rule.frames_per_latent)
    chance = uniform("frames", clips.options.seed, variant, row, copy)
    shorter = ((chance - FULL_LENGTH_SHARE) / (1 - FULL_LENGTH_SHARE) * (len(lengths) - 1)).astype(np.int64)
    return np.where(chance < FULL_LENGTH_SHARE, lengths[-1], lengths[np.clip(shorter, 0, len(lengths) - 1)])


def times_shown(clips: Clips, epochs: int, since: int = 0) -> IntArray:
    """How often the first ``epochs`` epochs, but for those before ``since``, together show each entry of the table.

    The i-th of the n clips of a set with r repeats, in an order that the seed decides: floor(r * epochs + i / n) times,
    and a video ``video_repeat`` times as often. So each epoch shows a whole number next to r * n, and wherever
    r * epochs is a whole number, all clips of the set have been shown equally often.
    """
    shown = np.zeros(len(clips.table), dtype=np.int64)
    for number, repeats in enumerate(clips.options.repeats):
        here = np.flatnonzero(clips.used & (clips.table.set == number))
        place = np.zeros(len(here), dtype=np.int64)
        if repeats.denominator > 1:
            words = random_words("repeats", clips.options.seed, clips.table.row[here])
            place[np.argsort(words, kind="stable")] = np.arange(len(here))
        for end, sign in ((epochs, 1), (since, -1)):
            whole, part = divmod(repeats.numerator * end, repeats.denominator)
            more = (part * len(here) + place * repeats.denominator) // (repeats.denominator * len(here) or 1)
            shown[here] += sign * (whole + more)
    return np.where(clips.table.is_image, shown, shown * max(1, clips.options.video_repeat))


def most_drawn(clips: Clips) -> int:
    """Samples that an epoch draws, or a few more where repeats are no whole numbers."""
    most = 0
    for number, repeats in enumerate(clips.options.repeats):
        here = clips.used & (clips.table.set == number)
        images, videos = (int(np.count_nonzero(here & (clips.table.is_image == kind))) for kind in (True, False))
        together = math.ceil(repeats * (images + videos))
        most += min(together, math.ceil(repeats) * images)
        most += min(together, math.ceil(repeats) * videos) * max(1, clips.options.video_repeat)
    return most


def draw_epoch(clips: Clips, epoch: int) -> Samples:
    """Every sample of an epoch: each clip as often as ``times_shown`` has it."""
    used = np.flatnonzero(clips.used)
    times = times_shown(clips, epoch + 1, since=epoch)[used]
    clip = np.repeat(used, times)
    copy = np.arange(len(clip)) - np.repeat(np.cumsum(times) - times, times)
    return draw_shapes(clips, clip, copy, np.full(len(clip), epoch, dtype=np.int64))
