"""The cost-equal schedule: micro-batches of one shape, steps of equally expensive micro-batches.

An epoch pools its own draws with what the epoch before left over, cuts the pool into micro-batches of one shape,
sorts them by FLOPs and gives every optimizer step a run of ``world size x accumulation`` neighbours; the steps are
then shuffled. What fills no micro-batch or no step is carried into the next epoch, each sample under the epoch it
was drawn in, so that its noise does not depend on the number of ranks.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vfun_cli.config.datasets import in_decimals
from vfun_cli.errors import ConfigError, MetadataError
from vfun_cli.families.spec import ClipShape, FamilySpec, ModelDims
from vfun_cli.metadata.table import BoolArray, ClipTable, IntArray
from vfun_cli.plan.clips import (
    KINDS,
    REASONS,
    Clips,
    Samples,
    draw_epoch,
    draw_shapes,
    most_drawn,
    prepare,
    times_shown,
)
from vfun_cli.plan.draws import random_words
from vfun_cli.plan.options import PlanOptions
from vfun_cli.plan.sizes import check_options

FloatArray = NDArray[np.float64]

DIGEST_FORMAT = b"vfun plan 1\n"


@dataclass(frozen=True, kw_only=True, eq=False)
class Carry:
    """Samples that an epoch left for the next one; their shapes follow from these numbers."""

    row: IntArray
    copy: IntArray
    epoch: IntArray

    def __len__(self) -> int:
        return len(self.row)

    @classmethod
    def empty(cls) -> "Carry":
        """Nothing carried: how the first epoch starts."""
        return cls(row=np.zeros(0, np.int64), copy=np.zeros(0, np.int64), epoch=np.zeros(0, np.int64))


@dataclass(frozen=True, kw_only=True)
class RunSegment:
    """How many micro-batches an optimizer step had in a part of a run that is over."""

    until: int
    """The part's end, in optimizer steps of the run."""
    slots: int
    """World size x accumulation."""


def earlier_segments(state: Mapping[str, Any], slots: int) -> tuple[RunSegment, ...]:
    """The sizes that steps had up to a checkpoint, for a continuation whose steps hold ``slots`` micro-batches.

    Args:
        state: the checkpoint's ``state.json``.
    """
    layouts = [RunSegment(**entry) for entry in state.get("layouts", ())]
    ran = state["world_size"] * state["run_config"]["gradient_accumulation_steps"]
    began = layouts[-1].until if layouts else 0
    if state["step"] > began and ran != slots:
        layouts.append(RunSegment(until=state["step"], slots=ran))
    elif state["step"] == began and layouts and layouts[-1].slots == slots:
        layouts.pop()  # back to the size it had before, without a step in between
    return tuple(layouts)


@dataclass(frozen=True, kw_only=True)
class SetLedger:
    """The part of a ledger that is about one of several data sets."""

    repeats: str
    """How often an epoch shows each clip, on average."""
    rows: int
    used: int
    samples: int
    """Draws of this epoch."""


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Where every row of the table went in one epoch. ``used`` + all of ``dropped`` = ``rows``."""

    rows: int
    used: int
    truncated: int
    """Used rows of which this epoch trains fewer frames than the whole clip has at its stride."""
    shortened: int
    """Used rows with fewer frames than the longest clip of the settings: the file is the limit."""
    dropped: dict[str, int]
    """Rows by reason, see ``clips.REASONS``."""
    samples: int
    """Draws of this epoch: used rows times their repetitions."""
    carried_in: int
    carried_out: int
    borrowed: int
    """Draws of following epochs that complete the only step of a run too small for one."""
    trained: int
    """``samples`` + ``carried_in`` + ``borrowed`` - ``carried_out``."""
    sets: tuple[SetLedger, ...] = ()
    """Of each data set in the order of the options; of one that each epoch shows whole, none."""

    def to_json(self) -> dict[str, Any]:
        """All counts by name."""
        sets = {"sets": [dict(vars(each)) for each in self.sets]} if self.sets else {}
        return {name: value for name, value in vars(self).items() if name != "sets"} | sets


@dataclass(frozen=True, kw_only=True, eq=False)
class Buckets:
    """The epoch's draws counted by shape, cheapest clip first. Columns are per bucket."""

    frames: IntArray
    height: IntArray
    width: IntArray
    kind: IntArray
    """Index into KINDS."""
    clips: IntArray
    """Samples drawn for this bucket in this epoch, trained now or carried."""
    tokens: IntArray
    """The transformer's sequence length for one clip, everything included."""
    flops: FloatArray
    """FLOPs of one forward pass on one clip."""

    def __len__(self) -> int:
        return len(self.frames)


@dataclass(frozen=True, kw_only=True)
class PlannedSample:
    """One clip of a micro-batch."""

    row: int
    copy: int
    epoch: int
    """The epoch of its random draws; earlier than the plan's if it was carried."""
    stride: int


@dataclass(frozen=True, kw_only=True)
class PlannedMicroBatch:
    """What one rank computes at a time: clips of one kind and shape."""

    kind: str
    shape: ClipShape
    samples: tuple[PlannedSample, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class EpochPlan:
    """One epoch. Micro-batch m holds the samples offset[m] to offset[m + 1]; micro-batches ascend by FLOPs."""

    epoch: int
    world_size: int
    frames: IntArray
    """Per micro-batch, as ``height``, ``width``, ``kind``, ``tokens`` and ``flops``."""
    height: IntArray
    width: IntArray
    kind: IntArray
    """Index into KINDS."""
    tokens: IntArray
    """Sequence tokens of all its clips together."""
    flops: FloatArray
    """Forward FLOPs of all its clips together."""
    offset: IntArray
    """[micro-batches + 1]"""
    row: IntArray
    """Per sample, as ``copy``, ``sample_epoch`` and ``stride``."""
    copy: IntArray
    sample_epoch: IntArray
    stride: IntArray
    steps: IntArray
    """[steps, slots] of micro-batch numbers; slot = accumulation index x world size + rank."""
    buckets: Buckets
    ledger: Ledger
    carry: Carry

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the epoch."""
        return len(self.steps)

    def micro_batch(self, number: int) -> PlannedMicroBatch:
        """One micro-batch with its samples."""
        first, last = self.offset[number], self.offset[number + 1]
        columns = (column[first:last].tolist() for column in (self.row, self.copy, self.sample_epoch, self.stride))
        return PlannedMicroBatch(
            kind=KINDS[self.kind[number]],
            shape=ClipShape(
                frames=int(self.frames[number]), height=int(self.height[number]), width=int(self.width[number])
            ),
            samples=tuple(
                PlannedSample(row=row, copy=copy, epoch=epoch, stride=stride)
                for row, copy, epoch, stride in zip(*columns, strict=True)
            ),
        )

    def micro_batches_for(self, rank: int, first_step: int = 0) -> Iterator[list[PlannedMicroBatch]]:
        """For each step from ``first_step``, the micro-batches of this rank in the order of accumulation."""
        for step in self.steps[first_step:]:
            yield [self.micro_batch(number) for number in step[rank :: self.world_size].tolist()]

    def cut(self, num_steps: int) -> "EpochPlan":
        """The epoch's first steps alone; what the other steps hold is left over."""
        other = self.steps[num_steps:].reshape(-1)
        sizes = np.diff(self.offset)[other]
        places = np.repeat(self.offset[other] - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())
        left = Carry(
            row=np.concatenate([self.carry.row, self.row[places]]),
            copy=np.concatenate([self.carry.copy, self.copy[places]]),
            epoch=np.concatenate([self.carry.epoch, self.sample_epoch[places]]),
        )
        return replace(self, steps=self.steps[:num_steps], carry=left)

    def digest(self) -> str:
        """SHA-256 over everything that decides the training: equal digests mean equal runs of this epoch."""
        sha = hashlib.sha256(DIGEST_FORMAT)
        sha.update(np.array([self.epoch, self.steps.shape[0], self.steps.shape[1]], dtype="<i8").tobytes())
        columns = (
            self.frames, self.height, self.width, self.kind, self.offset, self.row, self.copy, self.sample_epoch,
            self.stride, self.steps, self.carry.row, self.carry.copy, self.carry.epoch,
        )  # fmt: skip
        for column in columns:
            sha.update(np.array([column.size], dtype="<i8").tobytes())
            sha.update(np.ascontiguousarray(column, dtype="<i8").tobytes())
        return sha.hexdigest()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Shapes:
    """The distinct shapes of a pool, by ascending cost of a full micro-batch."""

    frames: IntArray
    height: IntArray
    width: IntArray
    kind: IntArray
    tokens: IntArray
    flops: FloatArray
    batch: IntArray
    """Clips in a full micro-batch of this shape."""


_BITS = 20  # a code of 1 + 3 x 20 bits: frames and sides below a million


def _shapes_of(samples: Samples, clips: Clips) -> tuple[_Shapes, IntArray]:
    """The pool's shapes, and for every sample the number of its shape."""
    code = samples.is_image.astype(np.int64)
    for column in (samples.frames, samples.height, samples.width):
        code = (code << _BITS) | column
    codes, inverse = np.unique(code, return_inverse=True)
    mask = (1 << _BITS) - 1
    kind, frames, height, width = (codes >> shift * _BITS & mask for shift in (3, 2, 1, 0))
    shapes = [
        ClipShape(frames=f, height=h, width=w)
        for f, h, w in zip(frames.tolist(), height.tolist(), width.tolist(), strict=True)
    ]
    tokens = np.array([clips.spec.model.sequence_tokens(shape, clips.dims) for shape in shapes], dtype=np.int64)
    flops = np.array([clips.spec.model.forward_flops(shape, clips.dims) for shape in shapes], dtype=np.float64)
    if clips.options.tokens_per_batch is None:
        batch = np.full(len(shapes), clips.options.train_batch_size, dtype=np.int64)
    else:
        batch = np.maximum(1, clips.options.tokens_per_batch // tokens)
    order = np.argsort(flops * batch, kind="stable")
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    columns = {"frames": frames, "height": height, "width": width, "kind": kind, "tokens": tokens, "batch": batch}
    found = _Shapes(**{name: column[order] for name, column in columns.items()}, flops=flops[order])
    return found, rank[inverse.reshape(-1)]


def _choose_runs(cost: FloatArray, carried: BoolArray, slots: int) -> IntArray:
    """First micro-batch of every run of ``slots`` neighbours, so that as little time as possible is waited.

    ``cost`` ascends. Of M micro-batches, M mod slots are left between the runs. Dynamic programming over
    (runs so far, micro-batches left so far); leaving a carried one costs more than any waiting, so nothing waits twice
    while there is anything else to leave.
    """
    num_runs, spare = divmod(len(cost), slots)
    if num_runs == 0 or spare == 0:
        return np.arange(num_runs, dtype=np.int64) * slots
    share = cost / cost[-1]
    total = np.concatenate(([0.0], np.cumsum(share)))
    starts = np.arange(len(cost) - slots + 1)
    waiting = slots * share[starts + slots - 1] - (total[starts + slots] - total[starts])
    left = np.concatenate(([0.0], np.cumsum(carried * float(len(cost)))))  # price of leaving everything before
    best = np.full(spare + 1, np.inf)
    best[0] = 0.0
    cheapest_here = np.empty((num_runs + 1, spare + 1), dtype=np.bool_)
    for run in range(num_runs + 1):
        first = run * slots
        without = best - left[first : first + spare + 1]
        cheapest = np.minimum.accumulate(without)
        np.equal(without, cheapest, out=cheapest_here[run])
        if run < num_runs:
            best = cheapest + left[first : first + spare + 1] + waiting[first : first + spare + 1]
    chosen = np.empty(num_runs, dtype=np.int64)
    skipped = spare
    for run in range(num_runs, 0, -1):
        skipped = int(np.flatnonzero(cheapest_here[run, : skipped + 1])[-1])
        chosen[run - 1] = (run - 1) * slots + skipped
    return chosen


def _pooled(clips: Clips, carry: Carry, epoch: int, *, draws: bool) -> tuple[Samples, Samples]:
    """This epoch's draws, if it still draws, and the carried samples with the shapes of their own epochs."""
    order = np.argsort(clips.table.row, kind="stable")
    place = np.searchsorted(clips.table.row, carry.row, sorter=order)
    carried = draw_shapes(clips, order[place], carry.copy, carry.epoch)
    return draw_epoch(clips, epoch) if draws else carried.take(np.zeros(0, np.int64)), carried


def _full_batches(shapes: _Shapes, shape: IntArray) -> int:
    return int((np.bincount(shape, minlength=len(shapes.batch)) // shapes.batch).sum())


def _borrow(clips: Clips, pool: Samples, epoch: int) -> list[Samples]:
    """Draws of the following epochs, as few epochs as complete one step."""
    parts: list[Samples] = []
    while True:
        together = Samples.concatenate([pool, *parts])
        missing = clips.options.slots - _full_batches(*_shapes_of(together, clips))
        if missing <= 0:
            return parts
        # One sample completes at most one micro-batch, so these epochs are needed in any case.
        for _ in range(-(-missing // most_drawn(clips))):
            parts.append(draw_epoch(clips, epoch + 1 + len(parts)))


def _plan(clips: Clips, epoch: int, carry: Carry, *, complete: bool, draws: bool = True) -> EpochPlan:
    options = clips.options
    drawn, carried = _pooled(clips, carry, epoch, draws=draws)
    pool = Samples.concatenate([carried, drawn])
    borrowed = _borrow(clips, pool, epoch) if complete else []
    if borrowed:
        pool = Samples.concatenate([pool, *borrowed])
    shapes, shape = _shapes_of(pool, clips)

    # Samples by shape, within a shape the oldest first, within an epoch in random order.
    words = random_words("order", options.seed, pool.epoch, clips.table.row[pool.clip], pool.copy)
    order = np.argsort(words, kind="stable")
    for key in (pool.epoch - pool.epoch.min(), shape):
        # Small integers sort stably in linear time: a third of a three-key lexsort on a million rows.
        order = order[np.argsort(key[order].astype(np.min_scalar_type(key.max())), kind="stable")]
    per_shape = np.bincount(shape, minlength=len(shapes.batch))
    batches = per_shape // shapes.batch
    of_shape = np.repeat(np.arange(len(batches)), batches)  # [micro-batches]
    within = np.arange(len(of_shape)) - np.repeat(np.cumsum(batches) - batches, batches)
    first = (np.cumsum(per_shape) - per_shape)[of_shape] + within * shapes.batch[of_shape]

    cost = (shapes.flops * shapes.batch)[of_shape]
    run_starts = _choose_runs(cost, pool.epoch[order[first]] < epoch, options.slots)
    if borrowed:
        run_starts = run_starts[:1]
    number = (run_starts[:, None] + np.arange(options.slots)).reshape(-1)  # micro-batches that are trained
    of_shape, first = of_shape[number], first[number]
    size = shapes.batch[of_shape]
    offset = np.concatenate(([0], np.cumsum(size)))
    places = np.repeat(first - offset[:-1], size) + np.arange(offset[-1])
    trained = order[places]
    left = np.ones(len(pool), dtype=np.bool_)
    left[trained] = False
    left &= pool.epoch <= epoch  # what was borrowed in vain belongs to its own epoch
    rest = order[left[order]]

    steps = np.arange(len(number)).reshape(-1, options.slots)
    shuffled = np.argsort(random_words("step", options.seed, np.array([epoch]), np.arange(len(steps))), kind="stable")
    steps = steps[shuffled]
    if options.heaviest_first and len(steps):
        heaviest = int(np.argmax(shuffled))
        steps = np.concatenate([steps[heaviest : heaviest + 1], np.delete(steps, heaviest, axis=0)])

    row = clips.table.row[pool.clip]
    return EpochPlan(
        epoch=epoch,
        world_size=options.world_size,
        frames=shapes.frames[of_shape],
        height=shapes.height[of_shape],
        width=shapes.width[of_shape],
        kind=shapes.kind[of_shape],
        tokens=shapes.tokens[of_shape] * size,
        flops=shapes.flops[of_shape] * size,
        offset=offset,
        row=row[trained],
        copy=pool.copy[trained],
        sample_epoch=pool.epoch[trained],
        stride=clips.stride[pool.clip[trained]],
        steps=steps,
        buckets=_buckets(shapes, shape[len(carried) : len(carried) + len(drawn)]),
        ledger=_ledger(clips, drawn, num_carried=len(carried), num_left=len(rest), num_trained=len(trained)),
        carry=Carry(row=row[rest], copy=pool.copy[rest], epoch=pool.epoch[rest]),
    )


def _buckets(shapes: _Shapes, drawn: IntArray) -> Buckets:
    clips = np.bincount(drawn, minlength=len(shapes.batch))
    kept = np.flatnonzero(clips)
    kept = kept[np.argsort(shapes.flops[kept], kind="stable")]
    return Buckets(
        frames=shapes.frames[kept], height=shapes.height[kept], width=shapes.width[kept], kind=shapes.kind[kept],
        clips=clips[kept], tokens=shapes.tokens[kept], flops=shapes.flops[kept],
    )  # fmt: skip


def _ledger(clips: Clips, drawn: Samples, *, num_carried: int, num_left: int, num_trained: int) -> Ledger:
    video, available = clips.used & ~clips.table.is_image, clips.available
    longest = max((size.frames for size in clips.sets[0].sizes), default=0) if clips.sets[0] else 0
    dropped = {name: int(np.count_nonzero(clips.reason == code)) for code, name in enumerate(REASONS)}
    return Ledger(
        rows=len(clips.table),
        used=int(np.count_nonzero(clips.used)),
        truncated=int(np.count_nonzero((drawn.copy == 0) & (drawn.frames < available[drawn.clip]))),
        shortened=int(np.count_nonzero(video & (available < longest))),
        dropped={name: count for name, count in dropped.items() if count},
        samples=len(drawn),
        carried_in=num_carried,
        carried_out=num_left,
        borrowed=num_trained + num_left - len(drawn) - num_carried,
        trained=num_trained,
        sets=_set_ledgers(clips, drawn),
    )


def _set_ledgers(clips: Clips, drawn: Samples) -> tuple[SetLedger, ...]:
    repeats = clips.options.repeats
    if repeats == (Fraction(1),):
        return ()
    every = (clips.table.set, clips.table.set[clips.used], clips.table.set[drawn.clip])
    counts = zip(*(np.bincount(column, minlength=len(repeats)).tolist() for column in every), strict=True)
    return tuple(
        SetLedger(repeats=in_decimals(times), rows=rows, used=used, samples=samples)
        for times, (rows, used, samples) in zip(repeats, counts, strict=True)
    )


def checked_clips(spec: FamilySpec, dims: ModelDims, table: ClipTable, options: PlanOptions) -> Clips:
    """The clips of a table that can be planned.

    Raises:
        ConfigError: options that cannot work.
        MetadataError: no row can be used; the message counts the reasons.
    """
    check_options(options, spec, dims)
    clips = prepare(spec, dims, table, options)
    if not clips.used.any():
        raise _nothing_usable(clips)
    numbers = np.bincount(clips.table.set[clips.used], minlength=len(options.repeats)).tolist()
    if not any(int(times * number) for times, number in zip(options.repeats, numbers, strict=True)):
        raise ConfigError(
            f"the repeats of the data sets show none of {int(clips.used.sum())} clips in an epoch.",
            hint="Raise them: an epoch must show one clip at least.",
            option="--train-data-meta",
        )
    return clips


def _nothing_usable(clips: Clips) -> MetadataError:
    if len(clips.table) == 0:
        return MetadataError("the metadata holds no rows.", hint="Write at least one record.")
    counts = {name: int(np.count_nonzero(clips.reason == code)) for code, name in enumerate(REASONS)}
    found = [f"{count} {name} ({REASONS[name]})" for name, count in counts.items() if count]
    stride = clips.options.video_sample_stride
    needed = clips.spec.plan.clip_needs(stride).shortest_video(stride)
    ways = {
        "too-short": f"A video needs {needed} frames at --video-sample-stride {stride}.",
        "too-small": "Lower --video-sample-size to the size of the clips.",
    }
    hints = [way for name, way in ways.items() if counts[name]]
    return MetadataError(
        f"none of the {len(clips.table)} rows can be trained on: {'; '.join(found)}.",
        hint=" ".join([*hints, "The rows: vfun validate-meta"]),
    )


def plan_epoch(
    spec: FamilySpec,
    dims: ModelDims,
    table: ClipTable,
    options: PlanOptions,
    epoch: int,
    *,
    carry: Carry | None = None,
    complete: bool = False,
) -> EpochPlan:
    """The plan of one epoch, a pure function of the arguments.

    ``carry`` is what the epoch before left over (None: nothing). With ``complete``, an epoch that has fewer
    micro-batches than a step needs borrows draws of the following epochs for one step, instead of leaving everything.

    Raises:
        ConfigError: options that cannot work.
        MetadataError: no row can be used.
    """
    clips = checked_clips(spec, dims, table, options)
    return _plan(clips, epoch, carry or Carry.empty(), complete=complete)


def plan_run(
    spec: FamilySpec,
    dims: ModelDims,
    table: ClipTable,
    options: PlanOptions,
    num_epochs: int,
    earlier: Sequence[RunSegment] = (),
) -> Iterator[EpochPlan]:
    """The plans of a run from its start, whose steps had other sizes in ``earlier`` parts; ``options`` hold since.

    An epoch in which the size changed comes as two plans: its steps until then, and the rest of it under the new
    size, made of exactly the samples that were not trained yet. What this yields is a pure function of the arguments.

    Raises:
        ConfigError: options that cannot work.
        MetadataError: no row can be used.
    """
    epoch, step, left, draws = 0, 0, Carry.empty(), True
    for segment in [*earlier, None]:
        ran = replace(options, world_size=segment.slots, gradient_accumulation_steps=1) if segment else options
        clips = checked_clips(spec, dims, table, ran)
        while epoch < num_epochs and (segment is None or step < segment.until):
            last_chance = step == 0 and epoch == num_epochs - 1
            plan = _plan(clips, epoch, left, complete=last_chance, draws=draws)
            draws = segment is None or plan.num_steps <= segment.until - step
            if segment is not None and epoch == num_epochs - 1 and step + plan.num_steps == segment.until:
                draws = len(plan.carry) == 0  # no epoch follows to take what is left: it may fill steps of the new size
            if segment is not None and not draws:
                plan = plan.cut(segment.until - step)
            left, step, epoch = plan.carry, step + plan.num_steps, epoch + draws
            yield plan


def count_steps(
    spec: FamilySpec,
    dims: ModelDims,
    table: ClipTable,
    options: PlanOptions,
    num_epochs: int,
    earlier: Sequence[RunSegment] = (),
) -> int:
    """Optimizer steps of a whole run, without planning its epochs.

    Only whole micro-batches leave the pool, so after E epochs all of them but fewer than a step's are trained,
    whatever was carried when; a change of the steps' size (``earlier``) divides what was left then by the new size.
    """
    first, left = 0, _count_micro_batches(spec, dims, table, options, num_epochs)
    for segment in earlier:
        left -= (segment.until - first) * segment.slots
        first = segment.until
    return max(1, first + max(0, left) // options.slots)


def _count_micro_batches(
    spec: FamilySpec, dims: ModelDims, table: ClipTable, options: PlanOptions, num_epochs: int
) -> int:
    """floor(clips / batch) summed over shapes; with one clip in a micro-batch the shapes do not matter."""
    clips = checked_clips(spec, dims, table, options)
    if options.train_batch_size == 1 and options.tokens_per_batch is None:
        return int(times_shown(clips, num_epochs).sum())
    counts: dict[tuple[int, int, int, int], list[int]] = {}
    for epoch in range(num_epochs):
        shapes, shape = _shapes_of(draw_epoch(clips, epoch), clips)
        columns: Sequence[IntArray] = (shapes.kind, shapes.frames, shapes.height, shapes.width, shapes.batch)
        number = np.bincount(shape, minlength=len(shapes.batch))
        for kind, frames, height, width, batch, count in zip(*columns, number, strict=True):
            entry = counts.setdefault((int(kind), int(frames), int(height), int(width)), [int(batch), 0])
            entry[1] += int(count)
    return sum(count // batch for batch, count in counts.values())
