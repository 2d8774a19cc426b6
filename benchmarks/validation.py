"""What it costs to look at a run: a held-out loss and samples, as multiples of a training step, against the passes.

    python benchmarks/validation.py

Trains the embedded default of each family by the product's own command on one process, from a full cache, and reads
off ``metrics.jsonl`` the median step and the last look. A training step is three forward passes' worth of FLOPs, so
that the floor of a look is its passes over three. What is above it: decoding of the videos and writing them, which a
pass knows nothing of, and on a tiny model the time between the products.

Results: ``benchmarks/results/validation.json``.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import record

from vfun_cli import families
from vfun_cli.plan.held_out import QUANTILES
from vfun_cli.run.rundir import RunDir

PASSES_OF_A_STEP = 3
"""Forward and backward, in forward passes."""


def train(family: str, folder: Path, steps: int, size: int, rows: int, sampling_steps: int) -> list[dict[str, Any]]:
    """The records of a run that looks at itself before its first step and after its last."""
    run = RunDir(folder / "run")
    argv = [
        sys.executable, "-m", "vfun_cli", "train", family, "--demo", "--output-dir", str(run.root),
        "--cache", str(folder / "cache"), "--cache-variants", "1", "--max-train-steps", str(steps),
        "--checkpointing-steps", str(10**6), "--validation-steps", str(steps), "--validation-rows", str(rows),
        "--validation-sampling-steps", str(sampling_steps), "--video-sample-size", str(size), "--image-sample-size",
        str(size), "--token-sample-size", str(size), "--report-to", "none", "--dataloader-num-workers", "1",
    ]  # fmt: skip
    subprocess.run(argv, cwd=folder, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def measure(family: str, steps: int, size: int, rows: int, sampling_steps: int) -> dict[str, Any]:
    """Seconds, passes, and their ratios, of the last look."""
    with tempfile.TemporaryDirectory() as folder:
        records = train(family, Path(folder), steps, size, rows, sampling_steps)
    trained = [each for each in records if "loss" in each and "event" not in each]
    step = statistics.median(each["seconds"] for each in trained[len(trained) // 3 :])
    last = {each["event"]: each for each in records if each.get("event") in ("held-out", "samples")}
    branches = 1 + (families.find(family).sampling.guidance > 1)
    passes = {"held-out": rows * len(QUANTILES), "samples": last["samples"]["made"] * sampling_steps * branches}
    found: dict[str, Any] = {"family": family, "step_seconds": round(step, 4)}
    for name, count in passes.items():
        seconds, floor = last[name]["seconds"], count / PASSES_OF_A_STEP
        found[name] = {
            "seconds": seconds,
            "passes": count,
            "training_steps": round(seconds / step, 1),
            "floor_in_training_steps": round(floor, 1),
            "over_floor": round(seconds / step / floor, 2),
        }
    return found


def main() -> None:
    """Measure each family and write the result after each."""
    parser = record.parser("validation", __doc__)
    given = parser.parse_args()
    names = ["cogvideox-fun"] if given.smoke else list(families.FAMILIES)
    steps, size, rows, sampling_steps = (3, 64, 1, 1) if given.smoke else (18, 128, 2, 10)
    found: list[dict[str, Any]] = []
    for family in names:
        found.append(measure(family, steps, size, rows, sampling_steps))
        record.write_result(given, {"rows": found})


if __name__ == "__main__":
    main()
