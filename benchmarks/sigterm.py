"""SIGTERM to the vfun command at random instants, over the strategies: saved at a step boundary and exit 75 every time.

    python benchmarks/sigterm.py --instants 50 --grace 60

Each instant starts a job of its own on the demo and ends it in one of five places: before the training processes are
started, while they load, right after a step (when the next samples are encoded), later in a step, and inside a save,
which is found by the directory that it writes into. Afterwards the command must have ended with exit code 75 within
the grace period, no process of the job may be left, and the newest checkpoint must be that of the last finished step
and verify byte by byte; where they had not begun to train there must be no run at all.

Results: ``benchmarks/results/sigterm.json``.
"""

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record

from vfun_cli.checkpoints import manifest
from vfun_cli.checkpoints.reader import open_checkpoint
from vfun_cli.run.rundir import RunDir

STRATEGIES = ("single", "ddp", "fsdp", "zero2", "zero3")
PLACES = ("before training", "loading", "encoding", "step", "save")
AFTER_START = {"single": 4.0, "ddp": 8.0, "fsdp": 8.0, "zero2": 12.0, "zero3": 12.0}
"""Seconds after the start of the training processes over which the instants of loading are spread."""


def start(run: RunDir, strategy: str) -> "subprocess.Popen[bytes]":
    argv = [
        sys.executable, "-m", "vfun_cli", "train", "wan-s2v", "--demo", "--strategy", strategy, "--output-dir",
        str(run.root), "--max-train-steps", "100000", "--checkpointing-steps", "2", "--checkpoints-total-limit", "2",
        "--report-to", "none",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)


def steps(run: RunDir) -> list[int]:
    """Finished steps, of the lines that are whole."""
    if not run.metrics.exists():
        return []
    lines = [line for line in run.metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [record["step"] for record in map(json.loads, lines) if "loss" in record]


def wait_until(job: "subprocess.Popen[bytes]", what: Any) -> None:
    while not what():
        if job.poll() is not None:
            raise SystemExit(f"the job ended by itself with {job.returncode}: {job.communicate()[1].decode()[-2000:]}")
        time.sleep(0.002)


def wait_for(place: str, strategy: str, run: RunDir, job: "subprocess.Popen[bytes]", rng: random.Random) -> float:
    """Until the instant has come; the random part of the wait."""
    if place == "before training":
        delay = rng.uniform(0, 1.5)
        wait_until(job, lambda: takes_signals(job.pid))
    elif place == "loading":
        delay = rng.uniform(0, AFTER_START[strategy])
        wait_until(job, run.run_json.exists)
    elif place == "save":
        delay = rng.uniform(0, 0.2)
        wait_until(job, lambda: steps(run) and any(run.root.glob(".checkpoint-*")))
    else:
        delay = rng.uniform(0, 0.1) if place == "encoding" else rng.uniform(0.1, 1.5)
        after = rng.randint(1, 4)
        wait_until(job, lambda: len(steps(run)) >= after)
    time.sleep(delay)
    return delay


def takes_signals(pid: int) -> bool:
    """Whether the command's own code has begun: it handles SIGTERM (bit 14 of SigCgt)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


def instant(run: RunDir, strategy: str, place: str, grace: float, rng: random.Random) -> dict[str, Any]:
    """One job, one signal; what came of it."""
    job = start(run, strategy)
    delay = wait_for(place, strategy, run, job, rng)
    began = run.listening().exists()
    job.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    try:
        _, said = job.communicate(timeout=10 * grace)
    except subprocess.TimeoutExpired:
        job.kill()
        raise SystemExit(f"{strategy}, {place}: no end after {10 * grace} seconds; its training goes on") from None
    row: dict[str, Any] = {
        "strategy": strategy, "place": place, "delay": round(delay, 3), "exit_code": job.returncode,
        "seconds": round(time.monotonic() - asked, 2), "training_had_begun": began,
        "processes_left": len(left_over(run)),
    }  # fmt: skip
    complete = manifest.checkpoints(run.root)
    if run.run_json.exists():
        manifest.verify(complete[-1])
        open_checkpoint(complete[-1])
        row |= {"checkpoint": manifest.step_of(complete[-1]), "last_step": max(steps(run), default=0)}
        saved = row["checkpoint"] == row["last_step"] and not any(run.root.glob(".checkpoint-*"))
    else:
        saved = not began and not complete and b"nothing to save" in said
    row["good"] = bool(saved and job.returncode == 75 and row["seconds"] <= grace and not row["processes_left"])
    if not row["good"]:
        print(said.decode()[-2000:], flush=True)
    return row


def left_over(run: RunDir) -> list[int]:
    """Processes that work on this run still."""
    word = str(run.run_json.absolute()).encode()
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and word in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How long it took, by place."""
    found = {}
    for place in PLACES:
        seconds = [row["seconds"] for row in rows if row["place"] == place]
        if seconds:
            found[place] = {
                "instants": len(seconds), "median_seconds": round(statistics.median(seconds), 2),
                "longest_seconds": max(seconds),
            }  # fmt: skip
    return found


def main() -> None:
    parser = record.parser("sigterm", __doc__)
    parser.add_argument("--instants", type=int, default=50)
    parser.add_argument("--grace", type=float, default=60, help="seconds")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.instants, arguments.strategies = 3, ["single"]
    rng, rows = random.Random(arguments.seed), []
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        for number in range(arguments.instants):
            strategy = arguments.strategies[number % len(arguments.strategies)]
            place = PLACES[number // len(arguments.strategies) % len(PLACES)]
            run = RunDir(Path(scratch) / f"run-{number}")
            row = instant(run, strategy, place, arguments.grace, rng)
            rows.append(row)
            print(number + 1, row, flush=True)
            shutil.rmtree(run.root, ignore_errors=True)
            content = {
                "grace_seconds": arguments.grace,
                "good": sum(row["good"] for row in rows),
                "instants": len(rows),
                "by_place": summary(rows),
                "rows": rows,
            }
            record.write_result(arguments, content)
    if not all(row["good"] for row in rows):
        raise SystemExit("not every instant ended as it should")


if __name__ == "__main__":
    main()
