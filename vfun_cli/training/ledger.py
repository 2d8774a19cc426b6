"""Compares what all ranks trained with the plan, at the end of every epoch."""

import sys
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from vfun_cli.plan.assignment import Line, assigned, digest, line, planned_digest, rank_digest
from vfun_cli.plan.schedule import EpochPlan
from vfun_cli.training.data.loader import LoadedBatch


@dataclass(frozen=True, kw_only=True)
class _Part:
    """An epoch, or what a run trains of it."""

    plan: EpochPlan
    first_step: int
    """Step of the run with which the plan starts; it may lie before what this launch trains."""


class EpochLedger:
    """Notes what this rank trains, and at the end of an epoch compares all ranks with the plan."""

    def __init__(self, accelerator: Accelerator, first_step: int) -> None:
        self.accelerator = accelerator
        self.next_step = first_step
        """Step of the run that comes next."""
        self.begun = first_step
        """Step of the run with which the lines below begin."""
        self.parts: deque[_Part] = deque()
        self.lines: list[Line] = []
        self.micro_batches = 0
        self.skipped: list[int] = []

    def plan(self, plan: EpochPlan, first_step: int) -> None:
        """An epoch that will be trained next; ``first_step`` is the step of the run with which it starts."""
        self.parts.append(_Part(plan=plan, first_step=first_step))

    def step(self, micro_batches: list[LoadedBatch]) -> dict[str, Any] | None:
        """Note one trained step; at the end of an epoch, the line for ``metrics.jsonl`` (on every rank)."""
        part = self.parts[0]
        for loaded in micro_batches:
            self._note(loaded, self.next_step - part.first_step)
        self.next_step += 1
        return self.close() if self.next_step == part.first_step + part.plan.num_steps else None

    def close(self) -> dict[str, Any] | None:
        """Compare what was noted since the last comparison; None if nothing was. All ranks call it together."""
        if self.next_step == self.begun:
            return None
        part = self.parts[0]
        first, last = self.begun - part.first_step, self.next_step - part.first_step
        record = self._compare(part.plan, first, last)
        self.begun, self.lines, self.micro_batches, self.skipped = self.next_step, [], 0, []
        if last == part.plan.num_steps:
            self.parts.popleft()
        return record

    def _note(self, loaded: LoadedBatch, step: int) -> None:
        self.micro_batches += 1
        for request, error in loaded.bad:
            self.skipped.append(request.key.row)
            print(f"skipped: {error.message}", file=sys.stderr, flush=True)
        for request in loaded.trained:
            shape, key = (request.frames, request.height, request.width), request.key
            sample = (key.row, key.copy, key.epoch)
            self.lines.append(line(step, loaded.batch.index, request.kind, shape, request.stride, sample))

    def _compare(self, plan: EpochPlan, first: int, last: int) -> dict[str, Any]:
        numbers = [*rank_digest(self.lines), len(self.lines), self.micro_batches, len(self.skipped)]
        mine = torch.tensor([numbers], dtype=torch.int64, device=self.accelerator.device)
        ranks = self.accelerator.gather(mine).cpu()  # [ranks, 32 + 3]
        samples, micro_batches, num_skipped = (int(count) for count in ranks[:, 32:].sum(0))
        skipped = sorted(gather_object(self.skipped)) if num_skipped else []
        executed = digest(bytes(row[:32].tolist()) for row in ranks)
        planned = planned_digest(plan, first, last)
        num_planned = sum(len(assigned(plan, rank, first, last)) for rank in range(plan.world_size))
        return {
            "event": "epoch",
            "step": self.next_step,
            "epoch": plan.epoch,
            "steps": last - first,
            "complete": (first, last) == (0, plan.num_steps),
            "planned": {
                "samples": num_planned,
                "micro_batches": plan.steps[first:last].size,
                "assignment_digest": planned,
            },
            "executed": {"samples": samples, "micro_batches": micro_batches, "assignment_digest": executed},
            "skipped": skipped,
            "agree": executed == planned if not skipped else samples + num_skipped == num_planned,
        }
