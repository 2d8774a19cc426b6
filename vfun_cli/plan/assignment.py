"""Who trains what when: the samples of each rank in order, as numbers that plan and training can be compared by."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from vfun_cli.metadata.table import IntArray
from vfun_cli.plan.clips import KINDS
from vfun_cli.plan.schedule import EpochPlan

COLUMNS = ("step", "index", "kind", "frames", "height", "width", "stride", "row", "copy", "epoch")
"""Step of the epoch, accumulation index, shape and identity of one sample; ``kind`` is an index into KINDS."""

Line = tuple[int, ...]
"""One value for each of COLUMNS."""


def assigned(plan: EpochPlan, rank: int, first_step: int = 0, last_step: int | None = None) -> IntArray:
    """What a rank is to train in the steps ``first_step`` to ``last_step`` (excluded), [samples, COLUMNS]."""
    steps = plan.steps[first_step:last_step, rank :: plan.world_size]  # [steps, accumulation]
    number = steps.reshape(-1)
    size = np.diff(plan.offset)[number]
    before = np.cumsum(size) - size
    sample = np.repeat(plan.offset[number] - before, size) + np.arange(size.sum())
    step, index = (grid.reshape(-1) for grid in np.indices(steps.shape))
    shape = (plan.kind, plan.frames, plan.height, plan.width)
    columns = [
        *(np.repeat(column, size) for column in (step + first_step, index, *(part[number] for part in shape))),
        *(column[sample] for column in (plan.stride, plan.row, plan.copy, plan.sample_epoch)),
    ]
    return np.stack(columns, axis=1).astype(np.int64)


def rank_digest(lines: IntArray | Sequence[Line]) -> bytes:
    """32 bytes that stand for the samples of one rank in their order."""
    return hashlib.sha256(np.asarray(lines, dtype="<i8").reshape(-1, len(COLUMNS)).tobytes()).digest()


def digest(ranks: Iterable[bytes]) -> str:
    """SHA-256 over the digests of all ranks, rank 0 first."""
    return hashlib.sha256(b"".join(ranks)).hexdigest()


def planned_digest(plan: EpochPlan, first_step: int = 0, last_step: int | None = None) -> str:
    """The digest that executing these steps of the plan must give."""
    return digest(rank_digest(assigned(plan, rank, first_step, last_step)) for rank in range(plan.world_size))


def assignment_json(plan: EpochPlan) -> list[dict[str, Any]]:
    """Every micro-batch of the epoch: step, rank, accumulation index, shape, and its samples."""
    return [
        {
            "step": step,
            "rank": slot % plan.world_size,
            "index": slot // plan.world_size,
            "kind": batch.kind,
            **vars(batch.shape),
            "samples": [{"row": sample.row, "copy": sample.copy, "epoch": sample.epoch} for sample in batch.samples],
        }
        for step, numbers in enumerate(plan.steps.tolist())
        for slot, batch in enumerate(map(plan.micro_batch, numbers))
    ]


def line(step: int, index: int, kind: str, shape: tuple[int, int, int], stride: int, sample: Line) -> Line:
    """One sample as numbers: ``shape`` is (frames, height, width), ``sample`` (row, copy, epoch of its draws)."""
    return (step, index, KINDS.index(kind), *shape, stride, *sample)
