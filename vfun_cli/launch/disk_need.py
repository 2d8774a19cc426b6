"""What the checkpoints of a run will take of its disk, said before it starts: those of Wan2.2-S2V take 196 GB each."""

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from vfun_cli.checkpoints.size import state_bytes
from vfun_cli.config import optimizers
from vfun_cli.config.options import RunConfig
from vfun_cli.config.strategies import STRATEGIES
from vfun_cli.files import existing
from vfun_cli.launch.job import Job

if TYPE_CHECKING:
    from vfun_cli.plan.run_plan import RunPlan

MANY = 5
LARGE = 0.1
"""More checkpoints than that are worth a word where no limit is set and they take this share of what is free."""


@dataclass(frozen=True, kw_only=True)
class DiskNeed:
    """What the checkpoints to come take at most, and what is there for them."""

    checkpoint_bytes: int
    """Of one: weights, moments and average; what describes them comes on top, a few kilobytes a tensor."""
    checkpoints: int
    """Most that lie there at a time: an old one goes after the new one is complete."""
    free_bytes: int

    @property
    def total_bytes(self) -> int:
        """Of all these."""
        return self.checkpoint_bytes * self.checkpoints

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self) | {"total_bytes": self.total_bytes}

    def __str__(self) -> str:
        each, total, free = (_size(value) for value in (self.checkpoint_bytes, self.total_bytes, self.free_bytes))
        return f"checkpoints: {each} each, at most {self.checkpoints:,} at a time: {total}; {free} are free"

    def warning(self, limit: int | None) -> str | None:
        """What should be said aloud, if anything.

        Args:
            limit: of the checkpoints that are kept.
        """
        advice = "--checkpoints-total-limit keeps the newest alone, --checkpointing-steps saves less often."
        if self.total_bytes > self.free_bytes:
            return (
                f"the checkpoints of this run will take {_size(self.total_bytes)}, and {_size(self.free_bytes)} are "
                f"free: it will stop at a full disk. {advice}"
            )
        if limit is None and self.checkpoints > MANY and self.total_bytes > LARGE * self.free_bytes:
            return f"all {self.checkpoints:,} checkpoints of this run are kept, {_size(self.total_bytes)}. {advice}"
        return None


def disk_need(job: Job) -> DiskNeed:
    """Of a job that trains."""
    first = job.found.step if job.found is not None else 0
    return need_of(job.config, job.plan, checkpoint_bytes(job.command, job.config, job.trained), first=first)


def need_of(config: RunConfig, plan: "RunPlan", each: int, *, first: int = 0) -> DiskNeed:
    """Of a plan whose checkpoints take so many bytes each. ``first``: the step from which it goes on."""
    # Epochs differ by a few steps; to count them exactly may mean to draw them all.
    last = plan.max_steps if plan.max_steps is not None else plan.num_epochs * plan.first_epoch.num_steps
    every = config.checkpointing_steps
    saved = last // every - first // every + (last % every > 0) if last > first else 1
    kept = saved if config.checkpoints_total_limit is None else min(saved, config.checkpoints_total_limit + 1)
    return DiskNeed(
        checkpoint_bytes=each,
        checkpoints=kept,
        free_bytes=shutil.disk_usage(existing(config.output_dir)).free,
    )


def checkpoint_bytes(command: str, config: RunConfig, trained: Sequence[tuple[int, ...]]) -> int:
    """Of one checkpoint of trained parameters of these shapes."""
    moments = optimizers.state_bytes(config, trained, ranks=optimizers.ranks_of_a_parameter(config))
    return checkpoint_bytes_with(command, config, sum(map(math.prod, trained)), moments=moments)


def checkpoint_bytes_with(command: str, config: RunConfig, parameters: int, *, moments: int) -> int:
    """The same of so many numbers that train, of which the optimizer keeps so many bytes."""
    copies = command == "train" and STRATEGIES[config.strategy].saves_copies
    copy_bytes = copies * config.compute_bytes
    return state_bytes(parameters, moments=moments, average=config.use_ema, copy_bytes=copy_bytes)


def _size(value: float) -> str:
    """In the units in which disks are sold."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} TB"
