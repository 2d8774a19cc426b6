"""What a run takes of a machine's own memory."""

from collections.abc import Mapping
from pathlib import Path

from vfun_cli.config.options import RunConfig
from vfun_cli.config.strategies import STRATEGIES
from vfun_cli.families.spec import FamilySpec
from vfun_cli.forecast.memory import GIB, encoder_bytes
from vfun_cli.forecast.request import Measured
from vfun_cli.plan.queue import bytes_in_flight, micro_batches_ahead
from vfun_cli.plan.run_plan import RunPlan

ESTIMATED = "processes"
"""The part that is not counted but estimated."""
PROCESS = int(2.5 * GIB)
"""Of a rank: Python with torch, CUDA's libraries, and what the driver maps."""
WORKER = int(0.4 * GIB)
"""Of a decoding process, forked from one that has imported torch, without the frames that it decodes."""


def host_memory(
    config: RunConfig, spec: FamilySpec, measured: Measured, plan: RunPlan | None, ranks: int, checkpoint: int
) -> Mapping[str, int]:
    """Bytes of one machine, by what they are for.

    Args:
        plan: with its clips; None where none are known.
        ranks: of all machines.
        checkpoint: its bytes, which all machines write together.
    """
    here = ranks // config.num_machines
    strategy = STRATEGIES[config.strategy]
    state = measured.weights + measured.masters + measured.gradients + measured.moments + measured.average
    shared = {name for name, each in spec.model.encoders.items() if each.shared and strategy.shares_encoders}
    pinned = sum(size for name, size in encoder_bytes(config, spec, measured, 1).items() if name not in shared)
    parts = {
        ESTIMATED: here * (PROCESS + config.dataloader_num_workers * WORKER),
        "offloaded state": here * state * strategy.offloads,
        "offloaded activations": here * measured.offloaded,
        "streamed blocks": here * measured.streamed,
        "encoders": here * pinned * config.low_vram,
        "micro-batches in /dev/shm": 0 if plan is None else _queued(config, plan, here),
        "checkpoint in /dev/shm": checkpoint // config.num_machines * config.async_checkpoint,
    }
    return {name: value for name, value in parts.items() if value}


def _queued(config: RunConfig, plan: RunPlan, here: int) -> int:
    return bytes_in_flight(config, plan, micro_batches_ahead(config, plan)) if here else 0


def machine_memory() -> int | None:
    """Bytes that this machine, or the container, has for processes; None where the system does not say."""
    limits = [_read(Path("/sys/fs/cgroup/memory.max"))]
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemTotal:"):
            limits.append(int(line.split()[1]) << 10)
    known = [limit for limit in limits if limit is not None]
    return min(known, default=None)


def _read(path: Path) -> int | None:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
