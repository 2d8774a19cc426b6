"""How long a run takes, and what it costs: the FLOPs of its plan over what its devices do of their peak."""

import json
import math
from dataclasses import dataclass
from itertools import chain
from statistics import median
from typing import Any

import numpy as np

from vfun_cli.config.options import RunConfig
from vfun_cli.plan.flops import Costs, TrainedShare, peak_of
from vfun_cli.plan.run_plan import RunPlan
from vfun_cli.plan.schedule import EpochPlan
from vfun_cli.run.metrics_file import read_records
from vfun_cli.run.rundir import RunDir
from vfun_cli.shipped import shipped

ASSUMED_MFU = 0.30
"""Where nothing was measured: published runs of 14B video models reach 18 to 37 % with what vfun does by default."""
BENCHMARK = "gpu_step"
"""Of ``benchmarks/``; it measures steps of models of released width on the GPU at hand."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What a device does."""

    peak: float
    """FLOP/s, dense bf16."""
    mfu: float
    """The share of it that a run uses."""
    source: str
    """Where the share comes from."""


def pace(config: RunConfig, family: str, gpu: str | None) -> Pace | None:
    """Of this run's devices; None where their peak is unknown.

    Args:
        family: its name.
        gpu: their name.
    """
    peak = config.peak_tflops * 1e12 if config.peak_tflops is not None else peak_of(gpu) if gpu else None
    if peak is None:
        return None
    if config.mfu is not None:
        return Pace(peak=peak, mfu=config.mfu, source="--mfu")
    reached = [record["mfu"] for record in read_records(RunDir(config.output_dir).metrics) if record.get("mfu")]
    if reached:
        return Pace(peak=peak, mfu=median(reached), source=f"measured in {config.output_dir}")
    measured = _benchmark(config, family, gpu) if gpu is not None else None
    if measured is not None:
        flops, where = measured
        return Pace(peak=peak, mfu=flops / peak, source=f"measured by benchmarks/{BENCHMARK}.py on {where}")
    return Pace(peak=peak, mfu=ASSUMED_MFU, source="assumed; --mfu says another")


def _benchmark(config: RunConfig, family: str, gpu: str) -> tuple[float, str] | None:
    """FLOP/s of the benchmark's steps on a GPU with the peak of this one, and its name.

    Of this family or else of all, compiled or not as in this run, with its checkpointing or else with that of blocks.
    """
    try:
        found = json.loads((shipped("benchmarks") / "results" / f"{BENCHMARK}.json").read_text(encoding="utf-8"))
    except OSError:
        return None
    peak = peak_of(gpu)
    if peak is None or peak_of(found["gpu"] or "") != peak:
        return None
    all_rows = {each: part["rows"] for each, part in found.items() if isinstance(part, dict) and "rows" in part}
    rows = [
        row for row in all_rows.get(family) or chain(*all_rows.values())
        if "tflops" in row and row["compile"] == config.compile and not row["inline"]
    ]  # fmt: skip
    for checkpointing in (config.gradient_checkpointing, "block"):
        alike = [row["tflops"] * 1e12 for row in rows if row["checkpointing"] == checkpointing]
        if alike:
            return median(alike), found["gpu"]
    return None


@dataclass(frozen=True, kw_only=True)
class Duration:
    """Of an epoch, or of a run."""

    steps: int
    tokens: int
    flops: float
    """Of all ranks together, forward and backward; what is computed again is not counted."""
    seconds: float
    """By the slowest rank of each step."""

    def times(self, factor: float) -> "Duration":
        """So much of it."""
        return Duration(
            steps=round(self.steps * factor), tokens=round(self.tokens * factor), flops=self.flops * factor,
            seconds=self.seconds * factor,
        )  # fmt: skip

    def to_json(self, ranks: int, price: float | None) -> dict[str, Any]:
        """For programs."""
        hours = self.seconds / 3600
        found: dict[str, Any] = {
            "steps": self.steps, "tokens": self.tokens, "flops": self.flops, "hours": hours, "gpu_hours": hours * ranks,
        }  # fmt: skip
        return found | ({} if price is None else {"cost": hours * ranks * price})


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long a run takes."""

    pace: Pace
    ranks: int
    price: float | None
    """Of an hour of a GPU."""
    epoch: Duration
    run: Duration

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "peak_flops": self.pace.peak,
            "mfu": self.pace.mfu,
            "mfu_from": self.pace.source,
            "epoch": self.epoch.to_json(self.ranks, self.price),
            "run": self.run.to_json(self.ranks, self.price),
        }


def schedule(config: RunConfig, plan: RunPlan, epoch: EpochPlan, share: TrainedShare, known: Pace) -> Schedule:
    """Of a plan; its epochs differ by a few steps, so the first one stands for all."""
    one = _epoch(plan, epoch, share, known)
    total = config.max_train_steps if config.max_train_steps is not None else plan.num_epochs * one.steps
    return Schedule(
        pace=known,
        ranks=epoch.world_size,
        price=config.price,
        epoch=one,
        run=one.times(total / one.steps if one.steps else math.inf),
    )


def _epoch(plan: RunPlan, epoch: EpochPlan, share: TrainedShare, known: Pace) -> Duration:
    costs = Costs(spec=plan.spec, dims=plan.dims, share=share)
    shapes = zip(epoch.frames.tolist(), epoch.height.tolist(), epoch.width.tolist(), strict=True)
    each = np.array([costs.of(*shape).flops for shape in shapes]) * np.diff(epoch.offset)
    by_rank = each[epoch.steps].reshape(epoch.num_steps, -1, epoch.world_size).sum(axis=1)  # [steps, ranks]
    return Duration(
        steps=epoch.num_steps,
        tokens=int(epoch.tokens[epoch.steps].sum()),
        flops=float(by_rank.sum()),
        seconds=float(by_rank.max(axis=1, initial=0).sum()) / (known.peak * known.mfu),
    )


def share_of(parameters: int, trained: int, *, lora: bool) -> TrainedShare:
    """Of so many numbers, adapters included."""
    added = trained if lora else 0
    return TrainedShare(base=parameters - added, added=added, trained=trained)
