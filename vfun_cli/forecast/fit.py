"""A job and its forecast: what was left open is settled by it, and what will not fit is refused."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vfun_cli import console, devices
from vfun_cli.config.memory import memory_bytes
from vfun_cli.config.options import RunConfig
from vfun_cli.config.resolve import HERE, is_default
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
SHARDING = ("ddp", "fsdp", "zero3-offload")
"""What is tried where nobody chose a strategy, the cheapest first."""


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
    known = pace(config, config.gpu or _gpu_name())
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
    computed again, where nobody chose otherwise and it fits.

    Raises:
        VfunError: it cannot be measured.
    """
    job, found = _with_attention_kept(*_sharded(job, _outlook(job, measurer), measurer), measurer)
    # What would fit is looked for once nothing else is open: it takes several measurements.
    return job, _outlook(job, measurer, ways=True) if found.forecast.fits is False else found


def _sharded(job: Job, found: Outlook, measurer: Measurer) -> tuple[Job, Outlook]:
    is_open = job.resolved.sources["strategy"].startswith(HERE) and job.config.strategy in SHARDING
    if not is_open or _may_fit(found):
        return job, found
    for name in SHARDING[SHARDING.index(job.config.strategy) + 1 :]:
        if not allowed(replace(job.config, strategy=name), job.spec, lora=job.command == "lora"):
            continue
        other = changed(job, {"strategy": name}, f"{HERE}: under {job.config.strategy} it {found.forecast.verdict}")
        then = _outlook(other, measurer)
        if _may_fit(then):
            return other, then
    return job, found


def _with_attention_kept(job: Job, found: Outlook, measurer: Measurer) -> tuple[Job, Outlook]:
    is_open = is_default(job.resolved.sources["gradient_checkpointing"])
    if not (is_open and job.config.gradient_checkpointing == "block" and found.forecast.fits):
        return job, found
    other = changed(job, {"gradient_checkpointing": "attention"}, f"{HERE}: what self-attention gives fits, too")
    then = _outlook(other, measurer)
    return (other, then) if then.forecast.fits else (job, found)


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
