"""A job and its forecast: what was left open is settled by it, and what will not fit is refused."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vfun_cli import console, devices
from vfun_cli.config.memory import memory_bytes
from vfun_cli.config.options import RunConfig
from vfun_cli.config.resolve import HERE, is_default
from vfun_cli.config.strategies import STRATEGIES
from vfun_cli.errors import FitError
from vfun_cli.families.detect import read_config
from vfun_cli.families.spec import FamilySpec
from vfun_cli.forecast.ask import Measurer
from vfun_cli.forecast.batches import batches
from vfun_cli.forecast.forecast import Forecast, Subject, allowed, forecast, size
from vfun_cli.forecast.host import ESTIMATED, host_memory, machine_memory
from vfun_cli.forecast.time import Schedule, pace, schedule, share_of
from vfun_cli.launch.job import Job, changed
from vfun_cli.plan.run_plan import RunPlan
from vfun_cli.plan.schedule import EpochPlan

ASSUMED_MEMORY = 80 * 10**9
"""Bytes of a GPU that is not here and of which nothing is said, where a strategy has to be chosen."""
SHARDING = ("ddp", "zero2", "fsdp", "zero3", "zero3-offload")
"""What is tried where nobody chose a strategy, the cheapest first: with whole weights on each rank, gathered block by
block, gathered layer by layer, and through the host's memory."""


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """All that is said of a run before it starts."""

    forecast: Forecast
    host: Mapping[str, int]
    """Bytes of a machine's memory, by what they are for."""
    machine: int | None
    """Bytes that this machine has; None where the run is planned for another one."""
    schedule: Schedule | None
    """None where the devices' peak or the clips are unknown, or these fill no step."""

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            **self.forecast.to_json(),
            "host": {"bytes": sum(self.host.values()), "machine_bytes": self.machine, **self.host},
            "time": None if self.schedule is None else self.schedule.to_json(),
        }


def outlook(
    command: str,
    config: RunConfig,
    spec: FamilySpec,
    plan: RunPlan,
    epoch: EpochPlan | None,
    measurer: Measurer,
    *,
    typical: bool = False,
    ways: bool = True,
) -> Outlook:
    """Of a run that is planned.

    Args:
        epoch: its first one; None where no clips are known.
        typical, ways: see ``forecast``.

    Raises:
        VfunError: it cannot be measured.
    """
    subject = subject_of(command, config, spec, plan, epoch)
    found = forecast(subject, measurer, typical=typical, ways=ways)
    measured = subject.measured(measurer, subject.batches.heaviest, config)
    known = pace(config, spec.name, config.gpu or _gpu_name())
    here = config.memory is None and devices.gpu_count() > 0
    share = share_of(measured.parameters, measured.trained, lora=subject.lora)
    return Outlook(
        forecast=found,
        host=host_memory(command, config, spec, measured, plan if epoch is not None else None, subject.ranks),
        machine=machine_memory() if here else None,
        schedule=None
        if known is None or epoch is None or not epoch.num_steps
        else schedule(config, plan, epoch, share, known),
    )


def subject_of(command: str, config: RunConfig, spec: FamilySpec, plan: RunPlan, epoch: EpochPlan | None) -> Subject:
    """What a forecast of this run is of; without a model directory, of the largest released model."""
    folder = config.pretrained_model_name_or_path
    stated = read_config(folder, spec) if folder is not None else {}
    return Subject(
        spec=spec,
        config=config,
        stated=stated or spec.model.released,
        ranks=plan.options.world_size,
        lora=command == "lora",
        batches=batches(plan, epoch),
        memory=device_memory(config),
    )


def device_memory(config: RunConfig) -> int | None:
    """Bytes of each device, as stated or as nvidia-smi says."""
    return memory_bytes(config.memory) if config.memory is not None else devices.smallest_gpu()


def _gpu_name() -> str | None:
    return next((name for (name,) in devices.query_gpus("name")), None)


def settled(job: Job, measurer: Measurer) -> tuple[Job, Outlook]:
    """The job with what its forecast decides, and the forecast.

    A strategy that nobody chose becomes the cheapest one that fits; what self-attention gives is kept, instead of
    computed again, where nobody chose otherwise and it fits. A strategy under which it does goes before a cheaper one:
    weights are sent while others compute, attention is the most expensive part of what is computed again. Not so where
    the processor has to step.

    Raises:
        VfunError: it cannot be measured.
    """
    first = fitting = None
    for each in _strategies(job, measurer):
        first = first or each
        if fitting is not None and STRATEGIES[each[0].config.strategy].offloads:
            break
        if not _may_fit(each[1]):
            continue
        kept = _with_attention_kept(*each, measurer)
        if kept is not None:
            return kept
        fitting = fitting or each
    if fitting is not None:
        return fitting
    assert first is not None
    # What would fit is looked for once nothing else is open: it takes several measurements.
    return job, _outlook(job, measurer, ways=True) if first[1].forecast.fits is False else first[1]


def _strategies(job: Job, measurer: Measurer) -> Iterator[tuple[Job, Outlook]]:
    """The job as it is and, where its strategy is open, under each one that is more expensive."""
    found = _outlook(job, measurer)
    yield job, found
    if not (job.resolved.sources["strategy"].startswith(HERE) and job.config.strategy in SHARDING):
        return
    why = f"{HERE}: under {job.config.strategy} "
    why += "self-attention would be computed twice" if _may_fit(found) else f"it {found.forecast.verdict}"
    for name in SHARDING[SHARDING.index(job.config.strategy) + 1 :]:
        if allowed(replace(job.config, strategy=name), job.spec, lora=job.command == "lora"):
            other = changed(job, {"strategy": name}, why)
            yield other, _outlook(other, measurer)


def _with_attention_kept(job: Job, found: Outlook, measurer: Measurer) -> tuple[Job, Outlook] | None:
    """The same where that is not open, None where it does not fit."""
    is_open = is_default(job.resolved.sources["gradient_checkpointing"])
    if not (is_open and job.config.gradient_checkpointing == "block" and found.forecast.fits):
        return job, found
    other = changed(job, {"gradient_checkpointing": "attention"}, f"{HERE}: what self-attention gives fits, too")
    then = _outlook(other, measurer)
    return (other, then) if then.forecast.fits else None


def _may_fit(found: Outlook) -> bool:
    known = found.forecast.subject.memory
    return found.forecast.heaviest.peak <= (ASSUMED_MEMORY if known is None else known)


def _outlook(job: Job, measurer: Measurer, *, ways: bool = False) -> Outlook:
    return outlook(job.command, job.config, job.spec, job.plan, job.plan.first_epoch, measurer, ways=ways)


def refuse(found: Outlook, config: RunConfig) -> None:
    """Refuse what will not fit, unless that was switched off. Where only an estimate of the machine's memory says so,
    that is a warning.

    Raises:
        FitError: naming what does not fit and what would.
    """
    if not config.fit_check:
        return
    if found.forecast.fits is False:
        tried = [str(each) for each in found.forecast.tried]
        ways = f"What fits: {'. '.join(tried)}." if tried else "No option of vfun makes it fit into these GPUs."
        raise FitError(f"the run {found.forecast.verdict}.", hint=f"{ways} --no-fit-check launches it all the same.")
    total, estimated = sum(found.host.values()), found.host.get(ESTIMATED, 0)
    if found.machine is None or total <= found.machine:
        return
    most = max(found.host, key=lambda part: found.host[part])
    what = (
        f"the run needs {size(total)} of this machine's memory, which has {size(found.machine)}; most of it for "
        f"{most} ({size(found.host[most])})"
    )
    if total - estimated <= found.machine:
        console.warn(f"{what}. Fewer --dataloader-num-workers need less.")
        return
    raise FitError(
        f"{what}.",
        hint="Leave out --async-checkpoint, --activation-offload or --low-vram, or use fewer processes. --no-fit-check "
        "launches it all the same.",
    )
