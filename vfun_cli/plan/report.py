"""The plan in numbers: the JSON of ``plan-buckets`` and the story of one clip."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from vfun_cli.errors import ConfigError
from vfun_cli.families.spec import ClipShape, FamilySpec, ModelDims
from vfun_cli.metadata.table import ClipTable, IntArray
from vfun_cli.plan.assignment import assignment_json, planned_digest
from vfun_cli.plan.balance import independent_balance, mean_over_max, rounded
from vfun_cli.plan.clips import KINDS, REASONS, USED, Clips, draw_shapes, prepare, times_shown
from vfun_cli.plan.held_out import QUANTILES
from vfun_cli.plan.options import PlanOptions
from vfun_cli.plan.run_plan import RunPlan
from vfun_cli.plan.schedule import Buckets, EpochPlan
from vfun_cli.plan.sizes import ASPECTS, CROPS, SizeSet, documented_frames, size_set


@dataclass(frozen=True, kw_only=True)
class SizeRow:
    """One line of the size table, for a square clip."""

    kind: str
    size: int
    """Base size in pixels, a fraction rounded down."""
    name: str
    """What people call it: the base size, or height x width of a fixed one."""
    frames: int
    """The published figure: with the reference frame, where one enters the VAE beside the clip."""
    clip_frames: int
    latents: tuple[int, int, int]
    """Latent frames (with the reference), height, width."""
    tokens: int
    """The published figure: tokens of the latents above."""
    sequence_tokens: int
    """What the transformer sees: text, reference and motion included."""
    flops: float
    """FLOPs of one forward pass."""


def size_row(kind: str, sizes: SizeSet, index: int, options: PlanOptions, spec: FamilySpec, dims: ModelDims) -> SizeRow:
    """The line for one size."""
    size, shape = sizes.sizes[index], sizes.square(index)
    frames, height, width = spec.plan.latent_shape(shape)
    tokens = spec.plan.video_tokens(shape)
    if spec.plan.reference_frame:
        frames += 1
        tokens += (height // spec.plan.patch_size[1]) * (width // spec.plan.patch_size[2])
    return SizeRow(
        kind=kind,
        size=int(size.base),
        name="x".join(map(str, options.fix_sample_size)) or str(int(size.base)),
        frames=documented_frames(size.frames, spec),
        clip_frames=size.frames,
        latents=(frames, height, width),
        tokens=tokens,
        sequence_tokens=spec.model.sequence_tokens(shape, dims),
        flops=spec.model.forward_flops(shape, dims),
    )


def size_sets(options: PlanOptions, spec: FamilySpec, dims: ModelDims) -> dict[str, SizeSet]:
    """The size sets of the kinds that the family trains on."""
    return {kind: size_set(kind, options, spec, dims) for kind in KINDS if kind in spec.media_types}


def size_table(options: PlanOptions, spec: FamilySpec, dims: ModelDims) -> list[SizeRow]:
    """Videos first, then images, each smallest first."""
    sets = size_sets(options, spec, dims)
    return [
        size_row(kind, sizes, index, options, spec, dims)
        for kind, sizes in sets.items()
        for index in range(len(sizes.sizes))
    ]


def size_of_bucket(buckets: Buckets, options: PlanOptions, spec: FamilySpec, dims: ModelDims) -> IntArray:
    """For each bucket, the line of :func:`size_table` it belongs to."""
    lines: dict[tuple[int, int, int], int] = {}
    line = 0
    for kind, sizes in size_sets(options, spec, dims).items():
        for index in range(len(sizes.sizes)):
            for height, width in zip(sizes.heights[:, index].tolist(), sizes.widths[:, index].tolist(), strict=True):
                lines.setdefault((KINDS.index(kind), height, width), line)
            line += 1
    keys = zip(buckets.kind.tolist(), buckets.height.tolist(), buckets.width.tolist(), strict=True)
    return np.array([lines[key] for key in keys], dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What one epoch trains, in sums."""

    samples: int
    micro_batches: int
    steps: int
    tokens: int
    own_tokens: int
    """Tokens of the clips themselves; the rest is text, reference and motion. No micro-batch holds padding."""
    forward_flops: float
    seconds_kept: float
    """Seconds of the videos between the first and the last trained frame, one frame time included."""
    seconds_total: float
    """Seconds of the same videos in full."""
    frame_rates: tuple[tuple[Fraction, int, int], ...]
    """(source frames per second, stride, videos), the commonest first."""


def totals(plan: RunPlan, epoch: EpochPlan) -> Totals:
    """Sums over the micro-batches that the epoch trains."""
    table, size = plan.table, np.diff(epoch.offset)
    shapes, inverse = np.unique(np.stack([epoch.frames, epoch.height, epoch.width]), axis=1, return_inverse=True)
    own = np.array(
        [plan.spec.plan.video_tokens(ClipShape(frames=f, height=h, width=w)) for f, h, w in shapes.T.tolist()] or [0]
    )
    order = np.argsort(table.row, kind="stable")
    clip = order[np.searchsorted(table.row, epoch.row, sorter=order)]
    video = ~table.is_image[clip] & (table.fps_num[clip] > 0) & (table.fps_den[clip] > 0)
    clip, frames, stride = clip[video], np.repeat(epoch.frames, size)[video], epoch.stride[video]
    num, den = table.fps_num[clip], table.fps_den[clip]
    rates, videos = np.unique(np.stack([num, den, stride]), axis=1, return_counts=True)
    common = np.argsort(-videos, kind="stable")
    return Totals(
        samples=len(epoch.row),
        micro_batches=len(epoch.frames),
        steps=epoch.num_steps,
        tokens=int(epoch.tokens.sum()),
        own_tokens=int((own[inverse.reshape(-1)] * size).sum()) if len(size) else 0,
        forward_flops=float(epoch.flops.sum()),
        seconds_kept=float((np.minimum(frames * stride, table.frames[clip]) * den / num).sum()),
        seconds_total=float((table.frames[clip] * den / num).sum()),
        frame_rates=tuple(
            (Fraction(int(rates[0, i]), int(rates[1, i])), int(rates[2, i]), int(videos[i])) for i in common
        ),
    )


@dataclass(frozen=True, kw_only=True)
class LookCost:
    """What one look at the held-out rows costs: their loss, or videos of them."""

    rows: int
    passes: int
    """Forward passes, for the trained weights and their moving average: of a loss, one for each row and quantile; of
    videos, one for each row and denoising step, or two with guidance."""
    flops: float
    every_steps: int | None
    """Steps from one look to the next; None where the first epoch has none."""
    share_of_training: float | None
    """Its FLOPs over those of these steps, of which a forward and backward pass counts as three forward passes: a
    little too low for a LoRA, whose backward pass is cheaper."""


def held_out_cost(plan: RunPlan) -> LookCost | None:
    """Of the held-out loss of a run; None where no row is held out."""
    return _look_cost(plan, len(QUANTILES))


def samples_cost(plan: RunPlan) -> LookCost | None:
    """Of the videos that a run makes of its held-out rows; None where it makes none.

    Encoders and decoders are left out. Where a video sees no history (Wan-S2V), a pass is a little cheaper than that.
    """
    return None if plan.samples is None else _look_cost(plan, plan.samples.passes)


def _look_cost(plan: RunPlan, passes: int) -> LookCost | None:
    """Of so many forward passes over each held-out row, by each set of weights."""
    held_out, epoch, every = plan.held_out, plan.first_epoch, plan.steps_between_validations()
    if held_out is None:
        return None
    passes *= 2 if plan.averages else 1
    flops = held_out.forward_flops * passes
    training = 3 * float(epoch.flops.sum()) / epoch.num_steps * every if epoch.num_steps and every else None
    return LookCost(
        rows=len(held_out.clips),
        passes=len(held_out.clips) * passes,
        flops=flops,
        every_steps=every,
        share_of_training=None if training is None else float(f"{flops / training:.4g}"),
    )


def plan_json(plan: RunPlan, epochs: Sequence[EpochPlan] = (), *, assignment: bool = False) -> dict[str, Any]:
    """What ``plan-buckets --json`` prints, without ``schema``; ``epochs`` are consecutive ones of the plan.

    Without epochs, the size table alone. Counts are those of the first epoch; each has a line in the result's
    ``epochs``, on request (``assignment``) with every micro-batch. Training writes its own ``assignment_digest`` after
    each epoch.
    """
    rows = size_table(plan.options, plan.spec, plan.dims)
    result: dict[str, Any] = {
        "family": plan.spec.name,
        "sizes": [_size_json(row) for row in rows if row.kind == "video"],
        "image_sizes": [_size_json(row) for row in rows if row.kind == "image"],
    }
    if not epochs:
        return result
    first, buckets = epochs[0], epochs[0].buckets
    share = buckets.clips * buckets.flops
    share = share / share.sum()
    columns = (buckets.kind, buckets.height, buckets.width, buckets.frames, buckets.tokens, buckets.clips, share)
    result["buckets"] = [
        {
            "kind": KINDS[kind],
            "height": height,
            "width": width,
            "frames": frames,
            "tokens": tokens,
            "clips": clips,
            "compute_share": round(part, 6),
        }
        for kind, height, width, frames, tokens, clips, part in zip(*(c.tolist() for c in columns), strict=True)
    ]
    result["ledger"] = first.ledger.to_json()
    for name, entry in zip(plan.data_sets, result["ledger"].get("sets", ()), strict=False):
        entry["meta"] = name
    result["balance"] = {
        "world_size": first.world_size,
        "mean_over_max_flops": rounded(mean_over_max(first)),
        "independent_draws": rounded(independent_balance(first)),
    }
    result["steps_per_epoch"] = first.num_steps
    result["totals"] = _totals_json(totals(plan, first))
    costs = {"held_out": held_out_cost(plan), "samples": samples_cost(plan)}
    result |= {name: vars(cost) for name, cost in costs.items() if cost is not None}
    result["epochs"] = [
        {
            "epoch": each.epoch,
            "steps": each.num_steps,
            "trained": each.ledger.trained,
            "carried_out": each.ledger.carried_out,
            "mean_over_max_flops": rounded(mean_over_max(each)),
            "digest": each.digest(),
            "assignment_digest": planned_digest(each),
            **({"assignment": assignment_json(each)} if assignment else {}),
        }
        for each in epochs
    ]
    return result


def _size_json(row: SizeRow) -> dict[str, Any]:
    return {
        "size": row.size,
        "frames": row.frames,
        "tokens": row.tokens,
        "clip_frames": row.clip_frames,
        "latents": list(row.latents),
        "sequence_tokens": row.sequence_tokens,
    }


def _totals_json(sums: Totals) -> dict[str, Any]:
    return {
        "samples": sums.samples,
        "micro_batches": sums.micro_batches,
        "steps": sums.steps,
        "tokens": sums.tokens,
        "own_tokens": sums.own_tokens,
        "padding_tokens": 0,
        "forward_flops": sums.forward_flops,
        "seconds_kept": round(sums.seconds_kept, 3),
        "seconds_total": round(sums.seconds_total, 3),
        "frame_rates": [
            {"fps": round(float(fps), 3), "stride": stride, "trained_fps": round(float(fps / stride), 3), "videos": n}
            for fps, stride, n in sums.frame_rates
        ],
    }


def why(plan: RunPlan, row: int, epochs: Sequence[EpochPlan] = ()) -> dict[str, Any]:
    """One clip from its file to its bucket, in order, as JSON; :func:`why_lines` says it in words.

    Raises:
        ConfigError: the table has no such row.
    """
    table = plan.table
    found = np.flatnonzero(table.row == row)
    if len(found) == 0:
        raise ConfigError(f"the metadata has no row {row}.", hint=f"Rows count from 0; there are {len(table)}.")
    here = int(found[0])
    one = ClipTable(**{name: column[here : here + 1] for name, column in vars(table).items()})
    clips = prepare(plan.spec, plan.dims, one, plan.options)
    kind = KINDS[int(one.is_image[0])]
    height, width, stride = int(one.height[0]), int(one.width[0]), int(clips.stride[0])
    story: dict[str, Any] = {"row": row, "kind": kind, "source": {"height": height, "width": width}}
    if kind == "video":
        fps = Fraction(int(one.fps_num[0]), int(one.fps_den[0])) if one.fps_num[0] > 0 and one.fps_den[0] > 0 else None
        story["source"] |= {"frames": int(one.frames[0]), "fps": None if fps is None else round(float(fps), 3)}
        story["stride"] = stride
        story["trained_fps"] = None if fps is None else round(float(fps / stride), 3)
        story["frames_at_stride"] = int(clips.available[0])
    sizes = clips.sets[KINDS.index(kind)]
    if sizes is not None and height > 0 and width > 0:
        key = int(clips.aspect[0])
        story["ratio"] = round(height / width, 4)
        if plan.options.random_ratio_crop:
            story["aspects"] = list(CROPS)
        else:
            story["aspect"] = ASPECTS[key][0]
            story["sizes"] = [_candidate(clips, sizes, key, index, height, width) for index in range(len(sizes.sizes))]
    reason = int(clips.reason[0])
    if reason != USED:
        name = list(REASONS)[reason]
        return story | {"dropped": name, "message": REASONS[name]}
    every = prepare(plan.spec, plan.dims, table, plan.options)
    times = {each.epoch: int(times_shown(every, each.epoch + 1, since=each.epoch)[here]) for each in epochs}
    story["draws"] = [_placed(clips, copy, epoch) for epoch in epochs for copy in range(times[epoch.epoch])]
    return story


def _candidate(clips: Clips, sizes: SizeSet, key: int, index: int, height: int, width: int) -> dict[str, Any]:
    bucket = int(sizes.heights[key, index]), int(sizes.widths[key, index])
    return {
        "size": int(sizes.sizes[index].base),
        "height": bucket[0],
        "width": bucket[1],
        "frames": sizes.sizes[index].frames,
        "scale": round(max(bucket[0] / height, bucket[1] / width), 4),
        "allowed": index < int(clips.allowed[0]),
    }


def _placed(clips: Clips, copy: int, epoch: EpochPlan) -> dict[str, Any]:
    """What one repetition became in an epoch, and where it is trained."""
    one = np.zeros(1, dtype=np.int64)
    sample = draw_shapes(clips, one, one + copy, one + epoch.epoch)
    shape = ClipShape(frames=int(sample.frames[0]), height=int(sample.height[0]), width=int(sample.width[0]))
    result: dict[str, Any] = {
        "epoch": epoch.epoch,
        "copy": copy,
        "height": shape.height,
        "width": shape.width,
        "frames": shape.frames,
        "tokens": clips.spec.model.sequence_tokens(shape, clips.dims),
    }
    row = int(clips.table.row[0])
    hits = np.flatnonzero((epoch.row == row) & (epoch.copy == copy) & (epoch.sample_epoch == epoch.epoch))
    if len(hits) == 0:
        return result | {"carried": True}
    number = int(np.searchsorted(epoch.offset, hits[0], side="right")) - 1
    step, slot = (int(place[0]) for place in np.nonzero(epoch.steps == number))
    index, rank = divmod(slot, epoch.world_size)
    return result | {"carried": False, "step": step, "rank": rank, "accumulation_index": index}


def why_lines(story: dict[str, Any]) -> list[str]:
    """The story of :func:`why` in sentences."""
    source, row = story["source"], story["row"]
    file = f" ({story['file']})" if "file" in story else ""
    place = story.get("place", f"row {row}")
    lines = [f"{place}{file}: {story['kind']}, {source['width']}x{source['height']} (width x height)"]
    if story["kind"] == "video":
        lines.append(
            f"{source['frames']} frames at {source['fps']} fps, every {story['stride']}. frame: "
            f"{story['frames_at_stride']} frames at {story['trained_fps']} fps"
        )
    if "aspect" in story:
        lines.append(f"height / width = {story['ratio']}, nearest aspect {story['aspect']}")
    if "aspects" in story:
        lines.append(f"height / width = {story['ratio']}, cropped to one of {', '.join(map(str, story['aspects']))}")
    for size in story.get("sizes", ()):
        verdict = "allowed" if size["allowed"] else "left out: enlarged by more than 1.25"
        lines.append(
            f"size {size['size']}: bucket {size['height']}x{size['width']}, up to {size['frames']} frames, "
            f"scale {size['scale']:.2f}, {verdict}"
        )
    if "dropped" in story:
        lines.append(f"dropped: {story['dropped']}, {story['message']}")
    for drawn in story.get("draws", ()):
        copy = f", copy {drawn['copy']}" if drawn["copy"] else ""
        place = (
            "carried into the next epoch"
            if drawn["carried"]
            else f"step {drawn['step']} on rank {drawn['rank']}"
            + (f", accumulation index {drawn['accumulation_index']}" if drawn["accumulation_index"] else "")
        )
        lines.append(
            f"epoch {drawn['epoch']}{copy}: {drawn['height']}x{drawn['width']}, {drawn['frames']} frames, "
            f"{drawn['tokens']:,} tokens, {place}"
        )
    return lines
