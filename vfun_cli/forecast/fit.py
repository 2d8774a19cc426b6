"""A run and its forecast: what was left open is settled by it, and what will not fit is refused."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vfun_cli import console, devices
from vfun_cli.config.memory import memory_bytes
from vfun_cli.config.options import RunConfig
from vfun_cli.config.resolve import HERE, Resolved, is_default
from vfun_cli.config.strategies import STRATEGIES
from vfun_cli.errors import FitError
from vfun_cli.families.detect import read_config
from vfun_cli.families.spec import FamilySpec
from vfun_cli.forecast.ask import Measurer
from vfun_cli.forecast.batches import batches
from vfun_cli.forecast.forecast import Forecast, Subject, allowed, forecast, size
from vfun_cli.forecast.host import ESTIMATED, host_memory, machine_memory
from vfun_cli.forecast.time import Schedule, pace, schedule, share_of
from vfun_cli.launch.disk_need import checkpoint_bytes_with
from vfun_cli.plan.run_plan import RunPlan
from vfun_cli.plan.schedule import EpochPlan

ASSUMED_MEMORY = 80 * 10**9
"""Bytes of a GPU that is not here and of which nothing is said, where a strategy has to be chosen."""
ROOM = 0.05
"""The share of a GPU's memory that what we choose leaves free, where something does: a forecast may be a little off."""
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
    checkpoint: int
    """Bytes of a checkpoint, which all ranks write together."""
    schedule: Schedule | None
    """None where the devices' peak or the clips are unknown, or these fill no step."""

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            **self.forecast.to_json(),
            "host": {"bytes": sum(self.host.values()), "machine_bytes": self.machine, **self.host},
            "time": None if self.schedule is None else self.schedule.to_json(),
        }


def _outlook(
    command: str, subject: Subject, plan: RunPlan, epoch: EpochPlan | None, measurer: Measurer, *, typical: bool
) -> Outlook:
    config, spec = subject.config, subject.spec
    found = forecast(subject, measurer, typical=typical)
    measured = subject.measured(measurer, subject.batches.heaviest, config)
    known = pace(config, spec.name, config.gpu or _gpu_name())
    here = config.memory is None and devices.gpu_count() > 0
    share = share_of(measured.parameters, measured.trained, lora=subject.lora)
    parts = config.parts_of(subject.ranks) if "optimizer" in STRATEGIES[config.strategy].sharded else 1
    checkpoint = checkpoint_bytes_with(command, config, measured.trained, moments=measured.moments * parts)
    return Outlook(
        forecast=found,
        host=host_memory(config, spec, measured, plan if epoch is not None else None, subject.ranks, checkpoint),
        checkpoint=checkpoint,
        machine=machine_memory() if here else None,
        schedule=None
        if known is None or epoch is None or not epoch.num_steps
        else schedule(config, plan, epoch, share, known),
    )


def subject_of(command: str, config: RunConfig, plan: RunPlan, epoch: EpochPlan | None) -> Subject:
    """What a forecast of this run is of; without a model directory, of the largest released model."""
    spec = plan.spec
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


def settled(
    command: str,
    resolved: Resolved,
    plan: RunPlan,
    epoch: EpochPlan | None,
    measurer: Measurer,
    *,
    typical: bool = False,
) -> tuple[Resolved, Outlook]:
    """The options with what their forecast decides, and the forecast.

    A strategy that nobody chose becomes the cheapest one that fits; what self-attention gives is kept, instead of
    computed again, where nobody chose otherwise and it fits. A strategy under which it does goes before a cheaper one:
    weights are sent while others compute, attention is the most expensive part of what is computed again. Not so where
    the processor has to step.

    Args:
        epoch: its first one; None where no clips are known.
        typical: see ``forecast``.

    Raises:
        VfunError: it cannot be measured.
    """
    subject = subject_of(command, resolved.config, plan, epoch)

    def look(options: Resolved) -> Forecast:
        return forecast(replace(subject, config=options.config), measurer, ways=False)

    best = _best(resolved, look, plan.spec, lora=subject.lora)
    return best, _outlook(command, replace(subject, config=best.config), plan, epoch, measurer, typical=typical)


Look = Callable[[Resolved], Forecast]


def _best(resolved: Resolved, look: Look, spec: FamilySpec, *, lora: bool) -> Resolved:
    """The first options that fit with some room, or else tightly; as they are if none do."""
    fitting = tight = None
    for options, found in _strategies(resolved, look, spec, lora=lora):
        if tight is not None and STRATEGIES[options.config.strategy].offloads:
            break
        if not _may_fit(found):
            continue
        tight = tight or options
        if not _may_fit(found, ROOM):
            continue
        if found.fits is None or not _attention_is_open(options):
            return options
        kept = options.settled({"gradient_checkpointing": "attention"}, f"{HERE}: what self-attention gives fits, too")
        if _may_fit(look(kept), ROOM):
            return kept
        fitting = fitting or options
    return fitting or tight or resolved


def _strategies(resolved: Resolved, look: Look, spec: FamilySpec, *, lora: bool) -> Iterator[tuple[Resolved, Forecast]]:
    """The options as they are and, where the strategy is open, with each one that is more expensive."""
    first, config = look(resolved), resolved.config
    yield resolved, first
    if not (resolved.sources["strategy"].startswith(HERE) and config.strategy in SHARDING):
        return
    needs = f"it needs {size(first.heaviest.peak)}"
    why = f"{HERE}: under {config.strategy} "
    why += "self-attention would be computed twice" if _may_fit(first, ROOM) else needs
    for name in SHARDING[SHARDING.index(config.strategy) + 1 :]:
        if allowed(replace(config, strategy=name), spec, lora=lora):
            other = resolved.settled({"strategy": name}, why)
            yield other, look(other)


def _attention_is_open(resolved: Resolved) -> bool:
    return is_default(resolved.sources["gradient_checkpointing"]) and resolved.config.gradient_checkpointing == "block"


def _may_fit(found: Forecast, room: float = 0) -> bool:
    known = found.subject.memory
    return found.heaviest.peak <= (1 - room) * (ASSUMED_MEMORY if known is None else known)


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
