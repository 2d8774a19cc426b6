"""The plan as the loader wants it: this rank's micro-batches with paths and keys, from any step on."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vfun_cli.config.options import RunConfig
from vfun_cli.families.spec import FamilySpec
from vfun_cli.metadata.fields import stated_media
from vfun_cli.metadata.opening import absolute
from vfun_cli.metadata.records import read_metadata
from vfun_cli.modeling.adapter import SampleRequest
from vfun_cli.modeling.captions import AS_STATED, CaptionOptions
from vfun_cli.modeling.randomness import SampleKey
from vfun_cli.plan.captions import caption_options
from vfun_cli.plan.rows import of_validation
from vfun_cli.plan.run_plan import RunPlan
from vfun_cli.plan.schedule import EpochPlan, PlannedMicroBatch, PlannedSample
from vfun_cli.training.data.loader import MicroBatch

ReadRecord = Callable[[int], dict[str, Any]]
"""What a row of the metadata says, its media as absolute paths; what stands in for a field is filled in."""


def record_reader(config: RunConfig, spec: FamilySpec) -> ReadRecord:
    """The rows of a run's metadata."""
    assert config.train_data_meta is not None
    records = {record.row: record.fields for record in read_metadata(config.train_data_meta).records}
    root = config.train_data_dir

    def read_record(row: int) -> dict[str, Any]:
        fields = dict(records[row])
        for name, path in stated_media(fields, spec.fields).items():
            if path:
                fields[name] = absolute((root or Path()) / str(path))
        return fields

    return read_record


def micro_batches(
    plan: RunPlan,
    read_record: ReadRecord,
    *,
    rank: int,
    first_step: int,
    captions: CaptionOptions = AS_STATED,
    tell: Callable[[EpochPlan, int], None] = lambda epoch, step: None,
) -> Iterator[MicroBatch]:
    """Every micro-batch of one rank in order, steps before ``first_step`` left out.

    ``tell`` hears of every epoch of which a step is trained, with the step of the run that it starts at.
    """
    place = {int(row): position for position, row in enumerate(plan.table.row)}
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
                requests = tuple(
                    _request(plan, batch, sample, place[sample.row], read_record(sample.row), captions)
                    for sample in batch.samples
                )
                yield MicroBatch(epoch=epoch_plan.epoch, step=step, index=index, requests=requests, share=share)
            step += 1


def held_out_requests(plan: RunPlan, config: RunConfig) -> list[SampleRequest]:
    """What the held-out loss of a run is computed on, in row order: with all conditions, under keys of their own.

    A row with several captions is looked at with one of them, the same at every step.
    """
    if plan.held_out is None:
        return []
    own_meta = config.validation_meta is not None
    read_record = record_reader(of_validation(config) if own_meta else config, plan.spec)
    return [
        SampleRequest(
            key=SampleKey(seed=plan.options.seed, epoch=0, row=clip.row, drops=False),
            record=read_record(clip.row),
            kind=clip.kind,
            frames=clip.shape.frames,
            height=clip.shape.height,
            width=clip.shape.width,
            stride=clip.stride,
            total_frames=clip.total_frames,
            fps=clip.fps,
            captions=caption_options(config),
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
    plan: RunPlan,
    batch: PlannedMicroBatch,
    sample: PlannedSample,
    position: int,
    record: dict[str, Any],
    captions: CaptionOptions,
) -> SampleRequest:
    table = plan.table
    return SampleRequest(
        key=SampleKey(
            seed=plan.options.seed,
            epoch=sample.epoch,
            row=sample.row,
            copy=sample.copy,
            variants=plan.options.cache_variants or 0,
        ),
        record=record,
        kind=batch.kind,
        frames=batch.shape.frames,
        height=batch.shape.height,
        width=batch.shape.width,
        stride=sample.stride,
        total_frames=int(np.asarray(table.frames)[position]),
        fps=(int(table.fps_num[position]), int(table.fps_den[position])),
        captions=captions,
    )
