"""What this machine can train on, found without importing torch."""

import os
import shutil
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path

from vfun_cli.children import absolute_entries
from vfun_cli.errors import EnvironmentFault

_OWN_GROUP, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")

ANSWER_TIMEOUT = 30
"""Seconds that nvidia-smi may take; on a machine with many GPUs and no persistence daemon it takes ten."""

CPUINFO = Path("/proc/cpuinfo")
BF16_UNITS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""What a processor calls its products of bf16 numbers there; the last is Arm's."""


def cpu_cores() -> int:
    """Processor cores that this process may run on: in a container or a share of a node, fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def multiplies_bf16() -> bool:
    """Whether the processor has units for it. Without them torch converts each number: with AVX2 alone a linear layer
    takes 4 times as long as in float32, a 3D convolution 60 times (``benchmarks/bf16_on_cpu.py``).
    """
    facts = processor()
    return not BF16_UNITS.isdisjoint(facts.get("flags", facts.get("Features", "")).split())


def processor() -> dict[str, str]:
    """What the system says of it, by the system's names; nothing where it does not."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


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
    tool = _nvidia_smi()
    if tool is None:
        return 0
    visible = _visible()
    return sum(line.startswith("GPU ") for line in _ask(tool, "-L")) if visible is None else len(visible)


@cache
def smallest_gpu() -> int | None:
    """Bytes of memory of the smallest GPU that a training process would see; None where nvidia-smi tells none.

    Raises:
        EnvironmentFault: nvidia-smi hangs.
    """
    visible = _visible()
    seen = [
        memory.removesuffix(" MiB")
        for index, uuid, memory in query_gpus("index", "uuid", "memory.total")
        if visible is None or any(index == name or uuid.startswith(name) for name in visible)
    ]
    return min((int(mebibytes) << 20 for mebibytes in seen if mebibytes.isdigit()), default=None)


def query_gpus(*fields: str) -> list[list[str]]:
    """Values of nvidia-smi's fields for each GPU of this machine, with their units; no rows where it tells none.

    Raises:
        EnvironmentFault: nvidia-smi hangs.
    """
    tool = _nvidia_smi()
    if tool is None:
        return []
    lines = _ask(tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    rows = [[value.strip() for value in line.split(",")] for line in lines]
    return [row for row in rows if len(row) == len(fields)]  # a driver that fails says so in a sentence


def _nvidia_smi() -> str | None:
    return shutil.which("nvidia-smi", path=absolute_entries(os.environ.get("PATH", os.defpath)))


def _visible() -> list[str] | None:
    """The GPUs that CUDA_VISIBLE_DEVICES names, by number or UUID; None if it is not set."""
    stated = os.environ.get("CUDA_VISIBLE_DEVICES")
    if stated is None:
        return None
    named = takewhile(lambda part: not part.startswith("-"), map(str.strip, stated.split(",")))  # -1 ends the list
    return [part for part in named if part]


def _ask(tool: str, *arguments: str) -> list[str]:
    """The lines of nvidia-smi's answer."""
    try:
        answer = subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=ANSWER_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired):
        raise EnvironmentFault(
            f"{tool} does not answer, so the GPUs of this machine are unknown.",
            hint="Mend the driver, or export CUDA_VISIBLE_DEVICES=0,1 with the numbers of the GPUs; empty for none.",
        ) from None
    return answer.stdout.splitlines()


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


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those Python packages that are installed."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def require_package(choice: str, module: str, *, install: str | None = None) -> None:
    """Refuse a choice whose Python package is not installed.

    Args:
        module: what is imported of it.
        install: what is installed for that, where it has another name.

    Raises:
        EnvironmentFault: with the command that installs it.
    """
    package = install or module
    if find_spec(module) is None:
        raise EnvironmentFault(
            f"{choice} needs the Python package {package}, which is not installed.", hint=f"pip install {package}"
        )
