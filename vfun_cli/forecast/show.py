"""A forecast as people read it."""

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vfun_cli.forecast.fit import Outlook
from vfun_cli.forecast.forecast import Forecast, size
from vfun_cli.forecast.memory import GIB
from vfun_cli.forecast.time import Duration, Schedule


def shown(found: Outlook) -> RenderableType:
    """The verdict, a table of phases and parts, the host's memory, the ways that fit, and how long it takes."""
    return Group(
        Text.assemble(("Memory", "bold"), ("  of each GPU, heaviest micro-batch, in GiB", "dim")),
        _table(found.forecast),
        *_typical(found.forecast),
        _verdict(found.forecast),
        *(Text(f"  {tried}") for tried in found.forecast.tried),
        Text(f"  each machine: {_host(found)}"),
        *([] if found.schedule is None else [Text.assemble(("Time", "bold")), *_time(found.schedule)]),
    )


def _typical(found: Forecast) -> Iterator[Text]:
    if found.typical is not None:
        yield Text(f"  {found.subject.batches.typical}, the median: {size(found.typical.peak)}", "dim")


def _table(found: Forecast) -> Table:
    """A line for what lies there, a column for each phase; the one that decides is bold."""
    phases = found.heaviest.parts
    table = Table(box=None, padding=(0, 1, 0, 1))
    table.add_column("")
    for phase in phases:
        table.add_column(phase, justify="right", style="bold" if phase == found.heaviest.binding else "")
    for name in dict.fromkeys(name for parts in phases.values() for name in parts):
        table.add_row(name, *(f"{parts[name] / GIB:.1f}" if parts.get(name) else "" for parts in phases.values()))
    table.add_row("in all", *(f"{total / GIB:.1f}" for total in found.heaviest.phases.values()))
    return table


def _verdict(found: Forecast) -> Text:
    style = {True: "green", False: "red", None: ""}[found.fits]
    return Text(f"  {found.verdict}", style)


def _host(found: Outlook) -> str:
    total = size(sum(found.host.values()))
    parts = ", ".join(f"{name} {bytes_ / GIB:.1f}" for name, bytes_ in found.host.items())
    has = "" if found.machine is None else f" of {size(found.machine)}"
    return f"{total}{has} of memory ({parts})"


def _time(known: Schedule) -> Iterator[Text]:
    pace = known.pace
    yield Text(f"  at {100 * pace.mfu:.0f} % of {pace.peak / 1e12:.0f} TFLOP/s ({pace.source})", "dim")
    for name, duration in (("epoch", known.epoch), ("run", known.run)):
        yield Text(f"  {name}: {_duration(duration, known)}")


def _duration(duration: Duration, known: Schedule) -> str:
    gpu_hours = duration.seconds / 3600 * known.ranks
    cost = "" if known.price is None else f", {gpu_hours * known.price:,.2f} at {known.price:g} an hour of a GPU"
    return (
        f"{_clock(duration.seconds)}, {gpu_hours:,.1f} GPU-hours{cost}: {duration.steps:,} steps, "
        f"{duration.tokens:,} tokens, {duration.flops:.3g} FLOPs"
    )


def _clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h"
