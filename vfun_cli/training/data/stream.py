"""The plan as the loader wants it: this rank's micro-batches with paths and keys, from any step on."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from vfun_cli.metadata.records import Record
from vfun_cli.modeling.adapter import SampleRequest
from vfun_cli.modeling.randomness import SampleKey
from vfun_cli.plan.run_plan import RunPlan
from vfun_cli.plan.schedule import EpochPlan, PlannedMicroBatch, PlannedSample, plan_run
from vfun_cli.training.data.loader import MicroBatch


def micro_batches(
    plan: RunPlan, *, rank: int, first_step: int, tell: Callable[[EpochPlan, int], None] = lambda epoch, step: None
) -> Iterator[MicroBatch]:
    """Every micro-batch of one rank in order, steps before ``first_step`` left out.

    ``tell`` hears of every epoch of which a step is trained, with the step of the run that it starts at.
    """
    place = {int(row): position for position, row in enumerate(plan.table.row)}
    step = 0
    for epoch_plan in plan_run(plan.spec, plan.dims, plan.table, plan.options, plan.num_epochs, plan.earlier):
        skipped = min(max(0, first_step - step), epoch_plan.num_steps)
        if skipped < epoch_plan.num_steps:
            tell(epoch_plan, step)
        step += skipped
        shares = _shares(epoch_plan)[skipped:]
        for share, batches in zip(shares, epoch_plan.micro_batches_for(rank, skipped), strict=True):
            if step >= plan.total_steps:
                return
            for index, batch in enumerate(batches):
                requests = tuple(_request(plan, batch, sample, place[sample.row]) for sample in batch.samples)
                yield MicroBatch(epoch=epoch_plan.epoch, step=step, index=index, requests=requests, share=share)
            step += 1


def _shares(plan: EpochPlan) -> list[float]:
    """FLOPs of each step's heaviest rank over the epoch's mean; a tiny dataset has epochs without a step."""
    if not plan.num_steps:
        return []
    slots = plan.flops[plan.steps].reshape(plan.num_steps, -1, plan.world_size)
    heaviest = slots.sum(axis=1).max(axis=1)
    shares: list[float] = (heaviest / heaviest.mean()).tolist()
    return shares


def _request(plan: RunPlan, batch: PlannedMicroBatch, sample: PlannedSample, position: int) -> SampleRequest:
    table = plan.table
    return SampleRequest(
        key=SampleKey(
            seed=plan.options.seed,
            epoch=sample.epoch,
            row=sample.row,
            copy=sample.copy,
            variants=plan.options.cache_variants or 0,
        ),
        record=_absolute(plan, plan.records[sample.row]),
        kind=batch.kind,
        frames=batch.shape.frames,
        height=batch.shape.height,
        width=batch.shape.width,
        stride=sample.stride,
        total_frames=int(np.asarray(table.frames)[position]),
        fps=(int(table.fps_num[position]), int(table.fps_den[position])),
    )


def _absolute(plan: RunPlan, record: Record) -> dict[str, Any]:
    """The record with its media paths joined to the data root."""
    fields = dict(record.fields)
    for field in plan.spec.fields:
        if fields.get(field.name) and plan.root is not None:
            fields[field.name] = str(plan.root / str(fields[field.name]))
    return fields
