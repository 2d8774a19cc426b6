"""How ranks wait for each other while files are read and written: through the hosts, and with patience.

A collective of NCCL ends the job where one rank is late by more than ``COLLECTIVE_LIMIT``. To write the state of
Wan2.2-S2V, 196 GB, may take a shared disk longer than that, and to read its weights too, so whatever waits for files
goes through a group of its own, of gloo, whose limit is ``FILES_LIMIT``. Ranks that wait there hear at once of one that
has died, by its connection, and of a machine that does not answer any more by ``launch/machines.py``.
"""

from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist

COLLECTIVE_LIMIT = timedelta(minutes=10)
"""How late a rank may be at a collective of a training step: NCCL's own default. Only a rank that is lost should be.
All come to a step together (``turns.py``), and the slowest that a whole one does inside is to compile its blocks, which
takes minutes. What reads, writes or waits for files on one rank alone is followed by a wait of this module."""

TURN_LIMIT = timedelta(minutes=30)
"""How late a rank may be where all ask each other, as before a step: beside what a step takes, to decode a long video
that was made, and to wait for files that hang until a worker is given up, five minutes. gloo's own default."""

FILES_LIMIT = timedelta(hours=12)
"""How long a checkpoint may be written: 196 GB at 5 MB/s. That a rank has died, its connection tells at once."""

T = TypeVar("T")


def patient_group() -> dist.ProcessGroup | None:
    """All ranks on gloo, None where there is one process alone; all ranks ask for it first together."""
    return _beside(dist.group.WORLD, FILES_LIMIT) if dist.is_initialized() else None


@cache
def _beside(world: dist.ProcessGroup, limit: timedelta) -> dist.ProcessGroup:
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=limit)
    return group


def wait_for_all() -> None:
    """Go on when all ranks have come here."""
    group = patient_group()
    if group is not None:
        dist.barrier(group=group)


def gather_all(value: T) -> list[T]:
    """What all ranks hand in, by rank; on all of them."""
    group = patient_group()
    if group is None:
        return [value]
    gathered = [value] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def of_rank(rank: int, value: T) -> T:
    """What this rank hands in, on all of them."""
    group = patient_group()
    if group is None:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=rank, group=group)
    return values[0]


def most_of_all(numbers: Sequence[int]) -> list[int]:
    """The largest of each number over all ranks, within ``TURN_LIMIT``; all of them call it together."""
    if not dist.is_initialized():
        return list(numbers)
    largest = torch.tensor(numbers)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=_beside(dist.group.WORLD, TURN_LIMIT))
    return largest.tolist()
