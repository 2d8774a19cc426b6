"""The record of a benchmark: when, how and on what it was measured, and the options that every script has."""

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).absolute().parent / "results"
PACKAGES = (
    "torch", "numpy", "accelerate", "deepspeed", "diffusers", "transformers", "peft", "decord", "eva-decord", "av",
    "safetensors", "typer",
)  # fmt: skip
"""Those that are installed are named with their version."""
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """With the options that all benchmarks have: how to see that a script runs, and where its result goes."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--smoke", action="store_true", help="as small as it can be; the result is printed, not written")
    made.add_argument(
        "--output", type=lambda text: Path(text).absolute(), help=f"where to write; default: results/{name}.json"
    )
    # The load of the benchmark itself says nothing about how quiet the machine was: ask before it starts.
    made.set_defaults(name=name, load_average=round(os.getloadavg()[0], 1))
    return made


def write_result(given: argparse.Namespace, numbers: dict[str, Any]) -> None:
    """Write the record of these numbers, of a benchmark whose options came from ``parser``.

    A benchmark that takes long calls it after every part, so that one which is stopped leaves what it has.
    """
    text = json.dumps({**header(given), **numbers}, indent=1) + "\n"
    output = given.output or (None if given.smoke else RESULTS / f"{given.name}.json")
    if output is None:
        print(text, end="", flush=True)
    else:
        output.parent.mkdir(exist_ok=True)
        output.write_text(text, encoding="utf-8")


def header(given: argparse.Namespace) -> dict[str, Any]:
    """The date, the command, the hardware and the versions."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": shlex.join(["python", f"benchmarks/{given.name}.py", *sys.argv[1:]]),
        "hardware": {
            **_cpu(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "load_average": given.load_average,
            **_gpus(),
        },
        "versions": {"python": platform.python_version(), "platform": _platform(), **_installed()},
    }


def _cpu() -> dict[str, Any]:
    """Its model, and how it multiplies: with AVX2 alone (AMD EPYC, torch 2.13, one thread) bf16 takes 10 times as long
    as float32 in a linear layer and 36 times in a 3D convolution.
    """
    listed = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in listed)}
    flags = facts.get("flags", "").split()
    return {
        "cpu": facts.get("model name") or platform.processor() or platform.machine(),
        "instructions": [name for name in INSTRUCTIONS if name in flags],
    }


def _platform() -> str:
    kernel = platform.release().split("-")[0]
    return f"{platform.system()} {kernel} {platform.machine()}, {' '.join(platform.libc_ver())}"


def _gpus() -> dict[str, list[str]]:
    """Their names, if there are any; asked of the driver, because importing torch takes longer than some benchmarks."""
    if shutil.which("nvidia-smi") is None:
        return {}
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return {"gpus": asked.stdout.splitlines()} if asked.returncode == 0 else {}


def _installed() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
