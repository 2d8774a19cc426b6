"""The plan as the loader wants it: this rank's micro-batches with paths and keys, from any step on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vfun_cli.config.options import RunConfig
from vfun_cli.families.spec import FamilySpec
from vfun_cli.metadata.fields import stated_media
from vfun_cli.metadata.opening import absolute
from vfun_cli.metadata.table import IntArray
from vfun_cli.modeling.adapter import SampleRequest
from vfun_cli.modeling.captions import AS_STATED, CaptionOptions
from vfun_cli.modeling.randomness import SampleKey
from vfun_cli.plan.captions import caption_options
from vfun_cli.plan.rows import of_validation
from vfun_cli.plan.run_plan import RunPlan
from vfun_cli.plan.schedule import EpochPlan, PlannedMicroBatch, PlannedSample
from vfun_cli.plan.sets import rows_by_number
from vfun_cli.training.data.loader import MicroBatch


@dataclass(frozen=True, kw_only=True)
class RowToTrain:
    """A row of the metadata for those who decode it."""

    record: dict[str, Any]
    """What it says, its media as absolute paths; what stands in for a field is filled in."""
    place: str = ""
    """What it is called, if not by its number."""
    captions: CaptionOptions = AS_STATED
    """What is made of its texts."""


ReadRow = Callable[[int], RowToTrain]
"""A row by its number among those of all data sets."""


def row_reader(config: RunConfig, spec: FamilySpec, *, stored: str | None = None, digest: str = "") -> ReadRow:
    """The rows of a run's metadata.

    Args:
        stored: where the launch has stored them, with this digest; None: they are read from the metadata.
    """
    metadata, record_of = rows_by_number(config, None if stored is None else Path(stored), digest)
    captions = [caption_options(config, each) for each in config.train_data_meta]

    def read_row(row: int) -> RowToTrain:
        record = record_of(row)
        fields, root = dict(record.fields), record.root or config.train_data_dir or Path()
        for name, path in stated_media(fields, spec.fields).items():
            if path:
                fields[name] = absolute(root / str(path))
        return RowToTrain(record=fields, place=metadata.place(row), captions=captions[metadata.set_of(row)])

    return read_row


def micro_batches(
    plan: RunPlan,
    read_row: ReadRow,
    *,
    rank: int,
    first_step: int,
    tell: Callable[[EpochPlan, int], None] = lambda epoch, step: None,
) -> Iterator[MicroBatch]:
    """Every micro-batch of one rank in order, steps before ``first_step`` left out.

    ``tell`` hears of every epoch of which a step is trained, with the step of the run that it starts at.
    """
    order = np.argsort(plan.table.row, kind="stable")
    step, total_steps = 0, plan.steps()
    for epoch_plan in plan.epochs():
        skipped = min(max(0, first_step - step), epoch_plan.num_steps)
        if skipped < epoch_plan.num_steps:
            tell(epoch_plan, step)
        step += skipped
        shares = _shares(epoch_plan)[skipped:]
        for share, batches in zip(shares, epoch_plan.micro_batches_for(rank, skipped), strict=True):
            if step >= total_steps:
                return
            for index, batch in enumerate(batches):
                requests = tuple(_request(plan, batch, sample, order, read_row(sample.row)) for sample in batch.samples)
                yield MicroBatch(epoch=epoch_plan.epoch, step=step, index=index, requests=requests, share=share)
            step += 1


def held_out_requests(plan: RunPlan, config: RunConfig, read_row: ReadRow) -> list[SampleRequest]:
    """What the held-out loss of a run is computed on, in row order: with all conditions, under keys of their own.

    A row with several captions is looked at with one of them, the same at every step.

    Args:
        read_row: of the rows to train on, of which some may be held out.
    """
    if plan.held_out is None:
        return []
    if config.validation_meta is not None:
        read_row = row_reader(of_validation(config), plan.spec)
    return [
        SampleRequest(
            key=SampleKey(seed=plan.options.seed, epoch=0, row=clip.row, drops=False),
            **vars(read_row(clip.row)),
            kind=clip.kind,
            frames=clip.shape.frames,
            height=clip.shape.height,
            width=clip.shape.width,
            stride=clip.stride,
            total_frames=clip.total_frames,
            fps=clip.fps,
        )
        for clip in plan.held_out.clips
    ]


def _shares(plan: EpochPlan) -> list[float]:
    """FLOPs of each step's heaviest rank over the epoch's mean; a tiny dataset has epochs without a step."""
    if not plan.num_steps:
        return []
    slots = plan.flops[plan.steps].reshape(plan.num_steps, -1, plan.world_size)
    heaviest = slots.sum(axis=1).max(axis=1)
    shares: list[float] = (heaviest / heaviest.mean()).tolist()
    return shares


def _request(
    plan: RunPlan, batch: PlannedMicroBatch, sample: PlannedSample, order: IntArray, row: RowToTrain
) -> SampleRequest:
    table = plan.table
    position = order[np.searchsorted(table.row, sample.row, sorter=order)]
    return SampleRequest(
        key=SampleKey(
            seed=plan.options.seed,
            epoch=sample.epoch,
            row=sample.row,
            copy=sample.copy,
            variants=plan.options.cache_variants or 0,
        ),
        **vars(row),
        kind=batch.kind,
        frames=batch.shape.frames,
        height=batch.shape.height,
        width=batch.shape.width,
        stride=sample.stride,
        total_frames=int(np.asarray(table.frames)[position]),
        fps=(int(table.fps_num[position]), int(table.fps_den[position])),
    )
