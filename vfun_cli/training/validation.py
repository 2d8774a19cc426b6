"""When a run is looked at from outside of its training, and by what."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vfun_cli.run.metrics_file import read_records
from vfun_cli.run.rundir import RunDir
from vfun_cli.training.heldout import HeldOutLoss, records
from vfun_cli.training.looking import Stopped, weights_of
from vfun_cli.training.metrics import Metrics
from vfun_cli.training.samples import Samples
from vfun_cli.training.signals import CONTINUE
from vfun_cli.training.waiting import gather_all

Look = Callable[[int], int]
"""Looks at the run after a step; returns why to stop, or ``CONTINUE``. All ranks call it together."""


class Validation:
    """Calls what looks at the run, at its dates."""

    def __init__(self, dates: Iterator[int], looks: Sequence[Look]) -> None:
        self.dates = dates
        """Steps, ascending."""
        self.next = next(dates, None)
        self.looks = looks

    def due(self, step: int) -> bool:
        """Whether to look now; steps only grow."""
        while self.next is not None and self.next < step:
            self.next = next(self.dates, None)
        return self.next == step

    def run(self, step: int) -> int:
        """Look; returns why to stop, and then something was left out, or ``CONTINUE``."""
        for look in self.looks:
            reason = look(step)
            if reason != CONTINUE:
                return reason
        return CONTINUE


def held_out_look(held_out: HeldOutLoss, metrics: Metrics, run: RunDir, first_step: int) -> Look:
    """Records the held-out loss of a step, unless the launch before has recorded it; all ranks call it together."""
    known = gather_all(_is_recorded(held_out, run, first_step) if held_out.accelerator.is_main_process else None)[0]

    def look(step: int) -> int:
        if known and step == first_step:
            return CONTINUE
        began = time.perf_counter()
        try:
            losses = held_out.compute()
        except Stopped as stopped:
            return stopped.reason
        for record in records(step, losses, time.perf_counter() - began):
            metrics.held_out(record)
        return CONTINUE

    return look


def samples_look(samples: Samples, metrics: Metrics, run: RunDir, first_step: int) -> Look:
    """Makes the videos of a step, unless the launch before has made them; all ranks call it together."""
    is_main = samples.accelerator.is_main_process
    known = gather_all(bool(_records(run, "samples", first_step)) if is_main else None)[0]

    def look(step: int) -> int:
        if known and step == first_step:
            return CONTINUE
        began = time.perf_counter()
        try:
            made = samples.make(run.samples(step))
        except Stopped as stopped:
            return stopped.reason
        metrics.samples(step, made.videos, made.failed, time.perf_counter() - began)
        return CONTINUE

    return look


def _is_recorded(held_out: HeldOutLoss, run: RunDir, step: int) -> bool:
    weights = {record.get("weights") for record in _records(run, "held-out", step)}
    return weights >= set(weights_of(held_out.state))


def _records(run: RunDir, event: str, step: int) -> list[dict[str, Any]]:
    """What ``metrics.jsonl`` says of such an event of a step."""
    return [record for record in read_records(run.metrics) if record.get("event") == event and record["step"] == step]
