"""What a result was found on, and what this machine lacks. torch is not imported."""

import os
import platform
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from vfun_cli import devices

PACKAGES = (
    "torch", "numpy", "accelerate", "deepspeed", "diffusers", "transformers", "peft", "decord", "eva-decord", "av",
    "safetensors", "typer",
)  # fmt: skip
"""Those that are installed are named with their version."""

INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
GPU_FIELDS = ("name", "driver_version", "memory.total", "compute_cap")
"""What nvidia-smi is asked for."""

MEMORY_OF_ROW = 3 << 30
"""Bytes of host memory: a launcher and a rank that have imported torch, one of them with CUDA."""
MOST_JOBS = 12
"""Rows at a time: each CUDA context takes about 0.5 GB of the card, the tiny models next to nothing."""


def hardware() -> dict[str, Any]:
    """The processor, memory and GPUs."""
    return {**_cpu(), "cores": os.cpu_count(), "memory_bytes": memory_bytes(), **_gpus()}


def versions() -> dict[str, str]:
    """Of Python, the system, and the packages that are installed."""
    kernel = platform.release().split("-")[0]
    system = f"{platform.system()} {kernel} {platform.machine()}, {' '.join(platform.libc_ver())}"
    return {"python": platform.python_version(), "platform": system, **devices.installed_versions(PACKAGES)}


def memory_bytes() -> int:
    """Of the host."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def jobs() -> int:
    """How many rows run at a time."""
    return max(1, min(MOST_JOBS, devices.cpu_cores(), memory_bytes() // MEMORY_OF_ROW))


def lacks(device: str) -> dict[str, str]:
    """What rows may need and is not here, with the reason why a row is skipped."""
    found = {
        "av": (find_spec("av"), "PyAV (av) is not installed"),
        "deepspeed": (find_spec("deepspeed"), "DeepSpeed is not installed"),
        "cuda": (device == "cuda", "needs a GPU"),
        "compiler": (_compiler(), "no C++ compiler is installed"),
    }
    return {name: reason for name, (there, reason) in found.items() if not there}


def _compiler(environ: Mapping[str, str] = os.environ) -> str | None:
    return shutil.which(environ.get("CXX", "g++"))


def _cpu() -> dict[str, Any]:
    """Its model, and by which instructions it multiplies: see ``devices.multiplies_bf16``."""
    facts = devices.processor()
    flags = facts.get("flags", "").split()
    return {
        "cpu": facts.get("model name") or platform.processor() or platform.machine(),
        "instructions": [name for name in INSTRUCTIONS if name in flags],
    }


def _gpus() -> dict[str, list[dict[str, str]]]:
    """If there are any; asked of the driver, because importing torch takes longer than some benchmarks."""
    listed = devices.query_gpus(*GPU_FIELDS)
    return {"gpus": [dict(zip(GPU_FIELDS, row, strict=True)) for row in listed]} if listed else {}
