"""From the command to the first step, and how long a checkpoint holds training up.

Start-up is measured from outside on the embedded default, against its floor: ``accelerate launch`` of a script that
imports what a training process imports and does nothing. The stall of a checkpoint is the time between the end of a
step and the next one that is not that step's own, with the writing in the foreground and in the background.

    python benchmarks/startup.py --repeats 3
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

STRATEGIES = ("single", "fsdp")
STEPS = 8
RESULTS = Path(__file__).parent / "results" / "startup.json"
IMPORTS = "import torch, accelerate, vfun_cli.training.session, vfun_cli.families.wan_s2v.adapter\n"


def vfun(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "vfun_cli", *arguments]


def options(strategy: str, folder: Path, *more: str) -> list[str]:
    return [
        "train", "wan-s2v", "--demo", "--strategy", strategy, "--output-dir", str(folder), "--max-train-steps",
        str(STEPS), "--report-to", "none", "--dataloader-num-workers", "1", "--overwrite", *more,
    ]  # fmt: skip


def seconds(argv: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(argv, check=True, capture_output=True, env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"})
    return time.perf_counter() - began


def to_first_step(strategy: str, folder: Path) -> tuple[float, list[dict[str, Any]]]:
    """Seconds to the first line of a step, and all lines."""
    metrics = folder / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    began = time.perf_counter()
    argv = vfun(*options(strategy, folder, "--checkpointing-steps", "1000"))
    job = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not metrics.exists() or '"loss"' not in metrics.read_text():
        assert job.poll() is None, "the run ended without a step"
        time.sleep(0.01)
    found = time.perf_counter() - began
    assert job.wait() == 0
    return found, [json.loads(line) for line in metrics.read_text().splitlines()]


def floor(strategy: str, folder: Path) -> float:
    """The launcher and the imports alone."""
    script = folder.with_suffix(".py")
    script.write_text(IMPORTS)
    config = str(folder / "launch" / "accelerate.yaml")
    return seconds([sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, str(script)])


def stall(strategy: str, folder: Path, *, background: bool) -> dict[str, float]:
    """What a checkpoint at every second step costs: seconds of holding up, and of a step without one."""
    how = "--async-checkpoint" if background else "--no-async-checkpoint"
    seconds(vfun(*options(strategy, folder, "--checkpointing-steps", "2", how)))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    saves = [line["seconds"] for line in lines if line.get("event") == "checkpoint" and line["step"] < STEPS]
    steps = [line["seconds"] for line in lines if "loss" in line][2:]
    newest = folder / f"checkpoint-{STEPS}"
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    return {"seconds held up": median(saves), "seconds of a step": median(steps), "bytes": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "load average": os.getloadavg()[0],
        "versions": {name: version(name) for name in ("torch", "accelerate", "diffusers", "transformers")},
        "command": " ".join(["python", *sys.argv]),
    }
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        subprocess.run(vfun("plan-buckets", "wan-s2v", "--demo"), check=True, capture_output=True)  # makes the demo
        for strategy in STRATEGIES:
            folder = Path(strategy)
            first, floors, plans = [], [], []
            for _ in range(given.repeats):  # side by side, so that a noisy minute touches all
                plans.append(seconds(vfun("plan-buckets", "wan-s2v", "--demo")))
                first.append(to_first_step(strategy, folder)[0])
                floors.append(floor(strategy, folder))
            result[strategy] = {
                "seconds to the first step": round(median(first), 2),
                "of these, checks and plan": round(median(plans), 2),
                "floor: launcher and imports": round(median(floors), 2),
                "over the floor": round(median(first) / median(floors), 2),
                "checkpoint in the foreground": stall(strategy, folder, background=False),
                "checkpoint in the background": stall(strategy, folder, background=True),
            }
            print(strategy, json.dumps(result[strategy], indent=1), flush=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
