"""What decoding processes cost before the first step: processor time, and memory.

Run from the repository root: ``python benchmarks/decoding_start.py``. The aim: at most 2 s and 150 MiB for two of them.
A demo is trained under one process, with decoding processes and without; when its first step is told, the processes
below the rank (the fork server and those that it forked) are asked what they have computed, and rank and all of them
how much memory they take together, shared pages counted once. Beside it stands what one interpreter of its own costs
that imports what they need, shared libraries not counted.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from record import parser, write_result

FAMILIES = ("wan-s2v", "cogvideox-fun")
PROCESSES = 2
RUN = Path("vfun-demo/output_dir")
IMPORTS = """
import importlib, sys, time
from pathlib import Path
from vfun_cli import families
from vfun_cli.training.data import loader
importlib.import_module(families.find(sys.argv[1]).adapter.partition(":")[0])
print(time.process_time(), Path("/proc/self/smaps_rollup").read_text())
"""


def before_the_first_step(family: str, workers: int) -> tuple[float, int]:
    """Processor seconds of the processes below the rank, and bytes of it and them."""
    metrics = RUN / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    job = subprocess.Popen(
        [
            sys.executable, "-m", "vfun_cli", "train", family, "--demo", "--strategy", "single", "--overwrite",
            "--dataloader-num-workers", str(workers), "--max-train-steps", "1000", "--report-to", "none",
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not metrics.exists() or '"loss"' not in metrics.read_text():
        assert job.poll() is None, "the run ended without a step"
        time.sleep(0.01)
    (launcher,) = children(job.pid)
    (rank,) = children(launcher)
    below = all_below(rank)
    ticks = sum(sum(map(int, stat(process)[11:13])) for process in below)
    held = sum(kibibytes("Pss", Path(f"/proc/{process}/smaps_rollup").read_text()) for process in [rank, *below])
    job.terminate()
    job.terminate()  # the second one saves nothing
    job.wait()
    return ticks / os.sysconf("SC_CLK_TCK"), 1024 * held


def stat(process: int) -> list[str]:
    """From the state on, see proc(5)."""
    return Path(f"/proc/{process}/stat").read_text().rsplit(") ", 1)[1].split()


def children(process: int) -> list[int]:
    """The processes that it started, the bookkeeper of multiprocessing left out."""
    listed = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(each) for each in listed if b"resource_tracker" not in Path(f"/proc/{each}/cmdline").read_bytes()]


def all_below(process: int) -> list[int]:
    return [each for child in children(process) for each in (child, *all_below(child))]


def kibibytes(name: str, text: str) -> int:
    said = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    assert said
    return int(said[1])


def interpreter(family: str) -> dict[str, Any]:
    """One that imports what decoding needs."""
    argv = [sys.executable, "-c", IMPORTS, family]
    seconds, _, memory = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.partition(" ")
    return {"processor_seconds": round(float(seconds), 2), "bytes": 1024 * kibibytes("Private_Dirty", memory)}


def measured(family: str, repeats: int) -> dict[str, Any]:
    with_them = [before_the_first_step(family, PROCESSES) for _ in range(repeats)]
    alone = [before_the_first_step(family, 0) for _ in range(repeats)]
    return {
        "processor_seconds": round(median(seconds for seconds, _ in with_them), 2),
        "bytes": round(median(held for _, held in with_them) - median(held for _, held in alone)),
        "an interpreter of its own": interpreter(family),
    }


def main() -> None:
    """Measure, print and write."""
    options = parser("decoding_start", __doc__)
    options.add_argument("--repeats", type=int, default=3)
    given = options.parse_args()
    chosen = FAMILIES[1:] if given.smoke else FAMILIES
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        found = {family: measured(family, 1 if given.smoke else given.repeats) for family in chosen}
    print(json.dumps(found, indent=1), flush=True)
    write_result(given, {"processes": PROCESSES, **found})


if __name__ == "__main__":
    main()
