"""The numbers of a run in a few lines: how fast, how evenly, how much memory, how long, how long still."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from statistics import median

from vfun_cli.report.gather import Record, Told, number


@dataclass(frozen=True, kw_only=True)
class Line:
    """What the steps recorded of one number, in words."""

    name: str
    middle: str
    """The median of all steps."""
    last: str
    """Of the newest step."""
    means: str


def compact(value: float) -> str:
    """A number of any size in few characters: 0.0041, 3.35, 1,240, 2.1 M."""
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def share(value: float) -> str:
    """A part of one as a percentage."""
    return f"{value:.1%}"


def gibibytes(value: float) -> str:
    """As memory is counted."""
    return f"{value:.3g} GiB"


def seconds(value: float) -> str:
    """A step takes 0.081 s, a run 1 day, 2:03:04."""
    return str(timedelta(seconds=round(value))) if 120 <= value < 1e9 else f"{value:.3g} s"


Write = Callable[[float], str]

MEASURED: Sequence[tuple[str, str, Write, str]] = (
    ("whole_seconds", "Time of a step", seconds, "with the wait for clips before it"),
    ("tokens_per_second", "Tokens a second", compact, "of all ranks"),
    ("samples_per_second", "Samples a second", compact, "clips trained on, of all ranks"),
    ("tflops", "TFLOP/s", compact, "model FLOPs of each rank, without recomputation"),
    ("mfu", "MFU", share, "of the FLOPs that the device could do"),
    ("data_wait_share", "Data wait", share, "of the time: rank 0 waited for clips"),
    ("mean_over_max_flops", "Balance", share, "mean over max FLOPs of the ranks: 100% is even"),
    ("padding", "Padding", share, "of the tokens: computed and trained on nothing"),
    ("memory", "Memory", gibibytes, "most so far of any rank: of the device, or of the process on a CPU"),
)
"""Numbers of a step, their names for people, how they are written, what they mean."""


def lines(steps: Sequence[Record]) -> list[Line]:
    """The numbers that steps recorded; one that none has is left out."""
    found = []
    for name, label, write, means in MEASURED:
        values = [value for step in steps if (value := measured(step, name)) is not None]
        if values:
            last = measured(steps[-1], name)
            newest = "" if last is None else write(last)
            found.append(Line(name=label, middle=write(median(values)), last=newest, means=means))
    return found


def measured(step: Record, name: str) -> float | None:
    """One number of a step, in the unit that it is written in."""
    if name == "memory":
        size = number(step, "memory_bytes")
        return None if size is None else size / (1 << 30)
    if name != "whole_seconds":
        return number(step, name)
    tokens, rate = number(step, "tokens"), number(step, "tokens_per_second")
    return tokens / rate if tokens is not None and rate else number(step, "seconds")


def times(told: Told) -> dict[str, str]:
    """Where the time of the run went, and how much is to come."""
    found = {}
    trained = [value for step in told.steps if (value := measured(step, "whole_seconds")) is not None]
    if trained:
        found["Steps"] = f"{len(trained):,} in {seconds(sum(trained))}"
    for event, label in (("checkpoint", "Checkpoints"), ("held-out", "Held-out losses")):
        spent = [value for each in told.events.get(event, ()) if (value := number(each, "seconds")) is not None]
        if spent:
            found[label] = f"{len(spent):,} in {seconds(sum(spent))}, {seconds(sum(spent) / len(spent))} each"
    left = number(told.steps[-1], "seconds_left") if told.steps else None
    if left:
        found["To go"] = f"{(told.total_steps or 0) - told.last_step:,} steps in about {seconds(left)}"
    return found
