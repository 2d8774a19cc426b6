"""What this machine can train on, found without importing torch."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path

from vfun_cli.children import absolute_entries
from vfun_cli.errors import EnvironmentFault

_OWN_GROUP, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")

ANSWER_TIMEOUT = 30
"""Seconds that nvidia-smi may take; on a machine with many GPUs and no persistence daemon it takes ten."""


def cpu_cores() -> int:
    """Processor cores that this process may run on: in a container or a share of a node, fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def oom_kills() -> int:
    """Processes that the kernel has ended for want of memory in this process's control group (version 2) and below;
    0 where nothing counts them.
    """
    try:
        group = next(line for line in _OWN_GROUP.read_text().splitlines() if line.startswith("0::"))
        events = (_GROUPS / group.removeprefix("0::").lstrip("/") / "memory.events").read_text()
    except (OSError, StopIteration):
        return 0
    return next((int(line.split()[1]) for line in events.splitlines() if line.startswith("oom_kill ")), 0)


@cache
def gpu_count() -> int:
    """GPUs that a training process would see: CUDA_VISIBLE_DEVICES, else what nvidia-smi lists.

    Raises:
        EnvironmentFault: nvidia-smi hangs, as it does beside a broken driver.
    """
    tool = shutil.which("nvidia-smi", path=absolute_entries(os.environ.get("PATH", os.defpath)))
    if tool is None:
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        named = takewhile(lambda part: not part.startswith("-"), map(str.strip, visible.split(",")))  # -1 ends the list
        return len([part for part in named if part])
    try:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=ANSWER_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired):
        raise EnvironmentFault(
            f"{tool} does not answer, so the GPUs of this machine are unknown.",
            hint="Mend the driver, or export CUDA_VISIBLE_DEVICES=0,1 with the numbers of the GPUs; empty for none.",
        ) from None
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def check_processes(device: str, per_machine: int) -> None:
    """Refuse more processes on this machine than it has devices.

    A machine without GPUs may always run two: that is what the demo does.

    Raises:
        EnvironmentFault: no such device, or too few of them.
    """
    if device == "cuda" and gpu_count() == 0:
        raise EnvironmentFault(
            "--device cuda needs an NVIDIA GPU, and none is visible here.",
            hint="Check nvidia-smi and CUDA_VISIBLE_DEVICES, or use --device cpu. A --dry-run for another machine "
            "needs its --num-processes.",
        )
    devices = gpu_count() if device == "cuda" else max(2, cpu_cores())
    if per_machine > devices:
        what = "GPUs" if device == "cuda" else "processor cores"
        raise EnvironmentFault(
            f"this machine has {devices} {what} for {per_machine} processes.",
            hint=f"Use --num-processes {devices}, or spread over machines with --num-machines.",
        )


def require_package(choice: str, packages: Mapping[str, str]) -> None:
    """Refuse a choice whose Python package is not installed.

    Raises:
        EnvironmentFault: with the command that installs it.
    """
    package = packages.get(choice)
    if package is not None and find_spec(package) is None:
        raise EnvironmentFault(
            f"{choice} needs the Python package {package}, which is not installed.", hint=f"pip install {package}"
        )
